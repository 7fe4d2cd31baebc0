"""`llm-trainer quickstart`: the whole length of the house in minutes, with nothing to decide.

Gather text (the built-in corpus, or the user's), learn a tokenizer from it, write shards, train a small
Llama-shaped model, let it talk, write the report. The number of steps is what fits the time: a few steps are
timed first, so a slow machine ends as soon as a fast one, with less trained.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from llm_trainer.cli.commands.train import Assembled
from llm_trainer.cli.runtime_env import keep_freed_memory
from llm_trainer.cli.scripts import QUICKSTART, QuickstartOptions
from llm_trainer.cli.setup.parse_command import new_console, open_door
from llm_trainer.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from llm_trainer.config.duration import Duration
from llm_trainer.run_dir import BEST_MODEL

if TYPE_CHECKING:
    from rich.console import Console

    from llm_trainer.cli.setup.build_dataset import RunData
    from llm_trainer.model.transformer import Transformer
    from llm_trainer.reporting.run_metadata import Sample

CONTEXT = 256
BATCH = 8  # many small steps learn more in two minutes than few large ones
MAX_PASSES = 8.0  # over a small text; more would only learn it by heart
MIN_STEPS, MAX_STEPS = 60, 6000
OPTIMIZER_SHARE = 1.3  # a whole step against its forward and backward pass
TOKENIZER_MEGABYTES = 4.0
BUILTIN_PROMPTS = ("def __init__(self, ", "The ", "import os\n")
PROMPT_TOKENS = 6
SAMPLE_TOKENS = 100


def run(argv: list[str]) -> int:
    """The whole way; returns the exit status."""
    loaded = open_door(QUICKSTART, argv)
    if loaded is None:
        return 0
    assert isinstance(loaded.own, QuickstartOptions)
    own, console, began = loaded.own, new_console(), time.monotonic()
    console.print("[bold]1  text → tokens[/bold]")
    data = gather(own, console)
    console.print(f"\n[bold]2  training[/bold] (about {own.minutes:g} minutes)")
    parts = plan(own, data, console)
    run_folder = Path(own.output_dir)
    status = talk_and_report(parts, own, console, " ".join(["llm-trainer quickstart", *argv]))
    if status == 0:
        console.print(
            f"\n{time.monotonic() - began:.0f} s in all. Open {run_folder / 'report.html'} in a browser."
        )
        console.print(f"Talk to it:  llm-trainer generate {run_folder} --prompt 'def '", markup=False)
    return status


def gather(own: QuickstartOptions, console: Console) -> RunData:
    """Prepare the user's text, or the built-in corpus, into the run folder's `data`."""
    from llm_trainer.cli.setup.build_dataset import RunData
    from llm_trainer.data.pipeline.pipeline import prepare
    from llm_trainer.data.prepared_dataset import open_prepared

    settings = DataConfig(
        input=own.text or "builtin",
        vocab_size=own.vocab_size,
        tokenizer_sample_megabytes=TOKENIZER_MEGABYTES,
        num_workers=2,
    )
    folder = Path(own.output_dir) / "data"
    for line in prepare(settings, folder, console=console).lines():
        console.print(line, markup=False)
    return RunData(folder, open_prepared(folder))


def plan(own: QuickstartOptions, data: RunData, console: Console) -> Assembled:
    """The model, and as many steps as fit the time."""
    from llm_trainer.cli.setup.build_model import new_model

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
        compile="off",  # compiling takes longer than it could gain here
    )
    model = new_model(shape, own.seed)
    steps = own.steps or steps_that_fit(model, data, training, 60 * own.minutes)
    training.max_steps = steps
    training.eval_interval = Duration(max(20, steps // 8))
    training.warmup_steps = Duration(max(1, steps // 20))
    config = RunConfig(model=shape, training=training, data=DataConfig(data_dir=str(data.folder)))
    return Assembled(config, model, data)


def steps_that_fit(model: Transformer, data: RunData, training: TrainingConfig, seconds: float) -> int:
    """How many steps the time holds and the text is worth; settles the precision in `training` by the same
    measurement.
    """
    from llm_trainer.data.sampling.samplers import WindowSampler
    from llm_trainer.training.engines.autotune import Probe, choose
    from llm_trainer.training.engines.precision import resolve_device
    from llm_trainer.training.objectives.objective import NextToken, TrainingStep

    device = resolve_device(training.device)
    model.to(device).train()
    sampler = WindowSampler(data.prepared.train, model.config.max_position_embeddings, training.seed)
    probe = Probe(
        model,
        TrainingStep(model, NextToken()),
        sampler.batch(0, BATCH),
        device,
        micro_batches_left=MAX_STEPS // 10,
    )
    plain = training.model_copy(update={"compile": "off"})
    training.precision = choose(probe, plain, say=lambda line: None).precision
    step = OPTIMIZER_SHARE * probe.seconds(training.precision) / probe.share
    worth = max(1, round(MAX_PASSES * sampler.samples_per_epoch / BATCH))
    return min(MAX_STEPS, worth, max(MIN_STEPS, int(seconds / step)))


def talk_and_report(parts: Assembled, own: QuickstartOptions, console: Console, command: str) -> int:
    """Train, print figures and samples, write the report."""
    from llm_trainer.cli.setup.run_summary import in_words, record_facts, tell_start
    from llm_trainer.reporting.run_report import write_report
    from llm_trainer.training.trainer import Trainer

    prepared = parts.data.prepared
    keep_freed_memory()
    trainer = Trainer(
        parts.model,
        parts.config,
        prepared.train,
        prepared.validation,
        tokenizer=prepared.tokenizer,
        console=console,
    )
    tell_start(trainer, parts.data.folder, console)
    result = trainer.train()
    if result.ended_by not in ("finished", "stopped"):
        return result.exit_status
    if result.validation is not None:
        console.print(f"held-out text: {in_words(result.validation.metrics)}", markup=False)
    console.print("\n[bold]3  what it writes[/bold]")
    samples = draw_samples(parts, own, console)
    record_facts(trainer, parts.data, result, command, samples)
    write_report(trainer.run_dir)
    return 0


def draw_samples(parts: Assembled, own: QuickstartOptions, console: Console) -> list[Sample]:
    """Let the trained model go on from a few prompts, printing as it does."""
    from rich.text import Text

    from llm_trainer.inference.load_model import load_model
    from llm_trainer.reporting.run_metadata import Sample

    run_folder = Path(own.output_dir)
    model, _ = load_model(run_folder / BEST_MODEL if (run_folder / BEST_MODEL).is_dir() else run_folder)
    samples = []
    for prompt in prompts_for(own, parts.data):
        room = min(SAMPLE_TOKENS, model.context - PROMPT_TOKENS - 1)
        text = model.generate(prompt, max_new_tokens=max(1, room), temperature=0.7, top_p=0.9, seed=own.seed)
        console.print(Text.assemble((prompt, "bold"), text, "\n"))
        samples.append(Sample(prompt, text))
    return samples


def prompts_for(own: QuickstartOptions, data: RunData) -> list[str]:
    """Beginnings to go on from: fitting ones for the built-in corpus, else the first tokens of held-out text."""
    prepared = data.prepared
    held_out = prepared.validation
    if own.text is None:
        return list(BUILTIN_PROMPTS)
    if held_out is None or prepared.tokenizer is None or len(held_out) < 4 * PROMPT_TOKENS:
        return ["\n"]
    places = (len(held_out) // 4 * quarter for quarter in (0, 1, 2))
    return [
        prepared.tokenizer.decode(held_out.read(place, PROMPT_TOKENS).tolist()) or "\n" for place in places
    ]
