"""What a checkpoint costs a run: time lost to a save of about 100 M parameters (weights and AdamW's state,
1.2 GB), in seconds and steps.

The real trainer runs on random tokens. Steps are grouped in stretches of equal length, whose kinds
alternate: no save, a synchronous save, an asynchronous save, and nanoGPT's method (`torch.save` of both
state dicts, neither synced to disk nor hashed), each at the end of the stretch's first step. The time lost
is a stretch's time minus that of the stretch without a save. So the time that an asynchronous save takes
from later steps counts too, and a stretch is long enough for the save to finish. The first asynchronous
save allocates the memory for its copies and is reported separately. A step is 8,192 tokens, which is little
for such a model.

If training uses all cores (the default here), an asynchronous save takes time from them: the smaller the
step, the more steps it costs. With `OMP_NUM_THREADS=1` on two cores it has a core of its own.

    python benchmarks/checkpointing.py [--rounds 2] [--stretch 2] [--sequences 32] [--folder DIR] [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from common import Figure, Target, finish, report_load
from rich.console import Console

from llm_trainer.config import ModelConfig, RunConfig
from llm_trainer.data.token_shards import TokenDataset
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.callbacks.callback import Callback
from llm_trainer.training.run import TrainingRun
from llm_trainer.training.trainer import Trainer

NONE, WAITED, BACKGROUND, PICKLED = (
    "no save",
    "waited for",
    "in the background",
    "torch.save, not synced, no hashes",
)
KINDS = (NONE, BACKGROUND, WAITED, PICKLED)
VOCABULARY = 16_384
CONTEXT = 256
WANTED = 1.0


def main() -> int:
    """Measure, print and write the results; return 1 if a target is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--stretch", type=int, default=2, help="steps of a stretch")
    parser.add_argument(
        "--sequences", type=int, default=32, help=f"of {CONTEXT} tokens per step; micro-batches of at most 8"
    )
    parser.add_argument(
        "--folder", type=Path, help="Folder for the checkpoints (default: a temporary folder)."
    )
    parser.add_argument("--quick", action="store_true", help="8 M parameters, one round")
    options = parser.parse_args()
    notes = [report_load()]
    shape = (256, 4) if options.quick else (768, 12)
    rounds = 1 if options.quick else options.rounds
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        stretches = Stretches(options.stretch, rounds, Path(folder) / "pickled.pt")
        parameters = train(shape, options.sequences, stretches, Path(folder))
    work = f"{parameters / 1e6:.0f} M parameters, a step of {options.sequences * CONTEXT:,} tokens"
    return _tell(work, stretches, notes)


class Stretches(Callback):
    """Saves at the end of each stretch's first step, according to its kind, and records step times."""

    def __init__(self, steps: int, rounds: int, pickled: Path) -> None:
        self.steps, self.pickled = steps, pickled
        self.kinds = [NONE, *(KINDS * rounds), NONE][
            : 1 + len(KINDS) * rounds
        ]  # the first one is the warm-up
        self.edges: list[float] = []
        self.returned: dict[int, float] = {}

    @property
    def total(self) -> int:
        """The total number of steps. The additional last one ends the last stretch."""
        return self.steps * len(self.kinds) + 1

    def on_step_end(self, run: TrainingRun, step: int) -> None:
        """Save if this step starts a stretch, and record the time."""
        number, place = divmod(step - 1, self.steps)
        if place == 0:
            run.report_saves()  # at most one save is in progress, in its own stretch
        self.edges.append(time.perf_counter())
        if place or number >= len(self.kinds):
            return
        begun = time.perf_counter()
        self._save(run, self.kinds[number])
        self.returned[number] = time.perf_counter() - begun

    def _save(self, trainer: Trainer, kind: str) -> None:
        if kind in (WAITED, BACKGROUND):
            trainer.run.store.asynchronous = "on" if kind == BACKGROUND else "off"
            trainer.run.save()
        elif kind == PICKLED:
            torch.save(
                {
                    "model": trainer.model.state_dict(),
                    "optimizer": [one.state_dict() for one in trainer.run.engine.optimizers],
                },
                self.pickled,
            )

    def seconds(self, kind: str) -> list[float]:
        """Return the time of each stretch of a kind, without the warm-up."""
        took = [self.edges[(n + 1) * self.steps] - self.edges[n * self.steps] for n in range(len(self.kinds))]
        return [seconds for n, seconds in enumerate(took) if n and self.kinds[n] == kind]

    def waits(self, kind: str) -> list[float]:
        """Return how long each save of a kind delayed the next step."""
        return [seconds for n, seconds in self.returned.items() if n and self.kinds[n] == kind]


def train(shape: tuple[int, int], sequences: int, stretches: Stretches, folder: Path) -> int:
    """Run the stretches; return the number of parameters of the model."""
    width, layers = shape
    model = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_layers=layers,
        num_heads=width // 64,
        max_position_embeddings=CONTEXT,
        dropout=0.0,
    )
    settings = {
        "max_steps": stretches.total,
        "batch_size": sequences,
        "output_dir": str(folder / "run"),
        "save_interval": None,
        "report_to": [],
    }
    settings |= {
        "precision": "fp32",
        "compile": "off",
        "device": "cpu",
        "save_total_limit": 1,
        "logging_steps": 1000,
    }
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 2_000_000).astype(np.uint16)
    tokens = TokenDataset(
        [ids], [np.array([0])], vocab_size=VOCABULARY, tokenizer_hash="0" * 64, fingerprint="made up"
    )
    network = Transformer(model)
    network.initialize(torch.Generator().manual_seed(0))
    trainer = Trainer(
        network,
        RunConfig(model=model, training=settings),
        tokens,
        callbacks=[stretches],
        console=Console(stderr=True),
    )
    trainer.train()
    return sum(parameter.numel() for parameter in network.parameters())


def _tell(work: str, stretches: Stretches, notes: list[str]) -> int:
    plain = statistics.median(stretches.seconds(NONE))
    step = plain / stretches.steps
    seconds_lost = {
        kind: [max(0.001, seconds - plain) for seconds in stretches.seconds(kind)] for kind in KINDS[1:]
    }
    figures = [
        Figure(f"time lost to a save, {work}", kind, "s", _rounded(seconds))
        for kind, seconds in seconds_lost.items()
    ]
    figures += [
        Figure(f"until the next step begins, {work}", kind, "s", _rounded(stretches.waits(kind)))
        for kind in KINDS[1:]
    ]
    first, *later = seconds_lost[BACKGROUND]
    notes.append(
        f"a step takes {step:.2f} s; a save in the background loses {first / step:.2f} steps the first time"
    )
    targets = [
        Target(
            "steps lost to a save in the background, the first",
            first / step,
            WANTED,
            "steps",
            is_ceiling=True,
        ),
        Target(
            "steps lost to a save in the background, later ones",
            statistics.median(later or [first]) / step,
            WANTED,
            "steps",
            is_ceiling=True,
        ),
    ]
    baselines = {figure.work: PICKLED for figure in figures}
    return finish("checkpointing", figures, baselines, " ".join(["python", *sys.argv]), targets, notes)


def _rounded(seconds: Sequence[float]) -> list[float]:
    return [round(one, 3) for one in seconds]


if __name__ == "__main__":
    sys.exit(main())
