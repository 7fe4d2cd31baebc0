"""`llm-trainer quickstart`: everything from text to samples in minutes, with nothing to decide.

It gathers text (the built-in corpus, or the user's), trains a tokenizer, writes shards, trains a small
Llama-shaped model, samples from it and writes the report. The number of steps is what fits into the time: a
few steps are timed first, so a slow machine finishes as soon as a fast one, with less training.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from llm_trainer.cli.runtime_env import keep_freed_memory
from llm_trainer.cli.setup.parse_command import new_console, parse_command
from llm_trainer.cli.specs import QUICKSTART, QuickstartOptions
from llm_trainer.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from llm_trainer.config.duration import Duration
from llm_trainer.run_dir import BEST_MODEL

if TYPE_CHECKING:
    from rich.console import Console

    from llm_trainer.cli.setup.build_dataset import RunData
    from llm_trainer.model.transformer import Transformer
    from llm_trainer.reporting.run_metadata import Sample

CONTEXT = 256
BATCH = 8  # many small steps learn more in two minutes than a few large ones
MAX_PASSES = 8.0  # over a small text; more would only memorise it
MIN_STEPS, MAX_STEPS = 60, 6000
OPTIMIZER_FACTOR = 1.3  # time of a step, relative to its forward and backward pass
TOKENIZER_MEGABYTES = 4.0
BUILTIN_PROMPTS = ("def __init__(self, ", "The ", "import os\n")
PROMPT_TOKENS = 6
SAMPLE_TOKENS = 100


def run(argv: list[str]) -> int:
    """Prepare, train, sample, report; returns the exit code."""
    loaded = parse_command(QUICKSTART, argv)
    if loaded is None:
        return 0
    assert isinstance(loaded.options, QuickstartOptions)
    own, console, started = loaded.options, new_console(), time.monotonic()
    console.print("[bold]1  text → tokens[/bold]")
    data = gather(own, console)
    console.print(f"\n[bold]2  training[/bold] (about {own.minutes:g} minutes)")
    model, config = plan(own, data)
    run_dir = Path(own.output_dir)
    status = train_and_report(model, config, data, own, console, " ".join(["llm-trainer quickstart", *argv]))
    if status == 0:
        console.print(
            f"\n{time.monotonic() - started:.0f} s in total. Open {run_dir / 'report.html'} in a browser."
        )
        console.print(f"Continue a prompt:  llm-trainer generate {run_dir} --prompt 'def '", markup=False)
    return status


def gather(own: QuickstartOptions, console: Console) -> RunData:
    """Prepare the user's text, or the built-in corpus, in the run folder's `data`.

    Args:
        own: The options.
        console: Where to print.
    """
    from llm_trainer.cli.setup.build_dataset import RunData
    from llm_trainer.data.pipeline.pipeline import prepare_dataset
    from llm_trainer.data.prepared_dataset import open_prepared_dataset

    settings = DataConfig(
        input=own.text or "builtin",
        vocab_size=own.vocab_size,
        tokenizer_sample_megabytes=TOKENIZER_MEGABYTES,
        num_workers=2,
    )
    folder = Path(own.output_dir) / "data"
    for line in prepare_dataset(settings, folder, console=console).lines():
        console.print(line, markup=False)
    return RunData(folder, open_prepared_dataset(folder), DataConfig(data_dir=str(folder)))


def plan(own: QuickstartOptions, data: RunData) -> tuple[Transformer, RunConfig]:
    """The model, and the settings with as many steps as fit into the time.

    Args:
        own: The options.
        data: The prepared data.
    """
    from llm_trainer.model.build import build_model

    tokens = len(data.prepared.train)
    context = CONTEXT if tokens > 8 * CONTEXT else max(8, tokens // 8)
    shape = ModelConfig(
        model_type="llama",
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=512,
        vocab_size=data.prepared.vocab_size,
        max_position_embeddings=context,
        tie_word_embeddings=True,
    )
    training = TrainingConfig(
        output_dir=own.output_dir,
        batch_size=BATCH,
        optimizer="muon",
        learning_rate=5e-3,
        muon_learning_rate=0.03,
        weight_decay=0.05,
        seed=own.seed,
        logging_steps=10,
        eval_iters=40,
        save_interval=None,
        num_workers=1,
        compile="off",  # compiling takes longer than it could save
    )
    model = build_model(shape, own.seed)
    steps = own.steps or steps_that_fit(model, data, training, 60 * own.minutes)
    lengths = {
        "max_steps": steps,
        "eval_interval": Duration(max(20, steps // 8)),
        "warmup_steps": Duration(max(1, steps // 20)),
    }
    training = training.model_copy(update=lengths)
    config = RunConfig(model=shape, training=training, data=DataConfig(data_dir=str(data.folder)))
    return model, config


def steps_that_fit(model: Transformer, data: RunData, training: TrainingConfig, seconds: float) -> int:
    """How many steps fit into the time and are worth it for the text.

    Args:
        model: The model.
        data: The data.
        training: The settings.
        seconds: The time.
    """
    from llm_trainer.data.sampling.window_sampler import WindowSampler
    from llm_trainer.device import resolve_device
    from llm_trainer.training.engines.autotune import Probe, auto_precision
    from llm_trainer.training.objectives.objective import ModelWithObjective, NextToken

    device = resolve_device(training.device)
    model.to(device).train()
    sampler = WindowSampler(data.prepared.train, model.config.max_position_embeddings, training.seed)
    probe = Probe(
        model,
        ModelWithObjective(model, NextToken()),
        sampler.batch(0, BATCH),
        device,
        micro_batches_left=MAX_STEPS // 10,
    )
    precision, _ = auto_precision(model.config, device)
    step = OPTIMIZER_FACTOR * probe.seconds(precision) / probe.fraction
    worth = max(1, round(MAX_PASSES * sampler.samples_per_epoch / BATCH))
    return min(MAX_STEPS, worth, max(MIN_STEPS, int(seconds / step)))


def train_and_report(
    model: Transformer,
    config: RunConfig,
    data: RunData,
    own: QuickstartOptions,
    console: Console,
    command: str,
) -> int:
    """Train, print figures and samples, write the report.

    Args:
        model: The model.
        config: The settings.
        data: The data.
        own: The options.
        console: Where to print.
        command: The command as it was typed, for the report.

    Returns:
        The exit code.
    """
    from llm_trainer.cli.setup.run_summary import format_validation, print_start, record_metadata
    from llm_trainer.reporting.run_report import write_report
    from llm_trainer.training.run_lock import RunLock
    from llm_trainer.training.trainer import Trainer

    prepared = data.prepared
    keep_freed_memory()
    trainer = Trainer(
        model,
        config,
        prepared.train,
        prepared.validation,
        tokenizer=prepared.tokenizer,
        console=console,
    )
    print_start(trainer.run, data.folder, console)
    result = trainer.train()
    if result.ended_by not in ("finished", "stopped"):
        return result.exit_code
    if result.validation is not None:
        console.print(f"held-out text: {format_validation(result.validation.metrics)}", markup=False)
    console.print("\n[bold]3  samples[/bold]")
    samples = draw_samples(data, own, console)
    with RunLock(trainer.run.run_dir):
        record_metadata(trainer.run, data, result, command, samples)
        write_report(trainer.run.run_dir)
    return 0


def draw_samples(data: RunData, own: QuickstartOptions, console: Console) -> list[Sample]:
    """Continue a few prompts with the trained model, and print them.

    Args:
        data: The data, for prompts.
        own: The options.
        console: Where to print.
    """
    from rich.text import Text

    from llm_trainer.inference.load_model import load_model
    from llm_trainer.reporting.run_metadata import Sample

    run_folder = Path(own.output_dir)
    model, _ = load_model(run_folder / BEST_MODEL if (run_folder / BEST_MODEL).is_dir() else run_folder)
    samples = []
    for prompt in prompts_for(own, data):
        room = min(SAMPLE_TOKENS, model.context - PROMPT_TOKENS - 1)
        text = model.generate(prompt, max_new_tokens=max(1, room), temperature=0.7, top_p=0.9, seed=own.seed)
        console.print(Text.assemble((prompt, "bold"), text, "\n"))
        samples.append(Sample(prompt, text))
    return samples


def prompts_for(own: QuickstartOptions, data: RunData) -> list[str]:
    """Prompts: fitting ones for the built-in corpus, else the first words in pieces of held-out text.

    Args:
        own: The options.
        data: The data.
    """
    prepared = data.prepared
    held_out = prepared.validation
    if own.text is None:
        return list(BUILTIN_PROMPTS)
    if held_out is None or prepared.tokenizer is None or len(held_out) < 4 * PROMPT_TOKENS:
        return ["\n"]
    places = (len(held_out) // 4 * quarter for quarter in (0, 1, 2))
    tokenizer = prepared.tokenizer

    def is_short(text: str) -> bool:
        return len(tokenizer.encode(text)) <= PROMPT_TOKENS

    prompts = []
    for place in places:
        piece = tokenizer.decode(held_out.read(place, min(6 * PROMPT_TOKENS, len(held_out) - place)).tolist())
        start = tokenizer.decode(held_out.read(place, PROMPT_TOKENS).tolist())
        prompts.append(first_words(piece, is_short) or start or "\n")  # a text may have no spaces
    return prompts


def first_words(piece: str, is_short: Callable[[str], bool]) -> str:
    """Whole words from a piece of a text that was cut anywhere: as many as are short enough together.

    Args:
        piece: The piece; its first and last words may be cut.
        is_short: Whether a prompt is short enough.

    Returns:
        The words; empty if the piece has none that is short enough.
    """
    words = re.findall(r"(?<=\s)\S+(?=\s)", piece)
    for first in range(len(words)):
        for last in range(len(words), first, -1):
            if is_short(prompt := " ".join(words[first:last])):
                return prompt
    return ""
