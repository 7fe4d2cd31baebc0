"""A model that grows while it trains, compared with its final shape from scratch: seconds and FLOPs to the
same validation loss.

The final shape, 8 blocks of width 128 with context 64 and 12 sequences per step, is trained from scratch
for a number of steps; its final loss is the target. The grown run has two blocks for 60 % as many steps and
then all eight for 40 %: identity copies, each next to its source, which preserve what the model computes
(`stack_layers` with `mode: identity`). A run with two blocks throughout and the FLOPs of the grown run is
the control: it shows whether growing was necessary to reach the target.

All runs have the same order of data, optimizer and peak learning rate. The learning rate is constant and
then decays linearly to zero: over the last 70 % of a run with one shape, and from the growth on in a grown
run. Learning rate and decay were tuned for the from-scratch run; the grown run uses them unchanged.
docs/explanation/decisions.md has the experiments, with other shapes, and cases where growing is not
worthwhile. AdamW, the default optimizer, is judged; `--optimizers AdamW,Muon` adds the other.

The time to the target is read from the run's own metrics: the first validation at or below it, counted from
the first step. It includes the 20 validations of each run. FLOPs are computed with the formula of
`model/flops.py`, for the shape of each step. If a seed does not reach the target, the table says so and the
benchmark fails.

In addition, fine-tuning: from the built-in corpus to the words of Tiny Shakespeare, with all weights or
with LoRA of rank 8, each with a tuned learning rate: loss, seconds, and the peak memory that
`benchmarks/lora.py` measures at 30.6 M parameters.

    python benchmarks/growth.py [--seeds 1,2,3] [--steps 800] [--optimizers AdamW] [--text FILE] [--quick]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import Figure, Target, finish, report_load, run_command
from lora import JUDGED, measured

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT.parent / "shared" / "data" / "shakespeare.txt"
PROGRAM = Path(sys.executable).parent / "llm-trainer"
WANTED, WANTED_MEMORY = 0.7, 0.5
SMALL_LAYERS, LAYERS, WIDTH, CONTEXT, SEQUENCES = 2, 8, 128, 64, 12
# Fractions of the from-scratch run's steps: with two blocks, and with all; and the fraction of a run of one
# shape in which its learning rate decays.
SMALL_SHARE, WHOLE_SHARE, DECAY = 0.6, 0.4, 0.7
SHAPE = [f"--n_embd={WIDTH}", "--n_head=4", f"--block_size={CONTEXT}", "--dropout=0"]
RUN = [
    f"--batch_size={SEQUENCES}",
    "--compile=off",
    "--precision=bf16",
    "--save_interval=1000000",
    "--logging_steps=100",
]
RUN += ["--eval_iters=10", "--eval_batch_size=32"]
RATES = ["--lr_scheduler=wsd", "--min_lr=0", "--beta2=0.99"]
OPTIMIZERS = {
    "AdamW": ["--learning_rate=4e-3"],
    "Muon": ["--optimizer=muon", "--learning_rate=1e-2", "--muon_learning_rate=0.02", "--muon_momentum=0.9"],
}
SHAKESPEARE, BUILTIN = "Tiny Shakespeare", "built-in corpus"
SCRATCH, GROWN, SMALL = "from scratch", "grown", "two blocks throughout"
ALL_WEIGHTS, LORA = "all weights", "LoRA, rank 8"
VALIDATIONS = 20


@dataclass(frozen=True)
class Plan:
    """Numbers of steps with two blocks, then with all."""

    small: int
    whole: int

    @property
    def steps(self) -> int:
        return self.small + self.whole

    def flops(self, steps: int, ids: int) -> float:
        """Return the FLOPs of the first `steps` steps with a vocabulary of `ids`."""
        small = min(steps, self.small)
        return small * _flops_of_step(SMALL_LAYERS, ids) + (steps - small) * _flops_of_step(LAYERS, ids)


@dataclass
class Trained:
    """A run's validations: step, seconds since the first step began, and loss."""

    plan: Plan
    losses: list[tuple[int, float, float]]

    @property
    def end(self) -> float:
        """The final loss."""
        return self.losses[-1][2]

    def reached(self, bar: float) -> tuple[int, float] | None:
        """Return step and seconds of the first validation at or below the target."""
        return next(((step, seconds) for step, seconds, loss in self.losses if loss <= bar), None)


def main() -> int:
    """Train, compare, print and write the results; return 1 if a target is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument(
        "--steps", type=int, default=800, help="Steps of the from-scratch run (default: %(default)s)."
    )
    parser.add_argument(
        "--optimizers", default="AdamW", help="AdamW, Muon or AdamW,Muon (default: %(default)s)."
    )
    parser.add_argument(
        "--text", type=Path, default=TEXT, help="Tiny Shakespeare as one file (default: %(default)s)."
    )
    parser.add_argument("--quick", action="store_true", help="Run one seed with 60 steps, as a smoke test.")
    options = parser.parse_args()
    if unknown := set(options.optimizers.split(",")) - set(OPTIMIZERS):
        parser.error(
            f"invalid value for --optimizers: {', '.join(sorted(unknown))}; "
            f"choose from {', '.join(OPTIMIZERS)}"
        )
    if not options.text.exists():
        parser.error(f"there is no {options.text}; name the text with --text FILE")
    seeds, steps = (["1"], 60) if options.quick else (options.seeds.split(","), options.steps)
    figures, targets, notes = [], [], [report_load()]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = prepared(folder, options.text)
        for corpus, optimizer in (
            (corpus, optimizer) for optimizer in options.optimizers.split(",") for corpus in data
        ):
            compared = Comparison(corpus, optimizer, data[corpus], seeds, steps)
            compared.run(folder)
            figures += compared.figures()
            targets += compared.targets()
            notes += compared.notes()
        tuned = fine_tuning(folder, options.text, seeds, steps // 5)
        figures += tuned[0]
        targets += tuned[1]
    baselines = {
        figure.work: ALL_WEIGHTS if figure.work.startswith("fine-tuning") else SCRATCH for figure in figures
    }
    return finish("growth", figures, baselines, " ".join(["python", *sys.argv]), targets, notes)


def prepared(folder: Path, text: Path) -> dict[str, Path]:
    """Return the data folder of each corpus."""
    characters = folder / "data-shakespeare"
    run_command(
        [
            sys.executable,
            ROOT / "data/shakespeare_char/prepare.py",
            "--input",
            text,
            "--output_dir",
            characters,
        ]
    )
    builtin = folder / "data-builtin"
    run_command([PROGRAM, "prepare", "--input", "builtin", "--output_dir", builtin, "--vocab_size", "1024"])
    return {SHAKESPEARE: characters, BUILTIN: builtin}


class Comparison:
    """The three runs on one corpus with one optimizer, for all seeds."""

    def __init__(self, corpus: str, optimizer: str, data: Path, seeds: Sequence[str], steps: int) -> None:
        self.title, self.optimizer = f"{corpus}, {optimizer}", optimizer
        self.data, self.seeds, self.ids = data, seeds, _vocabulary(data)
        grown = Plan(round(SMALL_SHARE * steps), round(WHOLE_SHARE * steps))
        as_much = round(grown.flops(grown.steps, self.ids) / _flops_of_step(SMALL_LAYERS, self.ids))
        self.plans = {SCRATCH: Plan(0, steps), GROWN: grown, SMALL: Plan(as_much, 0)}
        self.trained: dict[str, list[Trained]] = {name: [] for name in self.plans}

    def run(self, folder: Path) -> None:
        """Train the runs of each seed in turn."""
        for seed in self.seeds:
            for number, (name, plan) in enumerate(self.plans.items()):
                run = folder / f"{self.optimizer}-{self.data.name}-{number}-{seed}"
                self.trained[name].append(train(run, self.data, seed, plan, OPTIMIZERS[self.optimizer]))
                print(
                    f"{self.title}, seed {seed}, {name}: loss {self.trained[name][-1].end:.4f}",
                    file=sys.stderr,
                    flush=True,
                )

    def _arrivals(self, name: str) -> list[tuple[float, float]]:
        """Return seconds and TFLOPs to the target, for the seeds that reached it."""
        pairs = zip(self.trained[name], self.trained[SCRATCH], strict=True)
        found = [(run, run.reached(scratch.end)) for run, scratch in pairs]
        return [(at[1], run.plan.flops(at[0], self.ids) / 1e12) for run, at in found if at is not None]

    def figures(self) -> list[Figure]:
        """Return seconds and FLOPs to the target where it was reached, and final losses."""
        made = []
        for number, (work, unit) in enumerate((("seconds to the loss", "s"), ("TFLOPs to it", "TFLOPs"))):
            for name in self.plans:
                if arrivals := self._arrivals(name):
                    made.append(
                        Figure(
                            f"{work}: {self.title}",
                            name,
                            unit,
                            [one[number] for one in arrivals],
                            self._said(name),
                        )
                    )
        return [
            *made,
            *(
                Figure(f"last loss: {self.title}", name, "nats", [one.end for one in self.trained[name]])
                for name in self.plans
            ),
        ]

    def _said(self, name: str) -> str:
        arrived = len(self._arrivals(name))
        return "" if arrived == len(self.seeds) else f"{arrived} of {len(self.seeds)} seeds came to it"

    def targets(self) -> list[Target]:
        """Return the seconds of the grown run; if a seed did not reach the target, the missing loss."""
        if self.optimizer != "AdamW":
            return []
        seconds = {name: [one[0] for one in self._arrivals(name)] for name in (SCRATCH, GROWN)}
        if len(seconds[GROWN]) < len(self.seeds):
            gap = statistics.mean(one.end for one in self.trained[GROWN]) - statistics.mean(
                one.end for one in self.trained[SCRATCH]
            )
            return [
                Target(
                    f"{self.title}: grown last loss − from-scratch's, nats",
                    max(gap, 0.0),
                    0.0,
                    "",
                    is_ceiling=True,
                )
            ]
        ratio = statistics.mean(seconds[GROWN]) / statistics.mean(seconds[SCRATCH])
        return [Target(f"{self.title}: seconds grown ÷ from scratch, means", ratio, WANTED, is_ceiling=True)]

    def notes(self) -> list[str]:
        """Describe the steps of each run, and how many seeds reached the target."""
        ways = [
            f"{name}: {plan.small} steps with {SMALL_LAYERS} blocks + {plan.whole} with {LAYERS}, "
            f"{len(self._arrivals(name))} of {len(self.seeds)} seeds at the from-scratch loss"
            for name, plan in self.plans.items()
        ]
        return [f"{self.title}: {'; '.join(ways)}"]


def train(run: Path, data: Path, seed: str, plan: Plan, optimizer: Sequence[str]) -> Trained:
    """Train one run by a plan, with a schedule file for its growth."""
    steps, layers = plan.steps, SMALL_LAYERS if plan.small else LAYERS
    decay = plan.whole / steps if plan.small and plan.whole else DECAY
    command = [
        PROGRAM,
        "train",
        "--data_dir",
        data,
        "--output_dir",
        run,
        f"--seed={seed}",
        f"--max_steps={steps}",
        f"--n_layer={layers}",
    ]
    command += [
        *SHAPE,
        *RUN,
        *RATES,
        *optimizer,
        f"--wsd_decay_fraction={decay}",
        f"--warmup_steps={min(100, steps // 10)}",
    ]
    command.append(f"--eval_interval={max(1, steps // VALIDATIONS)}")
    if plan.small and plan.whole:
        schedule = run.with_suffix(".json")
        sources = [block * SMALL_LAYERS // LAYERS for block in range(LAYERS)]
        growth = {"name": "stack_layers", "value": sources, "mode": "identity", "max_wait_iters": plan.small}
        schedule.write_text(json.dumps([growth]), encoding="utf-8")
        command.append(f"--scaling_schedule_file={schedule}")
    run_command(command)
    started = (run / "run.json").stat().st_mtime  # written just before the first step
    return Trained(
        plan, [(int(line["step"]), line["time"] - started, line["val_loss"]) for line in _validations(run)]
    )


def _validations(run: Path) -> list[Mapping[str, float]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "val_loss" in line]


def _vocabulary(data: Path) -> int:
    """Return the vocabulary size of a prepared dataset."""
    from llm_trainer.data.prepared_dataset import open_prepared_dataset

    return open_prepared_dataset(data).train.vocab_size


def _flops_of_step(layers: int, ids: int) -> float:
    from llm_trainer.config import ModelConfig
    from llm_trainer.model.flops import estimate_flops

    shape = ModelConfig(
        vocab_size=ids,
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
    )
    return estimate_flops(shape, CONTEXT) * SEQUENCES * CONTEXT


def fine_tuning(
    folder: Path, text: Path, seeds: Sequence[str], steps: int
) -> tuple[list[Figure], list[Target]]:
    """Compare full fine-tuning with LoRA of rank 8.

    A model of the built-in corpus is fine-tuned to Tiny Shakespeare in its tokens.
    """
    base, data = folder / "base", folder / "data-tokens"
    train(base, folder / "data-builtin", seeds[0], Plan(0, 5 * steps), OPTIMIZERS["AdamW"])
    run_command(
        [
            PROGRAM,
            "prepare",
            "--input",
            text,
            "--output_dir",
            data,
            "--tokenizer_path",
            folder / "data-builtin",
        ]
    )
    adapters = ["--attn_lora_rank=8", "--mlp_lora_rank=8", "--lora_train_base=false"]
    ways = {ALL_WEIGHTS: ["--learning_rate=4e-3"], LORA: ["--learning_rate=1e-2", *adapters]}
    losses: dict[str, list[float]] = {name: [] for name in ways}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for seed in seeds:
        for number, (name, flags) in enumerate(ways.items()):
            run = folder / f"tuned-{number}-{seed}"
            command = [
                PROGRAM,
                "train",
                "--init_from",
                base,
                "--data_dir",
                data,
                "--output_dir",
                run,
                f"--seed={seed}",
                *flags,
                *RUN,
            ]
            command += [f"--max_steps={steps}", f"--eval_interval={steps}"]
            seconds[name].append(run_command(command).seconds)
            losses[name].append(_validations(run)[-1]["val_loss"])
    figures = [Figure("fine-tuning: last loss", name, "nats", rounds) for name, rounds in losses.items()]
    figures += [Figure("fine-tuning: whole process", name, "s", rounds) for name, rounds in seconds.items()]
    peaks = {name: measured(rank, JUDGED)["memory"] for name, rank in ((ALL_WEIGHTS, 0), (LORA, 8))}
    work = f"fine-tuning: peak of a step, 30.6 M, {JUDGED} tokens"
    figures += [Figure(work, name, "MB", [round(peak)]) for name, peak in peaks.items()]
    ratio = peaks[LORA] / peaks[ALL_WEIGHTS]
    return figures, [
        Target(
            f"LoRA's peak memory ÷ all weights', 30.6 M, {JUDGED} tokens",
            ratio,
            WANTED_MEMORY,
            is_ceiling=True,
        )
    ]


if __name__ == "__main__":
    sys.exit(main())
