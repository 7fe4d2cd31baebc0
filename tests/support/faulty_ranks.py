"""Under torchrun: small runs in which one rank goes wrong in a given way; each rank leaves what came of it in
`outcome-<rank>.json`.

Run as `torchrun … faulty_ranks.py FOLDER`: trains every run of `FOLDER/runs.json` there, one after another,
in one process a rank.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rank_process import train_each
from rich.console import Console
from tiny_run import tiny_config, tiny_model, tokens

from llm_trainer import run_dir as run_folder
from llm_trainer.config import LLMTrainerError
from llm_trainer.config.resolve.parallelism import resolve_plan
from llm_trainer.data.sampling.batch import Batch
from llm_trainer.distributed.process_group import ProcessGroup
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.callbacks.callback import Callback
from llm_trainer.training.engines.validation import ValidationResult
from llm_trainer.training.objectives.objective import LossSum, NextToken
from llm_trainer.training.run import TrainingRun
from llm_trainer.training.trainer import Trainer

_DYING = threading.Lock()
SMALL_DISK, LEFT_FREE = 64 << 20, 64 << 10  # a checkpoint is larger than what is left


class Factor(NextToken):
    """Losses of training steps at the `steps` (counted by samples, so that a rollback does not bring them
    back) times a number.
    """

    def __init__(self, trainer: Trainer, factor: float, steps: list[int]) -> None:
        super().__init__()
        self.trainer, self.factor, self.steps = trainer, factor, steps

    def from_hidden_states(self, model: Transformer, hidden: torch.Tensor, labels: torch.Tensor) -> LossSum:
        loss = super().from_hidden_states(model, hidden, labels)
        step = self.trainer.run.state.samples // self.trainer.run.sequences_per_step + 1
        return (
            LossSum(loss.total * self.factor, loss.tokens)
            if torch.is_grad_enabled() and step in self.steps
            else loss
        )


class At(Callback):
    """Does something at a step, in the place named: `step`, `validation`, `before backward`, `all-reduce`,
    `save` or `file of a save`.
    """

    def __init__(self, trainer: Trainer, place: str, step: int, do: Callable[[], None]) -> None:
        self.trainer, self.place, self.step, self.do = trainer, place, step, do
        if place == "before backward":
            self._before(trainer.run.engine.objective)
        if place == "save":
            trainer.run.store.save = self._first(trainer.run.store.save)  # type: ignore[method-assign]
        if place == "file of a save":  # which may be written while the run is further on
            os.fsync = self._in_checkpoint(os.fsync)
        if place == "all-reduce":
            dist.all_reduce = self._after_beginning(dist.all_reduce)

    def _is_now(self, updates_done: int) -> bool:
        return self.trainer.current_step == updates_done

    def _before(self, objective: Callable[[Transformer, Batch], LossSum]) -> None:
        def call(model: Transformer, batch: Batch) -> LossSum:
            if torch.is_grad_enabled() and self._is_now(self.step - 1):
                self.do()
            return objective(model, batch)

        self.trainer.run.engine.objective = call  # type: ignore[assignment]

    def _first(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if self._is_now(self.step):
                self.do()
            return original(*arguments, **named)

        return call

    def _in_checkpoint(self, original: Callable[[int], None]) -> Callable[[int], None]:
        def call(descriptor: int) -> None:
            if f"checkpoint-{self.step}" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
                self.do()
            original(descriptor)

        return call

    def _after_beginning(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: torch.Tensor, **named: Any) -> Any:
            if self._is_now(self.step - 1):
                original(tensor, **named | {"async_op": True})
                self.do()
            return original(tensor, **named)

        return call

    def on_step_end(self, run: TrainingRun, step: int) -> None:
        if self.place == "step" and step == self.step:
            self.do()

    def on_validation(self, run: TrainingRun, result: ValidationResult) -> None:
        if self.place == "validation" and run.current_step == self.step:
            self.do()


def die() -> None:
    """As if the machine had gone; the test reads that it happened, once, though several threads may come
    here.
    """
    _DYING.acquire()
    print(f"rank {os.environ['RANK']} dies now", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def filler(folder: Path) -> Callable[[], None]:
    """Where the run folder is a small disk of its own, what fills it up; elsewhere the system's refusal."""

    def fill() -> None:
        free = shutil.disk_usage(folder).free
        if free > SMALL_DISK:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        (folder / "ballast").write_bytes(bytes(max(0, free - LEFT_FREE)))

    return fill


def plant(run: dict[str, Any], trainer: Trainer, process_group: ProcessGroup) -> None:
    """Put the run's fault in its place."""
    if "factor" in run and process_group.rank in run["factor"]["ranks"]:
        trainer.run.engine.objective = Factor(trainer, float(run["factor"]["by"]), run["factor"]["steps"])
    if "signal" in run and process_group.rank == run["signal"]["rank"]:
        trainer.callbacks.append(
            At(
                trainer,
                run["signal"]["place"],
                run["signal"]["step"],
                lambda: signal.raise_signal(signal.SIGUSR1),
            ),
        )
    if "full_disk" in run and process_group.rank == run["full_disk"]["rank"]:
        trainer.callbacks.append(
            At(trainer, run["full_disk"]["place"], run["full_disk"]["step"], filler(trainer.run.run_dir))
        )
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if attempt < len(run.get("deaths", [])) and process_group.rank == run["deaths"][attempt]["rank"]:
        death = run["deaths"][attempt]
        trainer.callbacks.append(At(trainer, death["place"], death["step"], die))


def garble(path: Path) -> None:
    """Other contents of the same size."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def noted(read: list[str]) -> Callable[[Path], str]:
    """What hashes a file of a checkpoint, and notes that it was read; not those that are just being saved."""
    hashed = run_folder._sha256

    def call(path: Path) -> str:
        if not any(part.startswith(".tmp-") for part in path.parts):
            read.append(path.as_posix())
        return hashed(path)

    return call


def train(folder: Path, run: dict[str, Any], process_group: ProcessGroup) -> None:
    """One of the runs."""
    config = tiny_config(folder / run["name"], {"dropout": 0.0}, **run["settings"])
    process_group = replace(process_group, plan=resolve_plan(config.training, process_group.world_size))
    heard = io.StringIO()
    console = Console(file=heard, width=1000)
    outcome: dict[str, object] = {}
    read: list[str] = []
    if "garble" in run and process_group.is_main:
        garble(Path(run["garble"]))
    process_group.barrier()
    unharmed, hashed = (os.fsync, dist.all_reduce), run_folder._sha256
    run_folder._sha256 = noted(read)
    try:
        trainer = Trainer(
            tiny_model(config.model),
            config,
            tokens(),
            tokens(65, seed=1),
            console=console,
            process_group=process_group,
        )
        plant(run, trainer, process_group)
        result = trainer.train()
        outcome |= {"ended_by": result.ended_by, "step": result.step, "status": result.exit_code}
    except LLMTrainerError as error:
        outcome |= {"error": type(error).__name__, "message": str(error)}
    finally:
        os.fsync, dist.all_reduce = unharmed
        run_folder._sha256 = hashed
    outcome["read"] = read
    outcome["said"] = heard.getvalue().splitlines()
    (folder / f"{run.get('outcome', run['name'])}-outcome-{process_group.rank}.json").write_text(
        json.dumps(outcome), encoding="utf-8"
    )


if __name__ == "__main__":
    train_each(train)
