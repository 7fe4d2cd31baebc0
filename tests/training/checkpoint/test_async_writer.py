"""Asynchronous saves write the state at the time of the save, one after another, and every failure is
raised.
"""

from __future__ import annotations

import errno
import os
import random
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from snapshots import snapshot
from tiny_run import tiny_run, tiny_trainer

from llm_trainer.config import CheckpointError
from llm_trainer.diagnostics.verify_resume import StopAtStep, compare_checkpoints
from llm_trainer.run_dir import JSON, list_checkpoints, resolve_resume_folder, verify
from llm_trainer.training.callbacks.callback import Callback
from llm_trainer.training.checkpoint import snapshot as snapshot_module
from llm_trainer.training.checkpoint.store import CheckpointData, CheckpointStore, Progress
from llm_trainer.training.run import TrainingRun


def change(data: CheckpointData) -> None:
    """What the next steps do to weights and optimizer state."""
    with torch.no_grad():
        for tensor in [
            *data.model.parameters(),
            *(value for one in data.optimizers for state in one.state.values() for value in state.values()),
        ]:
            tensor.add_(1)


def held_back(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Weights are written only once this is set."""
    go, write = threading.Event(), snapshot_module.write_weights

    def write_then(*given: object) -> None:
        assert go.wait(20)
        write(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(snapshot_module, "write_weights", write_then)
    return go


def disk_is_full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_is_written_is_the_state_at_the_time_of_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for optimizer in ("adamw", "muon"):
        data = snapshot(tmp_path, optimizer=optimizer)
        now = CheckpointStore(tmp_path / optimizer / "now").save(data, 2)
        with monkeypatch.context() as patch:
            go = held_back(patch)
            store = CheckpointStore(tmp_path / optimizer / "later", asynchronous="on")
            path = store.save(data, 2)
            assert not path.exists()
            assert store.progress == Progress.BUSY
            change(data)
            go.set()
            assert store.wait() == [path]
        assert compare_checkpoints(now, path) == []
        assert verify(path) == []


def test_best_model_and_checkpoint_of_one_step_are_written_from_the_same_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, go = snapshot(tmp_path), held_back(monkeypatch)
    store = CheckpointStore(tmp_path / "run", asynchronous="on")
    best = store.save_best(data)
    path = store.save(data, 2)  # would wait for ever if it needed copies of its own
    go.set()
    assert store.wait() == [best, path]
    assert compare_checkpoints(best, path) == []


def test_changed_weights_of_the_same_step_are_copied_again(tmp_path: Path) -> None:
    data = snapshot(tmp_path)
    store = CheckpointStore(tmp_path / "run", asynchronous="on")
    best = store.save_best(data)
    change(data)
    path = store.save(data, 2)
    store.wait()
    assert compare_checkpoints(best, path) != []
    assert compare_checkpoints(path, CheckpointStore(tmp_path / "now").save(data, 2)) == []


def test_a_step_of_a_fused_optimizer_is_noticed_during_an_earlier_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a step does not change torch's counts of writes to the weights."""
    data = snapshot(tmp_path)
    with monkeypatch.context() as patch:
        go = held_back(patch)
        store = CheckpointStore(tmp_path / "run", asynchronous="on")
        store.save(data, 2)
        for parameter in data.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        for optimizer in data.optimizers:
            optimizer.step()
        threading.Timer(0.3, go.set).start()
        now = replace(data, state={"step": 3})
        path = store.save(now, 3)
        store.wait()
    assert compare_checkpoints(path, CheckpointStore(tmp_path / "now").save(now, 3)) == []


def test_a_failure_in_the_background_is_raised_once_and_leaves_no_leftovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = snapshot(tmp_path)
    store = CheckpointStore(tmp_path / "run", asynchronous="on")
    store.save(data, 1)
    store.wait()
    with monkeypatch.context() as patch:
        patch.setattr(snapshot_module, "write_weights", disk_is_full)
        store.save(data, 2)
        with pytest.raises(CheckpointError, match="checkpoint-2 could not be saved: the disk is full"):
            store.wait()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-1"]
    store.save(data, 3)
    assert [path.name for path in store.wait()] == ["checkpoint-3"]


def test_errors_other_than_the_disks_are_raised_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a mistake")

    store = CheckpointStore(tmp_path / "run", asynchronous="on")
    monkeypatch.setattr(snapshot_module, "write_weights", broken)
    store.save(snapshot(tmp_path), 1)
    with pytest.raises(CheckpointError, match="a mistake"):
        store.save_final(snapshot(tmp_path))


def test_an_emergency_save_is_written_after_a_failed_one_in_the_background_and_the_failure_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path / "run", asynchronous="on")
    with monkeypatch.context() as patch:
        patch.setattr(snapshot_module, "write_weights", disk_is_full)
        store.save(snapshot(tmp_path), 1)
        store._writer.wait()
    with pytest.raises(CheckpointError, match="checkpoint-1 could not be saved"):
        store.save_emergency(snapshot(tmp_path), 2)
    assert verify(tmp_path / "run/emergency-2") == []


def test_a_run_ends_at_the_step_after_a_save_in_the_background_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullAfter(Callback):
        def on_step_end(self, run: TrainingRun, step: int) -> None:
            if step == 6:
                monkeypatch.setattr(snapshot_module, "write_weights", disk_is_full)

    trainer = tiny_trainer(
        tmp_path, callbacks=[FullAfter()], asynchronous_saves="on", eval_interval=100, max_steps=300
    )
    with pytest.raises(CheckpointError, match="checkpoint-6 could not be saved"):
        trainer.train()
    assert trainer.current_step < 300
    assert [path.name for path in sorted(tmp_path.glob("*-*"))] == ["checkpoint-3"]
    assert verify(tmp_path / "checkpoint-3") == []


def test_resumed_from_a_save_in_the_background_the_run_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    tiny_run(tmp_path / "straight", asynchronous_saves="off")
    tiny_run(tmp_path / "cut", asynchronous_saves="on", callbacks=[StopAtStep(7)])
    tiny_run(tmp_path / "cut", asynchronous_saves="on", resume_from=str(tmp_path / "cut/checkpoint-6"))
    assert compare_checkpoints(tmp_path / "straight/final_model", tmp_path / "cut/final_model") == []


def test_callbacks_are_called_for_each_checkpoint_once_it_is_complete(tmp_path: Path) -> None:
    class Listener(Callback):
        def __init__(self) -> None:
            self.heard: list[tuple[str, bool]] = []

        def on_checkpoint(self, run: TrainingRun, path: Path) -> None:
            self.heard.append((path.name, not verify(path)))

    for how in ("on", "off"):
        listener = Listener()
        tiny_run(tmp_path / how, asynchronous_saves=how, callbacks=[listener])
        assert listener.heard == [(f"checkpoint-{step}", True) for step in (3, 6, 9)]


def test_ephemeral_saves_replace_each_other_and_can_be_resumed(tmp_path: Path) -> None:
    settings = {
        "save_interval": 4,
        "ephemeral_save_interval": 1,
        "ephemeral_save_limit": 2,
        "eval_interval": 100,
    }
    tiny_run(tmp_path / "straight", **settings)
    tiny_run(tmp_path / "cut", callbacks=[StopAtStep(7)], **settings)
    there = {one.path.name for one in list_checkpoints(tmp_path / "cut")}
    assert there == {"checkpoint-4", "recent-6", "recent-7", "final_model"}
    tiny_run(tmp_path / "again", resume_from=str(tmp_path / "cut/recent-6"), **settings)
    assert resolve_resume_folder(tmp_path / "cut/recent-7.pt").name == "recent-7"
    assert compare_checkpoints(tmp_path / "straight/final_model", tmp_path / "again/final_model") == []


class Draws(Callback):
    """Somebody's own callback, which draws from whatever generators there are."""

    def __init__(self) -> None:
        self.drawn: dict[int, tuple[float, ...]] = {}

    def on_step_end(self, run: TrainingRun, step: int) -> None:
        self.drawn[step] = (random.gauss(0, 1), float(np.random.rand()), float(torch.rand(())))


@pytest.mark.parametrize("how", ["on", "off"])
def test_user_random_numbers_continue_after_a_resume(tmp_path: Path, how: str) -> None:
    straight, resumed = Draws(), Draws()
    tiny_run(tmp_path, callbacks=[straight], asynchronous_saves=how, model={"dropout": 0.0})
    random.seed(0)
    tiny_run(
        tmp_path, callbacks=[resumed], resume_from=str(tmp_path / "checkpoint-6"), model={"dropout": 0.0}
    )
    assert resumed.drawn == {step: straight.drawn[step] for step in range(7, 11)}


def test_by_default_a_large_save_is_asynchronous_where_there_is_memory_and_a_core_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_at_once(large_from: int, memory_left: int, cores: int) -> bool:
        monkeypatch.setattr("llm_trainer.training.checkpoint.store.ASYNC_MIN_BYTES", large_from)
        monkeypatch.setattr(
            "llm_trainer.training.checkpoint.store.available_host_memory", lambda: memory_left
        )
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        store = CheckpointStore(tmp_path / f"{large_from}-{memory_left}-{cores}", asynchronous="auto")
        path = store.save(snapshot(tmp_path), 1)
        written = path.exists()
        store.wait()
        return written

    go, busy = held_back(monkeypatch), torch.get_num_threads()
    threading.Timer(0.3, go.set).start()
    assert not is_at_once(large_from=1000, memory_left=10**9, cores=busy + 1)
    assert is_at_once(large_from=10**9, memory_left=10**9, cores=busy + 1)
    assert is_at_once(large_from=1000, memory_left=10_000, cores=busy + 1)
    assert is_at_once(large_from=1000, memory_left=10**9, cores=busy)


def test_the_state_that_is_written_does_not_change_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state: dict[str, JSON] = {"step": 2, "counts": {"a": 1}}
    go = held_back(monkeypatch)
    store = CheckpointStore(tmp_path / "run", asynchronous="on")
    path = store.save(snapshot(tmp_path, state=state), 2)
    state["counts"] = {"a": 2}
    go.set()
    store.wait()
    assert '"a": 1' in (path / "state.json").read_text(encoding="utf-8")
