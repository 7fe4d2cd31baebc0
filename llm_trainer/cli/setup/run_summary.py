"""What a training prints: what is about to happen, how it ended, and the next command; and its metadata."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from llm_trainer.reporting.charts import format_number
from llm_trainer.reporting.run_metadata import RunMetadata, Sample, machine_info, save_run_metadata
from llm_trainer.run_dir import BEST_MODEL, FINAL_MODEL

if TYPE_CHECKING:
    from rich.console import Console

    from llm_trainer.cli.setup.build_dataset import RunData
    from llm_trainer.training.run import TrainingRun
    from llm_trainer.training.trainer import TrainingResult


def print_start(run: TrainingRun, folder: Path, console: Console) -> None:
    """Print the run as it was resolved: model, data, length, step, device, run folder.

    Args:
        run: The run.
        folder: The folder of the data.
        console: Where to print.
    """
    length, batches, config = run.length, run.batches, run.model.config
    plan, training = run.process_group.plan, run.training
    on_ranks = f"{plan.data_ranks} ranks × " if plan.data_ranks > 1 else ""
    held_out = len(run.eval_dataset) if run.eval_dataset else 0
    passes = length.steps / length.steps_per_epoch
    rows = {
        "model": f"{format_number(_num_parameters(run))} parameters{_trainable(run)}: {config.model_type} "
        f"shape, {config.num_hidden_layers} layers × {config.hidden_size}, "
        f"{config.num_attention_heads} heads, vocabulary {config.vocab_size:,}, "
        f"context {config.max_position_embeddings:,}",
        "data": f"{len(run.train_dataset):,} training tokens, {held_out:,} for validation, in {folder}",
        **_mixture_and_packing(run),
        "length": f"{length.steps:,} steps ({length.set_by}) of {length.tokens_per_step:,} tokens: "
        f"{passes:.3g} passes over the data",
        "step": f"{_count(batches.micro_batch_size, 'sequence')} × "
        f"{_count(batches.gradient_accumulation_steps, 'micro-batch', 'es')} × "
        f"{on_ranks}{run.context:,} tokens",
        "device": f"{run.device}, precision {training.precision}, compile {training.compile}",
    }
    if training.use_deepspeed:
        rows["DeepSpeed"] = f"ZeRO, stage {training.zero_stage}"
    if plan.ranks > 1:
        rows["plan"] = f"{plan} = {plan.ranks} ranks"
    print_rows(rows | {"run folder": str(run.run_dir)}, console)


def _mixture_and_packing(run: TrainingRun) -> dict[str, str]:
    """The mixture and how rows are packed, where that is not the default."""
    from llm_trainer.data.sampling.mixture import MixtureDataset
    from llm_trainer.data.sampling.packing import Packing

    packing, rows = Packing.from_config(run.config.data), {}
    if isinstance(run.train_dataset, MixtureDataset):
        rows["mixture"] = run.train_dataset.describe()
    if packing != Packing(mask_documents=packing.mask_documents):
        supervised = run.sampler.tokens_per_sample / run.context
        rows["rows"] = f"{packing}; {supervised:.1%} of the positions are supervised"
    return rows


def print_end(run: TrainingRun, result: TrainingResult, console: Console) -> None:
    """How the run ended, its figures, where the model is, and the next command."""
    from llm_trainer.training.logging.throughput import peak_memory_bytes

    run_dir = run.run_dir
    folder = next((run_dir / name for name in (BEST_MODEL, FINAL_MODEL) if (run_dir / name).is_dir()), None)
    speed = f", {result.tokens / result.seconds:,.0f} tok/s" if result.tokens and result.seconds else ""
    rows = {
        f"{result.ended_by}": f"step {result.step:,} after {timedelta(seconds=round(result.seconds))}, "
        f"{result.tokens:,} tokens{speed}"
    }
    if result.validation is not None:
        rows["validation"] = format_validation(result.validation.metrics)
    if result.best_validation_loss is not None:
        rows["best"] = f"validation loss {result.best_validation_loss:.4f}"
    if where := run.engine.timings.describe():
        rows["time"] = where
    rows["memory"] = f"{peak_memory_bytes(run.device) / 1e9:.2f} GB at the peak"
    if folder is not None:
        rows["model in"] = str(folder)
    page = _write_report(run) if result.ended_by != "evaluated" else None
    if page is not None:
        rows["report"] = str(page)
    if result.ended_by in ("preempted", "time"):
        rows["next"] = f"llm-trainer train --resume {shlex.quote(str(run_dir))}"
    elif folder is not None and run.tokenizer is not None:
        rows["next"] = f"llm-trainer generate {shlex.quote(str(run_dir))} --prompt 'Once upon a time'"
    console.print()
    print_rows(rows, console)


def print_rows(rows: Mapping[str, str], console: Console) -> None:
    """Aligned lines: name, value."""
    width = max(map(len, rows))
    for name, value in rows.items():
        console.print(f"{name:<{width}}  {value}", markup=False, highlight=False)


def format_validation(metrics: Mapping[str, float]) -> str:
    """`loss 1.2345, perplexity 3.44, 1.780 bits per byte`, with what there is."""
    words = [f"loss {metrics['val_loss']:.4f}", f"perplexity {metrics['perplexity']:.2f}"]
    if "bits_per_byte" in metrics:
        words.append(f"{metrics['bits_per_byte']:.3f} bits per byte")
    return ", ".join(words)


def record_metadata(
    run: TrainingRun, data: RunData, result: TrainingResult, command: str, samples: list[Sample] | None = None
) -> None:
    """Save what the run's report shows in addition to the metrics.

    Args:
        run: The run.
        data: Its data.
        result: How it ended.
        command: The command as it was typed.
        samples: Samples of the trained model.
    """
    from llm_trainer.model.module_names import parameter_counts

    metadata = data.prepared.metadata
    config = run.model.config
    facts = RunMetadata(
        command=command,
        headline={
            "parameters": format_number(_num_parameters(run)),
            "training time": str(timedelta(seconds=round(result.seconds))),
        },
        model={
            "shape": f"{config.model_type}, {config.num_hidden_layers} layers × {config.hidden_size}, "
            f"{config.num_attention_heads} heads",
            **{
                f"parameters in {part}": f"{count:,}"
                for part, count in _by_kind(parameter_counts(run.model)).items()
                if count
            },
        },
        data={
            "folder": str(data.folder),
            "source": metadata.source,
            "tokenizer": f"{metadata.tokenizer.kind}, {metadata.tokenizer.vocab_size:,} ids",
            "documents": f"{metadata.documents_kept:,} of {metadata.documents_in:,}",
            **{f"{split} tokens": f"{facts.tokens:,}" for split, facts in metadata.splits.items()},
        },
        machine=machine_info(str(run.device)),
        samples=samples or [],
    )
    save_run_metadata(run.run_dir, facts)


def _by_kind(counts: Mapping[str, int]) -> dict[str, int]:
    """`attn.0` … `attn.11` added up under `attn`."""
    kinds: dict[str, int] = {}
    for part, count in counts.items():
        kind = part.partition(".")[0]
        kinds[kind] = kinds.get(kind, 0) + count
    return kinds


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{plural if number != 1 else ''}"


def _trainable(run: TrainingRun) -> str:
    """` (18.4k trainable, 7.1%)` where part of the model is frozen, otherwise nothing."""
    total = _num_parameters(run)
    trained = sum(parameter.numel() for parameter in run.model.parameters() if parameter.requires_grad)
    return "" if trained == total else f" ({format_number(trained)} trainable, {trained / total:.2%})"


def _num_parameters(run: TrainingRun) -> int:
    return sum(parameter.numel() for parameter in run.model.parameters())


def _write_report(run: TrainingRun) -> Path | None:
    from llm_trainer.reporting.run_report import write_report
    from llm_trainer.training.logging.metrics import read_metrics

    return write_report(run.run_dir) if read_metrics(run.run_dir) else None
