"""DeepSpeed's configuration file: which keys are supported, and whether its batch sizes fit the number of
ranks.

A backend file that contradicts the flags makes a run go wrong unnoticed. So the configuration that DeepSpeed
gets is always generated from the settings of the run, and a user's file is one more source of these settings.
It may set what no other source sets, and must agree with what other sources set. Apart from that, only buffer
sizes are accepted, which do not change results.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from llm_trainer.config.parse.config_files import read_mapping_or_list
from llm_trainer.config.schema.base import Section, setting
from llm_trainer.config.schema.run_config import RunConfig
from llm_trainer.config.schema.training import TrainingConfig
from llm_trainer.errors import UsageError


class DeepSpeedOptimizerParameters(Section):
    """Arguments of DeepSpeed's optimizer."""

    lr: float | None = setting(None, "Peak learning rate.", ge=0)
    weight_decay: float | None = setting(None, "Decoupled weight decay.", ge=0)
    betas: list[float] | None = setting(None, "Decay rates of the two moments.", min_length=2, max_length=2)
    eps: float | None = setting(None, "Value added to the denominator.", gt=0)


class DeepSpeedOptimizer(Section):
    """The optimizer."""

    type: Literal["Adam", "AdamW"] = setting("AdamW", "Which optimizer.")
    params: DeepSpeedOptimizerParameters = setting(
        DeepSpeedOptimizerParameters, "Arguments of the optimizer."
    )


class DeepSpeedPrecision(Section):
    """The section `fp16` or `bf16`."""

    enabled: bool = setting(False, "Whether the precision is used.")
    loss_scale: float = setting(0.0, "Loss scale. 0: dynamic.", ge=0)


class DeepSpeedZero(Section):
    """What ZeRO shards over the ranks."""

    stage: Literal[0, 1, 2, 3] | None = setting(
        None, "1: optimizer state, 2: also gradients, 3: also weights."
    )
    overlap_comm: bool | None = setting(None, "Communicate during the backward pass.")
    contiguous_gradients: bool | None = setting(None, "Copy gradients to one buffer before they are sent.")
    reduce_bucket_size: int | None = setting(
        None, "Bucket size of reductions of gradients.", unit="numbers", gt=0
    )
    allgather_bucket_size: int | None = setting(
        None, "Bucket size when weights are gathered.", unit="numbers", gt=0
    )
    stage3_prefetch_bucket_size: int | None = setting(
        None, "Bucket size of weights that are gathered in advance.", unit="numbers", ge=0
    )
    stage3_param_persistence_threshold: int | None = setting(
        None, "Tensors smaller than this are not sharded.", unit="numbers", ge=0
    )
    stage3_max_live_parameters: int | None = setting(
        None, "Largest number of weights that are gathered at a time.", unit="numbers", ge=0
    )


class DeepSpeedConfig(Section):
    """The supported content of the file."""

    train_batch_size: int | None = setting(
        None, "Sequences per step, over all ranks.", unit="sequences", gt=0
    )
    train_micro_batch_size_per_gpu: int | None = setting(
        None, "Micro-batch size per rank.", unit="sequences", gt=0
    )
    gradient_accumulation_steps: int | None = setting(
        None, "Micro-batches per step on each rank.", unit="micro-batches", gt=0
    )
    gradient_clipping: float | None = setting(None, "Clip the gradient norm to this value.", ge=0)
    optimizer: DeepSpeedOptimizer | None = setting(None, "The optimizer.")
    fp16: DeepSpeedPrecision = setting(
        DeepSpeedPrecision, "Half precision, which DeepSpeed does not support on CPUs."
    )
    bf16: DeepSpeedPrecision = setting(DeepSpeedPrecision, "bfloat16.")
    zero_optimization: DeepSpeedZero = setting(DeepSpeedZero, "What is sharded over the ranks.")

    def check_ranks(self, ranks: int) -> None:
        """Check that train_batch_size = micro-batch size × accumulation × ranks.

        Args:
            ranks: Number of ranks.

        Raises:
            UsageError: It is not; the message names the number of ranks that fits.
        """
        total, micro, steps = (
            self.train_batch_size,
            self.train_micro_batch_size_per_gpu,
            self.gradient_accumulation_steps,
        )
        if total is None or micro is None or steps is None or total == micro * steps * ranks:
            return
        fitting = (
            f"it fits {total // (micro * steps)} ranks"
            if total % (micro * steps) == 0
            else "it fits no number of ranks"
        )
        raise UsageError(
            f"deepspeed_config: train_batch_size {total} is not "
            f"train_micro_batch_size_per_gpu {micro} × gradient_accumulation_steps {steps} × {ranks} ranks "
            f"= {micro * steps * ranks}; {fitting}"
        )


def read_deepspeed(path: Path) -> DeepSpeedConfig:
    """Read a DeepSpeed file; raises UsageError for unsupported keys and for contradictions."""
    content = read_mapping_or_list(path)
    if not isinstance(content, dict):
        raise UsageError(f"{path} is not a DeepSpeed configuration: it must be a mapping")
    try:
        found = DeepSpeedConfig.model_validate(_without_auto(content))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    if found.fp16.enabled and found.bf16.enabled:
        raise UsageError(f"{path}: fp16 and bf16 are both enabled; keep one")
    if found.zero_optimization.stage == 0:
        raise UsageError(
            f"{path}: zero_optimization.stage 0 shards nothing; remove use_deepspeed, or use stage 1, 2 or 3"
        )
    return found


def deepspeed_file(training: TrainingConfig) -> DeepSpeedConfig | None:
    """The DeepSpeed file that the settings name.

    Args:
        training: The settings `use_deepspeed` and `deepspeed_config`.

    Returns:
        The file, or None where DeepSpeed is not used or no file is named.

    Raises:
        UsageError: If the file has unknown names or contradicts itself.
    """
    if not training.use_deepspeed or training.deepspeed_config is None:
        return None
    return read_deepspeed(Path(training.deepspeed_config))


def merge_deepspeed(config: RunConfig, deepspeed: DeepSpeedConfig) -> RunConfig:
    """Merge a DeepSpeed file into the settings.

    Args:
        config: The settings. They are not changed.
        deepspeed: The file that `training.deepspeed_config` names.

    Returns:
        The settings with what only the file sets.

    Raises:
        UsageError: If the file and the settings give a setting different values.
    """
    training, file = config.training, _as_settings(deepspeed)
    path = training.deepspeed_config
    given = {
        name: getattr(training, name)
        for name in training.model_fields_set
        if getattr(training, name) is not None
    }
    ours = {name: name for name in given}
    if (
        training.micro_batch_size is None
        and "batch_size" in given
        and file.keys() & {"micro_batch_size", "batch_size"}
    ):
        given["micro_batch_size"] = given.pop("batch_size")  # batch_size alone means that
        ours["micro_batch_size"] = "batch_size"
    for name, (there, value) in file.items():
        if given.get(name, value) != value:
            raise UsageError(
                f"{path}: {there} is {value}, but training.{ours[name]} is {given[name]}; remove one of them"
            )
    merged = {**given, **{name: value for name, (_, value) in file.items()}}
    if "batch_size" in merged and "micro_batch_size" not in merged:
        raise UsageError(
            f"{path}: train_batch_size needs train_micro_batch_size_per_gpu too, or micro_batch_size in the "
            "settings"
        )
    return config.model_copy(update={"training": TrainingConfig(**merged)})


def zero_settings(training: TrainingConfig, deepspeed: DeepSpeedConfig | None) -> dict[str, object]:
    """DeepSpeed's section `zero_optimization`.

    Args:
        training: The setting `zero_stage`.
        deepspeed: The user's file, which may set buffer sizes.

    Returns:
        The section, with our stage.
    """
    sizes = {} if deepspeed is None else deepspeed.zero_optimization.model_dump(exclude_none=True)
    return {**sizes, "stage": training.zero_stage}


def _as_settings(file: DeepSpeedConfig) -> dict[str, tuple[str, object]]:
    """Our name of a setting → its name in the file, and the value."""
    adam = file.optimizer.params if file.optimizer is not None else DeepSpeedOptimizerParameters()
    first, second = adam.betas or (None, None)
    precision = "fp16" if file.fp16.enabled else "bf16" if file.bf16.enabled else None
    given = {
        "micro_batch_size": ("train_micro_batch_size_per_gpu", file.train_micro_batch_size_per_gpu),
        "gradient_accumulation_steps": ("gradient_accumulation_steps", file.gradient_accumulation_steps),
        "batch_size": ("train_batch_size", file.train_batch_size),
        "max_grad_norm": ("gradient_clipping", file.gradient_clipping),
        "optimizer": ("optimizer.type", None if file.optimizer is None else "adamw"),
        "learning_rate": ("optimizer.params.lr", adam.lr),
        "weight_decay": ("optimizer.params.weight_decay", adam.weight_decay),
        "adam_beta1": ("optimizer.params.betas[0]", first),
        "adam_beta2": ("optimizer.params.betas[1]", second),
        "adam_epsilon": ("optimizer.params.eps", adam.eps),
        "precision": (f"{precision}.enabled", precision),
        "zero_stage": ("zero_optimization.stage", file.zero_optimization.stage),
    }
    return {name: (there, value) for name, (there, value) in given.items() if value is not None}


def _without_auto(content: Mapping[str, object]) -> dict[str, object]:
    """The content without values `auto`, which leave the choice to the trainer."""
    return {
        name: _without_auto(value) if isinstance(value, Mapping) else value
        for name, value in content.items()
        if value != "auto"
    }
