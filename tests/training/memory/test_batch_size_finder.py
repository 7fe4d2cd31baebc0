"""A run that runs out of memory retries the step with smaller micro-batches, and `auto` finds the size that
fits.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paths import SUPPORT
from rich.console import Console
from safetensors.torch import load_file
from tiny_run import tiny_config, tiny_model, tiny_trainer, tokens

from llm_trainer.config import RunConfig, UsageError
from llm_trainer.config.resolve.batch_size import BatchPlan, MicroBatchBounds, divisions
from llm_trainer.data.sampling.batch import Batch
from llm_trainer.diagnostics.verify_resume import StopAtStep
from llm_trainer.model.transformer import Transformer
from llm_trainer.run_dir import list_checkpoints
from llm_trainer.training.callbacks.callback import Callback
from llm_trainer.training.engines.out_of_memory import OutOfMemory, is_out_of_memory
from llm_trainer.training.logging.metrics import read_metrics
from llm_trainer.training.objectives.objective import LossSum, NextToken
from llm_trainer.training.trainer import Trainer

AT_ONCE = {"batch_size": 8, "gradient_accumulation_steps": None}
AUTO = {"micro_batch_size": "auto", "batch_size": 8, "gradient_accumulation_steps": None}


class ShortOfMemory(NextToken):
    """From a step on there is memory for a number of sequences only. It runs out in the forward pass, or in
    the backward pass.
    """

    def __init__(
        self, trainer: Trainer, sequences: int, from_step: int = 0, *, backward: bool = False
    ) -> None:
        super().__init__()
        self.trainer, self.sequences, self.from_step, self.backward = trainer, sequences, from_step, backward

    def __call__(self, model: Transformer, batch: Batch) -> LossSum:
        loss = super().__call__(model, batch)
        if (
            len(batch) <= self.sequences
            or self.trainer.run.state.step < self.from_step
            or not torch.is_grad_enabled()
        ):
            return loss
        if not self.backward:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        def refuse(_: torch.Tensor) -> None:
            hook.remove()
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried "
                "to allocate 8 B"
            )

        hook = next(model.blocks[0].parameters()).register_hook(refuse)
        return loss


def short(
    folder: Path, sequences: int, from_step: int = 0, *callbacks: Callback, **settings: object
) -> tuple[Trainer, list[str]]:
    trainer = tiny_trainer(folder, callbacks=callbacks, **AT_ONCE | settings)  # type: ignore[arg-type]
    trainer.run.engine.objective = ShortOfMemory(trainer, sequences, from_step)
    lines: list[str] = []
    trainer.run.log = lines.append  # type: ignore[method-assign]
    return trainer, lines


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final_model" / "model.safetensors")


def are_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_that_has_too_little_memory_ends_as_one_with_smaller_micro_batches(tmp_path: Path) -> None:
    trainer, lines = short(tmp_path / "short", 2)
    trainer.train()
    tiny_trainer(
        tmp_path / "small", batch_size=8, micro_batch_size=2, gradient_accumulation_steps=None
    ).train()
    assert are_equal(weights(tmp_path / "short"), weights(tmp_path / "small"))
    assert trainer.run.batches == BatchPlan(2, 4)
    assert any("retrying with micro_batch_size 4 × 2" in line for line in lines)
    assert any("retrying with micro_batch_size 2 × 4" in line for line in lines)
    assert [
        line["micro_batch_size"] for line in read_metrics(tmp_path / "short") if "micro_batch_size" in line
    ] == [4, 2]


def test_out_of_memory_midway_saves_and_continues_as_a_run_resumed_there_with_smaller_micro_batches(
    tmp_path: Path,
) -> None:
    trainer, _ = short(tmp_path / "short", 4, from_step=5)
    trainer.train()
    (emergency,) = [
        one for one in list_checkpoints(tmp_path / "short") if one.path.name.startswith("emergency")
    ]
    assert emergency.step == 5
    again = {
        "batch_size": 8,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": None,
        "resume_from": str(emergency.path),
    }
    tiny_trainer(tmp_path / "again", **again).train()
    assert are_equal(weights(tmp_path / "short"), weights(tmp_path / "again"))


def test_running_out_of_memory_in_the_backward_pass_is_handled_alike(tmp_path: Path) -> None:
    for name, backward in (("forward", False), ("backward", True)):
        trainer, lines = short(tmp_path / name, 4)
        trainer.run.engine.objective = ShortOfMemory(trainer, 4, from_step=3, backward=backward)
        trainer.train()
        assert sum("retrying with" in line for line in lines) == 1
    assert are_equal(weights(tmp_path / "forward"), weights(tmp_path / "backward"))


def test_without_memory_for_a_single_sequence_the_error_says_what_would_help(tmp_path: Path) -> None:
    trainer, _ = short(tmp_path, 0)
    with pytest.raises(
        OutOfMemory,
        match="with 1 sequences at once, and there is no smaller micro-batch; use gradient_checkpointing",
    ):
        trainer.train()


def test_a_resumed_run_keeps_the_smaller_micro_batch(tmp_path: Path) -> None:
    trainer, _ = short(tmp_path, 2, 0, StopAtStep(6))
    trainer.train()
    resumed = tiny_trainer(tmp_path, resume_from="auto", **AT_ONCE)
    resumed.train()
    assert resumed.run.batches == BatchPlan(2, 4)


class EndsTheRun(NextToken):
    """From a step on, memory runs out at a point where ranks cannot agree to try again."""

    def __init__(self, trainer: Trainer, from_step: int) -> None:
        super().__init__()
        self.trainer, self.from_step = trainer, from_step

    def __call__(self, model: Transformer, batch: Batch) -> LossSum:
        if self.trainer.run.state.step >= self.from_step and torch.is_grad_enabled():
            raise OutOfMemory("out of memory", is_agreed=False)
        return super().__call__(model, batch)


def ended_by_memory(folder: Path, from_step: int = 4) -> Path:
    """A run of micro-batches of 8 that has left its note for the next attempt."""
    trainer, _ = short(folder, 8)
    trainer.run.engine.objective = EndsTheRun(trainer, from_step)
    with pytest.raises(OutOfMemory, match="continue with --resume auto, which will use micro_batch_size 4"):
        trainer.train()
    return folder


@pytest.mark.parametrize("from_step", [0, 4], ids=["before a checkpoint", "after one"])
def test_the_next_attempt_uses_the_noted_size_logs_it_and_keeps_it_in_its_checkpoints_only(
    tmp_path: Path, from_step: int
) -> None:
    ended_by_memory(tmp_path, from_step)
    resumed, lines = short(tmp_path, 8, 0, StopAtStep(6), resume_from="auto")
    resumed.train()
    assert resumed.run.batches == BatchPlan(4, 2)
    assert any("micro_batch_size 4" in line and "ran out of memory" in line for line in lines), lines
    assert not (tmp_path / "memory.json").exists()
    again, lines = short(tmp_path, 8, 0, StopAtStep(8), resume_from="auto")
    again.train()
    assert again.run.batches == BatchPlan(4, 2)
    assert not any("ran out of memory" in line for line in lines)


def test_changed_batch_settings_override_the_note(tmp_path: Path) -> None:
    ended_by_memory(tmp_path)
    resumed, lines = short(tmp_path, 16, resume_from="auto", micro_batch_size=8)
    resumed.train()
    assert resumed.run.batches == BatchPlan(8, 1)
    assert any(
        "ignoring micro_batch_size 4" in line and "batch settings have changed" in line for line in lines
    ), lines
    assert not (tmp_path / "memory.json").exists()


def test_a_run_that_does_not_continue_the_attempt_ignores_the_note(tmp_path: Path) -> None:
    ended_by_memory(tmp_path / "a")
    ended_by_memory(tmp_path / "b")
    new, _ = short(tmp_path / "a", 8)
    new.train()
    other, _ = short(tmp_path / "b", 8, resume_from=str(tmp_path / "a" / "checkpoint-6"))
    other.train()
    assert new.run.batches == other.run.batches == BatchPlan(8, 1)
    assert not list(tmp_path.glob("?/memory.json"))


def test_other_errors_are_not_taken_for_a_lack_of_memory(tmp_path: Path) -> None:
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert is_out_of_memory(MemoryError())
    trainer, _ = short(tmp_path, 2)
    trainer.run.engine.objective = lambda model, batch: 1 / 0  # type: ignore[assignment,return-value]
    with pytest.raises(ZeroDivisionError):
        trainer.train()


def chosen(folder: Path, gigabytes: float, **settings: object) -> BatchPlan:
    trainer = tiny_trainer(folder, max_steps=1, warmup_steps=0, memory_limit_gb=gigabytes, **AUTO | settings)  # type: ignore[arg-type]
    trainer.train()
    assert trainer.run.sequences_per_step == 8
    return trainer.run.batches


@pytest.mark.slow
def test_auto_uses_the_full_batch_with_enough_memory_and_is_an_error_without(tmp_path: Path) -> None:
    assert chosen(tmp_path / "much", 1000.0) == BatchPlan(8, 1)
    with pytest.raises(
        OutOfMemory, match=r"not even micro_batch_size 1 fits into 0\.00 GB, 90% of the memory"
    ):
        chosen(tmp_path / "none", 0.001)


@pytest.mark.slow
def test_auto_uses_the_largest_micro_batch_that_fits(tmp_path: Path) -> None:
    """A wide vocabulary makes a step's memory a matter of its logits: 8 × 256 × 20000 of 4 bytes are 160 MB,
    kept twice.
    """
    shape = {"vocab_size": 20_000, "max_position_embeddings": 256}
    config = tiny_config(tmp_path, shape, loss="dense", max_steps=1, warmup_steps=0, **AUTO)
    found = {}
    for spare in (0.03, 0.12, 0.5, 2.0):
        trainer = Trainer(tiny_model(config.model), config, tokens(4000), console=Console(quiet=True))
        held = trainer.run.monitor.machine.memory_in_use()
        trainer.run.monitor.machine.memory_budget = lambda ranks, held=held, spare=spare: (
            held + int(spare * 1e9)
        )  # type: ignore[method-assign]
        try:
            found[spare] = trainer.run.largest_micro_batch(fraction=1.0).micro_batch_size
        except OutOfMemory:
            found[spare] = 0
    assert found[0.03] == 0
    assert found[0.03] < found[0.12] < found[0.5] <= found[2.0] == 8


def test_a_bound_gives_a_smaller_micro_batch_and_the_search_changes_nothing(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, **AT_ONCE)
    assert trainer.run.largest_micro_batch(most=3) == BatchPlan(2, 4)
    assert trainer.run.batches == BatchPlan(8, 1)


def test_the_adaptive_batch_size_keeps_its_bounds(tmp_path: Path) -> None:
    plain = tiny_config(tmp_path, max_steps=1, warmup_steps=0, memory_limit_gb=1000)
    bounds = {"use_adaptive_batch_size": True, "min_batch_size": 2, "max_batch_size": 5}
    sections = {
        "model": plain.model.model_dump(),
        "training": plain.training.model_dump() | {"use_computational_efficiency": True},
    }
    config = RunConfig(**sections, computational_efficiency=bounds)
    trainer = Trainer(tiny_model(config.model), config, tokens(), console=Console(quiet=True))
    trainer.train()
    assert trainer.run.batches == BatchPlan(4, 2)
    with pytest.raises(
        UsageError,
        match="no micro-batch size from min_batch_size 5 to max_batch_size 7 divides the 8 sequences",
    ):
        divisions(BatchPlan(4, 2), MicroBatchBounds(5, 7))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
def test_a_process_that_really_runs_out_of_memory_continues_with_smaller_micro_batches(
    tmp_path: Path,
) -> None:
    script = f"""
import resource, sys, psutil
sys.path.insert(0, {str(SUPPORT)!r})
from pathlib import Path
from tiny_run import tiny_config, tiny_model, tokens
from llm_trainer.training.trainer import Trainer
shape = {{"vocab_size": 20_000, "max_position_embeddings": 256}}
batches = {{"batch_size": 64, "gradient_accumulation_steps": None}}
config = tiny_config(Path({str(tmp_path)!r}), shape, loss="dense", max_steps=2, **batches)
trainer = Trainer(tiny_model(config.model), config, tokens(64 * 256 + 1))
limit = psutil.Process().memory_info().vms + 1_500_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
trainer.train()
print(trainer.run.batches.micro_batch_size, trainer.run.state.step)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    size, step = map(int, done.stdout.split()[-2:])
    assert 1 <= size < 64
    assert step == 2
    assert (
        json.loads((tmp_path / "final_model" / "state.json").read_text(encoding="utf-8"))["overrides"][
            "micro_batch_size"
        ]
        == size
    )
