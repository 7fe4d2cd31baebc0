"""Checks that need several settings: contradictions between them, and settings of features that are not
implemented.

All of them run before anything heavy is loaded.

A feature section whose switch is off is not checked: a file may describe what another run will use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from llm_trainer.config.parse.merge import SettingNames
from llm_trainer.config.resolve.batch_size import divisions
from llm_trainer.config.resolve.parallelism import check_plan
from llm_trainer.config.resolve.settings import ResolvedSettings
from llm_trainer.config.schema.base import Section
from llm_trainer.config.schema.run_config import SWITCHES, RunConfig, section_types
from llm_trainer.config.schema.scaling_schedule import read_schedule
from llm_trainer.errors import UsageError

# Settings that have an effect only with a switch.
_NEEDS_SWITCH = {"training.teacher_model_path": "use_knowledge_distillation"}


def check_launch(config: RunConfig, origins: Mapping[str, str], sections: set[str], world_size: int) -> None:
    """Check the settings that a resumed run does not change.

    Args:
        config: All settings.
        origins: Dotted name → where the value came from.
        sections: The sections that the command reads; others are not checked.
        world_size: Number of ranks.

    Raises:
        UsageError: Settings contradict each other or the launcher.
    """
    labels = _Labels(origins)
    if "training" in sections:
        _check_launcher(config, labels, world_size)
    if "data" in sections:
        _check_data(config, labels)
    if "adaptive_reasoning" in sections:
        _check_reasoning(config, labels)


def check_complete(
    settings: ResolvedSettings,
    origins: Mapping[str, str],
    sections: set[str],
    default_origin: str = "default",
) -> None:
    """Check the complete settings; when resuming, those merged with the saved configuration.

    Args:
        settings: All settings, with the DeepSpeed file and the batch sizes resolved.
        origins: Dotted name → where the value came from.
        sections: The sections that the command reads; others are not checked.
        default_origin: Origin of the values that `origins` does not have.

    Raises:
        UsageError: Settings contradict each other.
    """
    config, labels = settings.config, _Labels(origins, default_origin)
    if "training" in sections:
        _check_deepspeed(config, labels)
        _check_ranks(settings, labels)
        _check_length(config, labels)
        _check_learning_rate(config, labels)
        _check_schedule_file(config)
    if "model" in sections and "data" in sections:
        _check_data_fits(config, labels)


def not_implemented_settings(
    config: RunConfig, reads: SettingNames | None = None, options: Section | None = None
) -> list[str]:
    """Settings that ask for a feature which is not implemented, as `section.field = value (meaning)`.

    Args:
        config: All settings.
        reads: What the command reads; None: everything. A shared file may hold settings of other commands.
        options: The command's own options.
    """
    found = (
        []
        if options is None
        else [f"{name} = {value!r} ({text})" for name, value, text in _unsupported(options)]
    )
    for section in section_types():
        if section in SWITCHES and not getattr(config.training, SWITCHES[section]):
            continue
        for name, value, text in _unsupported(getattr(config, section)):
            switch = _NEEDS_SWITCH.get(f"{section}.{name}")
            if (reads is None or reads.reads(section, name)) and (
                switch is None or getattr(config.training, switch)
            ):
                found.append(f"{section}.{name} = {value!r} ({text})")
    return found


def _unsupported(values: Section) -> Iterator[tuple[str, object, str]]:
    """Name, value and help text of each field that is not implemented and differs from its default."""
    kind = type(values)
    for name, field in kind.model_fields.items():
        value = getattr(values, name)
        if kind.setting_of(name).not_implemented and value != field.get_default(call_default_factory=True):
            yield name, value, field.description or ""


def check_implemented(
    config: RunConfig, reads: SettingNames | None = None, options: Section | None = None
) -> None:
    """Check that no setting asks for a feature which is not implemented.

    Args:
        config: As for `not_implemented_settings`, like the other arguments.

    Raises:
        UsageError: There are such settings; the message lists them.
    """
    found = not_implemented_settings(config, reads, options)
    if found:
        listed = "\n".join(f"  {line}" for line in found)
        them = "it" if len(found) == 1 else "them"
        raise UsageError(
            f"not implemented in this version:\n{listed}\nRemove {them} or set {them} to the default."
        )


class _Labels(dict[str, str]):
    """Dotted name → `name (origin)`."""

    def __init__(self, origins: Mapping[str, str], default_origin: str = "default") -> None:
        super().__init__({name: f"{name} ({origin})" for name, origin in origins.items()})
        self._default_origin = default_origin

    def __missing__(self, name: str) -> str:
        return f"{name} ({self._default_origin})"


def _check_launcher(config: RunConfig, labels: _Labels, world_size: int) -> None:
    training = config.training
    if training.world_size is not None and training.world_size != world_size:
        raise UsageError(
            f"{labels['training.world_size']} is {training.world_size}, but {world_size} "
            f"process{'es were' if world_size > 1 else ' was'} started; "
            f"start with torchrun --nproc_per_node={training.world_size}, or leave world_size out"
        )
    if training.distributed_backend == "nccl" and training.device == "cpu":
        raise UsageError(
            f"{labels['training.distributed_backend']} is nccl, which needs GPUs, but "
            f"{labels['training.device']} is cpu; use gloo or auto"
        )


def _check_ranks(settings: ResolvedSettings, labels: _Labels) -> None:
    config, training = settings.config, settings.config.training
    for name in ("fsdp", "tensor_parallel", "context_parallel"):
        if training.offload_optimizer and getattr(training, name) > 1:
            raise UsageError(
                f"{labels['training.offload_optimizer']} cannot be combined with "
                f"{labels[f'training.{name}']} "
                f"{getattr(training, name)}, which shards the optimizer state; remove one of them"
            )
    check_plan(settings.plan, settings.batches, training, config.model)
    if settings.micro_batch_bounds is not None:
        if training.pipeline_parallel > 1:
            raise UsageError(
                "micro_batch_size auto and use_adaptive_batch_size are not supported with "
                "pipeline_parallel, whose stages cannot be measured alone; give micro_batch_size a number"
            )
        divisions(settings.batches, settings.micro_batch_bounds)


def _check_length(config: RunConfig, labels: _Labels) -> None:
    training = config.training
    warmup = training.warmup_steps
    is_saved = (
        training.resume_from is not None
        and not {"training.warmup_steps", "training.lr_decay_steps"} & labels.keys()
    )
    if warmup is None or is_saved:  # a resumed run may end early
        return
    ends = {"steps": training.max_steps, "epochs": training.num_epochs, "tokens": training.max_tokens}
    end = ends[warmup.unit]
    if end is not None and warmup.value > end:
        raise UsageError(
            f"{labels['training.warmup_steps']} is {warmup}, longer than the run, which ends after {end} "
            f"{warmup.unit}; shorten the warm-up, or remove it for a tenth of the run"
        )
    decay = training.lr_decay_steps
    if decay is not None and decay.unit == warmup.unit and decay.value < warmup.value:
        raise UsageError(
            f"{labels['training.lr_decay_steps']} is {decay}, before the end of the warm-up: "
            f"{labels['training.warmup_steps']} is {warmup}; make the decay longer or the warm-up shorter"
        )


def _check_learning_rate(config: RunConfig, labels: _Labels) -> None:
    training = config.training
    if training.min_learning_rate is not None and training.min_learning_rate > training.learning_rate:
        raise UsageError(
            f"{labels['training.min_learning_rate']} is {training.min_learning_rate}, above the peak: "
            f"{labels['training.learning_rate']} is {training.learning_rate}; lower the first or raise the "
            "second"
        )
    if training.init_from == "scratch" and training.resume_from is None and training.lr_on_resume is not None:
        raise UsageError(
            f"{labels['training.lr_on_resume']} is {training.lr_on_resume}, which has an effect only when "
            "resuming; add --resume, or remove it"
        )


def _check_deepspeed(config: RunConfig, labels: _Labels) -> None:
    training = config.training
    for name in ("zero_stage", "deepspeed_config"):
        if not training.use_deepspeed and training.is_set(name) and f"training.{name}" in labels:
            raise UsageError(
                f"{labels[f'training.{name}']} has no effect, since use_deepspeed is off; add --use_deepspeed"
            )


def _check_schedule_file(config: RunConfig) -> None:
    """Check the whole scaling schedule before training. The number of layers is known only from scratch."""
    if config.training.scaling_schedule_file is not None:
        from_scratch = config.training.init_from == "scratch" and config.training.resume_from is None
        read_schedule(
            Path(config.training.scaling_schedule_file),
            layers=config.model.num_hidden_layers if from_scratch else None,
        )


def _check_data_fits(config: RunConfig, labels: _Labels) -> None:
    model, data = config.model, config.data
    if (
        "data.max_length" in labels
        and data.max_length is not None
        and data.max_length > model.max_position_embeddings
    ):
        raise UsageError(
            f"{labels['data.max_length']} is {data.max_length}, longer than the model's context: "
            f"{labels['model.max_position_embeddings']} is {model.max_position_embeddings}; make them equal"
        )
    if "data.vocab_size" in labels and data.is_set("vocab_size") and data.vocab_size > model.vocab_size:
        raise UsageError(
            f"{labels['data.vocab_size']} is {data.vocab_size}, larger than the model's vocabulary: "
            f"{labels['model.vocab_size']} is {model.vocab_size}; make them equal"
        )


def _check_data(config: RunConfig, labels: _Labels) -> None:
    data = config.data
    total = (data.train_ratio or 0.0) + data.val_ratio + data.test_ratio
    if total > 1 + 1e-9:
        raise UsageError(
            f"{labels['data.train_ratio']}, {labels['data.val_ratio']} and {labels['data.test_ratio']} add "
            f"up to {total:g}; they are fractions of 1"
        )
    if data.max_length is not None and data.stride >= data.max_length:
        raise UsageError(
            f"{labels['data.stride']} is {data.stride}, but chunks of {labels['data.max_length']} "
            f"{data.max_length} must "
            "overlap by fewer tokens; lower the stride"
        )
    if not data.pack_sequences and data.packing_strategy != "greedy":
        raise UsageError(
            f"{labels['data.packing_strategy']} is {data.packing_strategy}, but "
            f"{labels['data.pack_sequences']} is off; "
            "remove one of them"
        )
    if data.max_length is not None and data.min_length > data.max_length:
        raise UsageError(
            f"{labels['data.min_length']} is {data.min_length}, above {labels['data.max_length']}, which is "
            f"{data.max_length}; lower the first or raise the second"
        )


def _check_reasoning(config: RunConfig, labels: _Labels) -> None:
    reasoning = config.adaptive_reasoning
    pairs = (
        ("low_complexity_threshold", "medium_complexity_threshold"),
        ("min_computation_budget", "max_computation_budget"),
    )
    for low, high in pairs:
        if getattr(reasoning, low) > getattr(reasoning, high):
            raise UsageError(
                f"{labels[f'adaptive_reasoning.{low}']} is above {labels[f'adaptive_reasoning.{high}']}; "
                "swap them"
            )
