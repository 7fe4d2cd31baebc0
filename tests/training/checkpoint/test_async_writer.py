"""Saves in the background: what is written is what was there at the step's edge, one after another, and a
failure is always told.
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


def change(taken: CheckpointData) -> None:
    """What the next steps do to weights and optimizer state."""
    with torch.no_grad():
        for tensor in [
            *taken.model.parameters(),
            *(value for one in taken.optimizers for state in one.state.values() for value in state.values()),
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


def test_what_is_written_is_what_was_there_when_it_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for optimizer in ("adamw", "muon"):
        taken = snapshot(tmp_path, optimizer=optimizer)
        now = CheckpointStore(tmp_path / optimizer / "now").save(taken, 2)
        with monkeypatch.context() as patch:
            go = held_back(patch)
            store = CheckpointStore(tmp_path / optimizer / "later", asynchronous="on")
            place = store.save(taken, 2)
            assert not place.exists()
            assert store.progress == Progress.BUSY
            change(taken)
            go.set()
            assert store.wait() == [place]
        assert compare_checkpoints(now, place) == []
        assert verify(place) == []


def test_best_model_and_checkpoint_of_one_step_are_written_from_the_same_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, go = snapshot(tmp_path), held_back(monkeypatch)
    store = CheckpointStore(tmp_path / "run", asynchronous="on")
    best = store.save_best(taken)
    place = store.save(taken, 2)  # would wait for ever if it needed copies of its own
    go.set()
    assert store.wait() == [best, place]
    assert compare_checkpoints(best, place) == []


def test_changed_weights_of_the_same_step_are_copied_again(tmp_path: Path) -> None:
    taken = snapshot(tmp_path)
    store = CheckpointStore(tmp_path / "run", asynchronous="on")
    best = store.save_best(taken)
    change(taken)
    place = store.save(taken, 2)
    store.wait()
    assert compare_checkpoints(best, place) != []
    assert compare_checkpoints(place, CheckpointStore(tmp_path / "now").save(taken, 2)) == []


def test_a_step_of_a_fused_optimizer_is_seen_while_an_earlier_save_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a step leaves torch's counts of writes to the weights as they were."""
    taken = snapshot(tmp_path)
    with monkeypatch.context() as patch:
        go = held_back(patch)
        store = CheckpointStore(tmp_path / "run", asynchronous="on")
        store.save(taken, 2)
        for parameter in taken.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        for optimizer in taken.optimizers:
            optimizer.step()
        threading.Timer(0.3, go.set).start()
        now = replace(taken, state={"step": 3})
        place = store.save(now, 3)
        store.wait()
    assert compare_checkpoints(place, CheckpointStore(tmp_path / "now").save(now, 3)) == []


def test_a_failure_in_the_background_is_raised_once_and_leaves_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = snapshot(tmp_path)
    store = CheckpointStore(tmp_path / "run", asynchronous="on")
    store.save(taken, 1)
    store.wait()
    with monkeypatch.context() as patch:
        patch.setattr(snapshot_module, "write_weights", disk_is_full)
        store.save(taken, 2)
        with pytest.raises(CheckpointError, match="checkpoint-2 could not be saved: the disk is full"):
            store.wait()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-1"]
    store.save(taken, 3)
    assert [path.name for path in store.wait()] == ["checkpoint-3"]


def test_what_is_no_error_of_the_disk_is_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a mistake")

    store = CheckpointStore(tmp_path / "run", asynchronous="on")
    monkeypatch.setattr(snapshot_module, "write_weights", broken)
    store.save(snapshot(tmp_path), 1)
    with pytest.raises(CheckpointError, match="a mistake"):
        store.save_final(snapshot(tmp_path))


def test_an_emergency_save_is_made_though_one_in_the_background_failed_and_the_failure_is_told(
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


def test_callbacks_hear_of_each_checkpoint_when_it_is_whole(tmp_path: Path) -> None:
    class Listener(Callback):
        def __init__(self) -> None:
            self.heard: list[tuple[str, bool]] = []

        def on_checkpoint(self, run: TrainingRun, path: Path) -> None:
            self.heard.append((path.name, not verify(path)))

    for how in ("on", "off"):
        listener = Listener()
        tiny_run(tmp_path / how, asynchronous_saves=how, callbacks=[listener])
        assert listener.heard == [(f"checkpoint-{step}", True) for step in (3, 6, 9)]


def test_recent_saves_replace_each_other_beside_the_lasting_ones_and_can_be_resumed(tmp_path: Path) -> None:
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
def test_random_numbers_of_ones_own_go_on_after_a_resume(tmp_path: Path, how: str) -> None:
    straight, resumed = Draws(), Draws()
    tiny_run(tmp_path, callbacks=[straight], asynchronous_saves=how, model={"dropout": 0.0})
    random.seed(0)
    tiny_run(
        tmp_path, callbacks=[resumed], resume_from=str(tmp_path / "checkpoint-6"), model={"dropout": 0.0}
    )
    assert resumed.drawn == {step: straight.drawn[step] for step in range(7, 11)}


def test_by_default_a_save_is_in_the_background_where_it_is_large_and_there_are_memory_and_a_core_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_at_once(large_from: int, memory_left: int, cores: int) -> bool:
        monkeypatch.setattr("llm_trainer.training.checkpoint.store.ASYNC_MIN_BYTES", large_from)
        monkeypatch.setattr(
            "llm_trainer.training.checkpoint.store.available_host_memory", lambda: memory_left
        )
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        store = CheckpointStore(tmp_path / f"{large_from}-{memory_left}-{cores}", asynchronous="auto")
        place = store.save(snapshot(tmp_path), 1)
        written = place.exists()
        store.wait()
        return written

    go, busy = held_back(monkeypatch), torch.get_num_threads()
    threading.Timer(0.3, go.set).start()
    assert not is_at_once(large_from=1000, memory_left=10**9, cores=busy + 1)
    assert is_at_once(large_from=10**9, memory_left=10**9, cores=busy + 1)
    assert is_at_once(large_from=1000, memory_left=10_000, cores=busy + 1)
    assert is_at_once(large_from=1000, memory_left=10**9, cores=busy)


def test_the_state_that_is_written_is_not_the_one_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state: dict[str, JSON] = {"step": 2, "counts": {"a": 1}}
    go = held_back(monkeypatch)
    store = CheckpointStore(tmp_path / "run", asynchronous="on")
    place = store.save(snapshot(tmp_path, state=state), 2)
    state["counts"] = {"a": 2}
    go.set()
    store.wait()
    assert '"a": 1' in (place / "state.json").read_text(encoding="utf-8")
