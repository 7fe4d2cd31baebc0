"""Contradictions between settings that each are fine alone, in one place and before anything heavy loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llm_trainer.config.resolve.batch_size import divisions, micro_batch_bounds, resolve_batches
from llm_trainer.config.resolve.deepspeed import read_deepspeed
from llm_trainer.config.resolve.parallelism import check_plan, resolve_plan
from llm_trainer.config.schema.run_config import RunConfig
from llm_trainer.errors import UsageError


def check_start(config: RunConfig, origins: Mapping[str, str], sections: set[str], world_size: int) -> None:
    """Raises UsageError for settings that contradict each other or the launcher, whatever run they go on
    with.

    Here as in `check_whole` only sections that the command reads are judged.
    """
    said = _Places(origins)
    if "training" in sections:
        _check_launch(config, said, world_size)
    if "data" in sections:
        _check_shares(config, said)
    if "adaptive_reasoning" in sections:
        _check_reasoning(config, said)


def check_whole(
    config: RunConfig,
    origins: Mapping[str, str],
    sections: set[str],
    world_size: int,
    unsaid: str = "default",
) -> None:
    """Raises UsageError for settings that contradict each other once they are complete, with those of a run
    that goes on under them.

    `unsaid`: where a value comes from that `origins` does not have.
    """
    said = _Places(origins, unsaid)
    if "training" in sections:
        _check_deepspeed(config, said, world_size)
        _check_ranks(config, said, world_size)
        _check_length(config, said)
        _check_saving(config, said)
        _check_named_files(config)
    if "model" in sections and "data" in sections:
        _check_data_fits(config, said)


class _Places(dict[str, str]):
    """Dotted name → `name (where it was said)`."""

    def __init__(self, origins: Mapping[str, str], unsaid: str = "default") -> None:
        super().__init__({name: f"{name} ({origin})" for name, origin in origins.items()})
        self._unsaid = unsaid

    def __missing__(self, name: str) -> str:
        return f"{name} ({self._unsaid})"


def _check_launch(config: RunConfig, said: _Places, world_size: int) -> None:
    training = config.training
    if training.world_size is not None and training.world_size != world_size:
        raise UsageError(
            f"{said['training.world_size']} is {training.world_size}, "
            f"but {world_size} process{'es were' if world_size > 1 else ' was'} started; "
            f"start with torchrun --nproc_per_node={training.world_size}, or leave world_size out"
        )
    if training.distributed_backend == "nccl" and training.device == "cpu":
        raise UsageError(
            f"{said['training.distributed_backend']} is nccl, which needs GPUs, but {said['training.device']} is cpu; use gloo or auto"
        )


def _check_ranks(config: RunConfig, said: _Places, world_size: int) -> None:
    training = config.training
    for name in ("fsdp", "tensor_parallel", "context_parallel"):
        if training.offload_optimizer and getattr(training, name) > 1:
            raise UsageError(
                f"{said['training.offload_optimizer']} is for whole replicas; {said[f'training.{name}']}, {getattr(training, name)}, "
                "already divides the state; leave one of them out"
            )
    check_plan(training, config.model, world_size)
    if (bounds := micro_batch_bounds(config)) is not None:
        if training.pipeline_parallel > 1:
            raise UsageError(
                "micro-batches that are to be found (micro_batch_size auto, use_adaptive_batch_size) do not go with pipeline_parallel, "
                "whose stages cannot be tried alone; give micro_batch_size a number"
            )
        divisions(resolve_batches(training, resolve_plan(training, world_size).data_ranks), bounds)


def _check_length(config: RunConfig, said: _Places) -> None:
    training = config.training
    warmup = training.warmup_steps
    is_settled = (
        training.resume_from is not None
        and not {"training.warmup_steps", "training.lr_decay_steps"} & said.keys()
    )
    if warmup is None or is_settled:  # a run that goes on may end early
        return
    ends = {"steps": training.max_steps, "epochs": training.num_epochs, "tokens": training.max_tokens}
    end = ends[warmup.unit]
    if end is not None and warmup.value > end:
        raise UsageError(
            f"{said['training.warmup_steps']} is {warmup}, longer than the run: it ends after {end} {warmup.unit}; "
            "shorten the warm-up, or leave it out for a tenth of the run"
        )
    decay = training.lr_decay_steps
    if decay is not None and decay.unit == warmup.unit and decay.value < warmup.value:
        raise UsageError(
            f"{said['training.lr_decay_steps']} is {decay}, before the warm-up ends: {said['training.warmup_steps']} is {warmup}"
        )


def _check_saving(config: RunConfig, said: _Places) -> None:
    training = config.training
    if training.min_learning_rate is not None and training.min_learning_rate > training.learning_rate:
        raise UsageError(
            f"{said['training.min_learning_rate']} is {training.min_learning_rate}, above the peak: "
            f"{said['training.learning_rate']} is {training.learning_rate}"
        )
    if training.init_from == "scratch" and training.resume_from is None and training.lr_on_resume is not None:
        raise UsageError(
            f"{said['training.lr_on_resume']} is {training.lr_on_resume}, which is for resuming; add --resume, or leave it out"
        )


def _check_deepspeed(config: RunConfig, said: _Places, world_size: int) -> None:
    training = config.training
    if training.use_deepspeed and training.deepspeed_config is not None:
        read_deepspeed(Path(training.deepspeed_config)).check_ranks(world_size)
    for name in ("zero_stage", "deepspeed_config"):
        if not training.use_deepspeed and training.is_said(name) and f"training.{name}" in said:
            raise UsageError(
                f"{said[f'training.{name}']} has no effect, since use_deepspeed is off; add --use_deepspeed"
            )


def _check_named_files(config: RunConfig) -> None:
    """A schedule is read whole before training, although what it asks for is not built yet."""
    if config.training.scaling_schedule_file is not None:
        from llm_trainer.config.schema.scaling_schedule import read_schedule

        from_scratch = config.training.init_from == "scratch" and config.training.resume_from is None
        read_schedule(
            Path(config.training.scaling_schedule_file),
            layers=config.model.num_hidden_layers if from_scratch else None,
        )


def _check_data_fits(config: RunConfig, said: _Places) -> None:
    model, data = config.model, config.data
    if (
        "data.max_length" in said
        and data.max_length is not None
        and data.max_length > model.max_position_embeddings
    ):
        raise UsageError(
            f"{said['data.max_length']} is {data.max_length}, longer than the model's context: "
            f"{said['model.max_position_embeddings']} is {model.max_position_embeddings}"
        )
    if "data.vocab_size" in said and data.is_said("vocab_size") and data.vocab_size > model.vocab_size:
        raise UsageError(
            f"{said['data.vocab_size']} is {data.vocab_size}, more ids than the model has rows: "
            f"{said['model.vocab_size']} is {model.vocab_size}"
        )


def _check_shares(config: RunConfig, said: _Places) -> None:
    data = config.data
    total = (data.train_ratio or 0.0) + data.val_ratio + data.test_ratio
    if total > 1 + 1e-9:
        raise UsageError(
            f"{said['data.train_ratio']}, {said['data.val_ratio']} and {said['data.test_ratio']} add up to {total:g}; they are shares of 1"
        )
    if data.max_length is not None and data.stride >= data.max_length:
        raise UsageError(
            f"{said['data.stride']} is {data.stride}: chunks of {said['data.max_length']}, {data.max_length}, must overlap by fewer tokens"
        )
    if not data.pack_sequences and data.packing_strategy != "greedy":
        raise UsageError(
            f"{said['data.packing_strategy']} is {data.packing_strategy}, but {said['data.pack_sequences']} is off; leave one of them out"
        )
    if data.max_length is not None and data.min_length > data.max_length:
        raise UsageError(
            f"{said['data.min_length']} is {data.min_length}, above {said['data.max_length']}, {data.max_length}"
        )


def _check_reasoning(config: RunConfig, said: _Places) -> None:
    reasoning = config.adaptive_reasoning
    pairs = (
        ("low_complexity_threshold", "medium_complexity_threshold"),
        ("min_computation_budget", "max_computation_budget"),
    )
    for low, high in pairs:
        if getattr(reasoning, low) > getattr(reasoning, high):
            raise UsageError(
                f"{said[f'adaptive_reasoning.{low}']} is above {said[f'adaptive_reasoning.{high}']}; swap them"
            )
