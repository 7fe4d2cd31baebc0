"""A model grown while it trains against its final shape from scratch: seconds and FLOPs to the same validation loss.

The final shape is trained for so many steps; the loss that it ends at is the bar. The grown run begins with half of the blocks and ends
with the same shape after fewer, cheaper steps. Both decay their rate to their own end. Time to the bar is read from the run's own record:
the first validation at or below it, counted from the first step; validations, which both make as often a share of their length, are in it.
FLOPs are counted by the formula of `model/flops.py`, by the shape of each step. Where the bar is not reached the table says how far
the run came instead, and the target is missed.

Fine-tuning beside: the built-in corpus, then Tiny Shakespeare's words with all weights or with LoRA of rank 8: loss, seconds, and the
measured peak of a step at a 30 M shape.

    python benchmarks/growth.py [--seeds 1,2,3] [--steps 1500] [--text FILE] [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from common import Figure, Target, finish, run_command, say_load

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT.parent / "shared" / "data" / "shakespeare.txt"
PROGRAM = Path(sys.executable).parent / "llm-trainer"
WANTED, WANTED_MEMORY = 0.7, 0.5
LAYERS, WIDTH, CONTEXT = 4, 128, 64
# Of the from-scratch run's steps: how many with half of the blocks, how many with all.
SMALL_SHARE, WHOLE_SHARE = 0.35, 0.40
SHAPE = [f"--n_embd={WIDTH}", "--n_head=4", f"--block_size={CONTEXT}", "--dropout=0"]
RUN = ["--batch_size=12", "--learning_rate=1e-3", "--beta2=0.99", "--min_lr=1e-4", "--compile=off", "--precision=fp32"]
RUN += ["--save_interval=1000000", "--logging_steps=100", "--eval_iters=40"]
SCRATCH, GROWN = "from scratch", "grown"


@dataclass
class Trained:
    """A run's record: steps with their validation losses, seconds from the first report, parameters by step."""

    losses: list[tuple[int, float, float]]  # step, seconds, loss
    small_until: int

    @property
    def end(self) -> float:
        """The last loss."""
        return self.losses[-1][2]

    def reached(self, bar: float) -> tuple[int, float] | None:
        """Step and seconds of the first validation at or below the bar."""
        return next(((step, seconds) for step, seconds, loss in self.losses if loss <= bar), None)


def main() -> int:
    """Train, compare, print, write; 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--steps", type=int, default=1500, help="of the from-scratch run (default: %(default)s)")
    parser.add_argument("--text", type=Path, default=TEXT, help="Tiny Shakespeare as one file (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one seed, 60 steps: whether it works")
    options = parser.parse_args()
    if not options.text.exists():
        parser.error(f"there is no {options.text}; name the text with --text FILE")
    seeds, steps = (["1"], 60) if options.quick else (options.seeds.split(","), options.steps)
    figures, targets, notes = [], [], [say_load()]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for corpus, data in prepared(folder, options.text).items():
            of_corpus = compare(folder / corpus, corpus, data, seeds, steps)
            figures += of_corpus[0]
            targets += of_corpus[1]
            notes += of_corpus[2]
        tuned = fine_tuning(folder, options.text, seeds, steps // 5)
        figures += tuned[0]
        targets += tuned[1]
        notes += tuned[2]
    baselines = {figure.work: SCRATCH if figure.work.partition(":")[0] != "fine-tuning" else "all weights" for figure in figures}
    return finish("growth", figures, baselines, " ".join(["python", *sys.argv]), targets, notes)


def prepared(folder: Path, text: Path) -> dict[str, Path]:
    """Corpus → data folder."""
    characters = folder / "data-shakespeare"
    run_command([sys.executable, ROOT / "data/shakespeare_char/prepare.py", "--input", text, "--output_dir", characters])
    builtin = folder / "data-builtin"
    run_command([PROGRAM, "prepare", "--input", "builtin", "--output_dir", builtin, "--vocab_size", "1024"])
    return {"Tiny Shakespeare": characters, "built-in corpus": builtin}


def compare(folder: Path, corpus: str, data: Path, seeds: list[str], steps: int) -> tuple[list[Figure], list[Target], list[str]]:
    """Both ways for each seed."""
    folder.mkdir()
    small, total = round(SMALL_SHARE * steps), round((SMALL_SHARE + WHOLE_SHARE) * steps)
    seconds: dict[str, list[float]] = {SCRATCH: [], GROWN: []}
    flops: dict[str, list[float]] = {SCRATCH: [], GROWN: []}
    ends: dict[str, list[float]] = {SCRATCH: [], GROWN: []}
    for seed in seeds:
        scratch = train(folder / f"scratch-{seed}", data, seed, steps, LAYERS)
        grown = train(folder / f"grown-{seed}", data, seed, total, LAYERS // 2, small)
        for name, run in ((SCRATCH, scratch), (GROWN, grown)):
            ends[name].append(run.end)
            step, took = run.reached(scratch.end) or (run.losses[-1][0], float("nan"))
            if took == took:
                seconds[name].append(took)
                flops[name].append(arithmetic(step, run.small_until, vocabulary(data)) / 1e12)
    works = (
        (f"seconds to the loss: {corpus}", "s", seconds),
        (f"TFLOPs to it: {corpus}", "TFLOPs", flops),
        (f"last loss: {corpus}", "nats", ends),
    )
    figures = [Figure(work, name, unit, rounds) for work, unit, by_name in works for name, rounds in by_name.items() if rounds]
    arrived = len(seconds[GROWN])
    notes = [f"{corpus}: the grown run came to the from-scratch loss in {arrived} of {len(seeds)} seeds"]
    if arrived < len(seeds):
        return figures, [Target(f"{corpus}: grown last loss − from-scratch's", max(0.0, _gap(ends)), 0.0, is_ceiling=True)], notes
    ratio = statistics.mean(seconds[GROWN]) / statistics.mean(seconds[SCRATCH])
    return figures, [Target(f"{corpus}: seconds grown ÷ from scratch, means", ratio, WANTED, is_ceiling=True)], notes


def _gap(ends: dict[str, list[float]]) -> float:
    return statistics.mean(ends[GROWN]) - statistics.mean(ends[SCRATCH])


def train(run: Path, data: Path, seed: str, steps: int, layers: int, grows_at: int = 0) -> Trained:
    """One run; with `grows_at` its blocks are doubled there."""
    command = [PROGRAM, "train", "--data_dir", data, "--output_dir", run, f"--seed={seed}", f"--max_steps={steps}", f"--n_layer={layers}"]
    command += [*SHAPE, *RUN, f"--warmup_steps={min(100, steps // 10)}", f"--eval_interval={max(1, steps // 30)}"]
    if grows_at:
        schedule = run.with_suffix(".json")
        sources = [block for block in range(layers) for _ in range(2)]
        schedule.write_text(json.dumps([{"name": "stack_layers", "value": sources, "max_wait_iters": grows_at}]), encoding="utf-8")
        command.append(f"--scaling_schedule_file={schedule}")
    run_command(command)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    started = (run / "run.json").stat().st_mtime  # written when the first step is about to be taken
    return Trained([(line["step"], line["time"] - started, line["val_loss"]) for line in lines if "val_loss" in line], grows_at)


def vocabulary(data: Path) -> int:
    """Ids of a prepared folder."""
    from llm_trainer.data.prepared import open_prepared

    return open_prepared(data).train.vocab_size


def arithmetic(steps: int, small_until: int, ids: int) -> float:
    """FLOPs of so many steps, those up to `small_until` with half of the blocks."""
    from llm_trainer.config import ModelConfig
    from llm_trainer.model.flops import estimate_flops

    def a_step(layers: int) -> float:
        shape = ModelConfig(
            vocab_size=ids, hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=4, max_position_embeddings=CONTEXT
        )
        return estimate_flops(shape, CONTEXT) * 12 * CONTEXT

    small = min(steps, small_until)
    return small * a_step(LAYERS // 2) + (steps - small) * a_step(LAYERS)


def fine_tuning(folder: Path, text: Path, seeds: list[str], steps: int) -> tuple[list[Figure], list[Target], list[str]]:
    """All weights against LoRA of rank 8, from a model of the built-in corpus to Tiny Shakespeare in its tokens."""
    base, data = folder / "base", folder / "data-tokens"
    train(base, folder / "data-builtin", seeds[0], 5 * steps, LAYERS)
    run_command([PROGRAM, "prepare", "--input", text, "--output_dir", data, "--tokenizer_path", folder / "data-builtin"])
    ways = {"all weights": [], "LoRA, rank 8": ["--attn_lora_rank=8", "--mlp_lora_rank=8", "--lora_train_base=false"]}
    losses: dict[str, list[float]] = {name: [] for name in ways}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for seed in seeds:
        for number, (name, flags) in enumerate(ways.items()):
            run = folder / f"tuned-{number}-{seed}"
            command = [PROGRAM, "train", "--init_from", base, "--data_dir", data, "--output_dir", run, f"--seed={seed}", *flags, *RUN]
            seconds[name].append(run_command([*command, f"--max_steps={steps}", f"--eval_interval={steps}"]).seconds)
            lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            losses[name].append([json.loads(line)["val_loss"] for line in lines if "val_loss" in line][-1])
    peaks = {name: step_peak(bool(flags)) / 1e6 for name, flags in ways.items()}
    figures = [Figure("fine-tuning: last loss", name, "nats", rounds) for name, rounds in losses.items()]
    figures += [Figure("fine-tuning: whole process", name, "s", rounds) for name, rounds in seconds.items()]
    figures += [Figure("fine-tuning: peak of a step at 30 M", name, "MB", [peak]) for name, peak in peaks.items()]
    ratio = peaks["LoRA, rank 8"] / peaks["all weights"]
    return figures, [Target("LoRA's peak memory ÷ all weights', 30 M shape", ratio, WANTED_MEMORY, is_ceiling=True)], []


def step_peak(with_lora: bool) -> int:
    """Bytes that weights, gradients, optimizer and activations take at a step's peak, measured in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(int(with_lora))], cwd=ROOT, env=os.environ, capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])


_PEAK = """
import re, sys
import torch
from llm_trainer.config import ModelConfig, TrainingConfig
from llm_trainer.data.sampling.batch import Batch
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.engine import build_engine
from llm_trainer.training.ranks import Ranks

def status(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

shape = dict(vocab_size=8192, hidden_size=512, num_hidden_layers=8, num_attention_heads=8, max_position_embeddings=64)
lora = dict(attn_lora_rank=8, mlp_lora_rank=8, lora_train_base=False) if int(sys.argv[1]) else {}
torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2))
before = status("VmRSS")
training = TrainingConfig(precision="fp32", compile="off", device="cpu")
engine = build_engine(Transformer(ModelConfig(**shape, **lora)), training, None, Ranks(), torch.device("cpu"))
engine.model.train()
engine.start("fp32", "off")
ids = torch.randint(8192, (2, 64))
for index in range(3):
    engine.step([Batch(ids, ids, None, ids.numel())], ids.numel(), rate_factor=1.0, index=index)
print(status("VmHWM") - before)
"""


if __name__ == "__main__":
    sys.exit(main())
