"""What training tells the person who started it: what is about to happen, what came of it, and what to type
next.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from llm_trainer.reporting.charts import short
from llm_trainer.reporting.run_metadata import RunFacts, Sample, machine_facts, save_facts
from llm_trainer.run_dir import BEST_MODEL, FINAL_MODEL

if TYPE_CHECKING:
    from rich.console import Console

    from llm_trainer.cli.setup.build_dataset import RunData
    from llm_trainer.training.state import TrainingResult
    from llm_trainer.training.trainer import Trainer


def tell_start(trainer: Trainer, folder: Path, console: Console) -> None:
    """The run as it was resolved: model, data, length, batch, device, where it is written."""
    length, batches, config = trainer.length, trainer.batches, trainer.model.config
    validation, plan = trainer.validation_tokens, trainer.ranks.plan
    on_ranks = f"{plan.data_ranks} ranks × " if plan.data_ranks > 1 else ""
    rows = {
        "model": f"{short(_parameters(trainer))} parameters: {config.model_type} shape, "
        f"{config.num_hidden_layers} layers × {config.hidden_size}, "
        f"{config.num_attention_heads} heads, vocabulary {config.vocab_size:,}, context {config.max_position_embeddings:,}",
        "data": f"{len(trainer.train_tokens):,} training tokens, {len(validation) if validation else 0:,} for validation, in {folder}",
        **_rows_of(trainer),
        "length": f"{length.steps:,} steps ({length.said_by}) of {length.tokens_per_step:,} tokens: "
        f"{length.steps / length.steps_per_epoch:.3g} passes over the data",
        "step": f"{batches.micro_batch_size} sequences × {batches.gradient_accumulation_steps} micro-batches × "
        f"{on_ranks}{trainer.context} tokens",
        "device": f"{trainer.device}, precision {trainer.training.precision}, compile {trainer.training.compile}",
        **(
            {"DeepSpeed": f"ZeRO, stage {trainer.training.zero_stage}"}
            if trainer.training.use_deepspeed
            else {}
        ),
        **({"plan": f"{plan} = {plan.ranks} ranks"} if plan.ranks > 1 else {}),
        "run folder": str(trainer.run_dir),
    }
    tell(rows, console)


def _rows_of(trainer: Trainer) -> dict[str, str]:
    """What is mixed and how rows are packed, where that is not the plain way."""
    from llm_trainer.data.sampling.mixture import TokenMixture
    from llm_trainer.data.sampling.packing import Packing

    packing, told = Packing.of(trainer.config.data), {}
    if isinstance(trainer.train_tokens, TokenMixture):
        told["mixture"] = trainer.train_tokens.describe()
    if packing != Packing(mask_documents=packing.mask_documents):
        told["rows"] = (
            f"{packing}; {trainer.sampler.tokens_per_sample / trainer.context:.1%} of the places are learned from"
        )
    return told


def tell_end(trainer: Trainer, result: TrainingResult, console: Console) -> None:
    """How the run ended, its figures, where the model is, and the next command."""
    run_dir = trainer.run_dir
    folder = next((run_dir / name for name in (BEST_MODEL, FINAL_MODEL) if (run_dir / name).is_dir()), None)
    rows = {
        f"{result.ended_by}": f"step {result.step:,} after {timedelta(seconds=round(result.seconds))}, {result.tokens:,} tokens"
    }
    if result.validation is not None:
        rows["validation"] = in_words(result.validation.metrics)
    if result.best_validation_loss is not None:
        rows["best"] = f"validation loss {result.best_validation_loss:.4f}"
    if where := trainer.engine.timings.describe():
        rows["time"] = where
    if folder is not None:
        rows["model in"] = str(folder)
    page = _write_page(trainer) if result.ended_by != "evaluated" else None
    if page is not None:
        rows["report"] = str(page)
    if result.ended_by in ("preempted", "time"):
        rows["next"] = f"llm-trainer train --resume {shlex.quote(str(run_dir))}"
    elif folder is not None and trainer.tokenizer is not None:
        rows["next"] = f"llm-trainer generate {shlex.quote(str(run_dir))} --prompt 'Once upon a time'"
    console.print()
    tell(rows, console)


def tell(rows: Mapping[str, str], console: Console) -> None:
    """Aligned lines: name, value."""
    width = max(map(len, rows))
    for name, value in rows.items():
        console.print(f"{name:<{width}}  {value}", markup=False, highlight=False)


def in_words(metrics: Mapping[str, float]) -> str:
    """`loss 1.2345, perplexity 3.44, 1.780 bits per byte`, with what there is."""
    words = [f"loss {metrics['val_loss']:.4f}", f"perplexity {metrics['perplexity']:.2f}"]
    if "bits_per_byte" in metrics:
        words.append(f"{metrics['bits_per_byte']:.3f} bits per byte")
    return ", ".join(words)


def record_facts(
    trainer: Trainer, data: RunData, result: TrainingResult, command: str, samples: list[Sample] | None = None
) -> None:
    """Leave in the run folder what its report shows beside the metrics."""
    from llm_trainer.model.module_names import parameter_counts

    metadata = data.prepared.metadata
    config = trainer.model.config
    facts = RunFacts(
        command=command,
        headline={
            "parameters": short(_parameters(trainer)),
            "training time": str(timedelta(seconds=round(result.seconds))),
        },
        model={
            "shape": f"{config.model_type}, {config.num_hidden_layers} layers × {config.hidden_size}, {config.num_attention_heads} heads",
            **{
                f"parameters in {part}": f"{count:,}"
                for part, count in _by_kind(parameter_counts(trainer.model)).items()
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
        machine=machine_facts(str(trainer.device)),
        samples=samples or [],
    )
    save_facts(trainer.run_dir, facts)


def _by_kind(counts: Mapping[str, int]) -> dict[str, int]:
    """`attn.0` … `attn.11` added up under `attn`."""
    kinds: dict[str, int] = {}
    for part, count in counts.items():
        kind = part.partition(".")[0]
        kinds[kind] = kinds.get(kind, 0) + count
    return kinds


def _parameters(trainer: Trainer) -> int:
    return sum(parameter.numel() for parameter in trainer.model.parameters())


def _write_page(trainer: Trainer) -> Path | None:
    from llm_trainer.reporting.run_report import write_report
    from llm_trainer.training.logging.metrics import read_metrics

    return write_report(trainer.run_dir) if read_metrics(trainer.run_dir) else None
