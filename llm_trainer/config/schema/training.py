"""How a model is trained: batch size, length, learning rate, optimizer, precision, checkpoints, logging."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from llm_trainer.config.duration import Duration, DurationField, IntervalField
from llm_trainer.config.resolve.precision import PRECISION_SWITCHES, translate_precision
from llm_trainer.config.resolve.trainer_names import (
    CPU_SWITCHES,
    EVAL_STRATEGIES,
    SAVE_STRATEGIES,
    translate_training_arguments,
)
from llm_trainer.config.schema.base import MAX_SEED, Section, as_boolean, on_or_off, setting, split_list
from llm_trainer.errors import UsageError

_RESUME_NAMES = ("resume_from", "resume", "resume_from_checkpoint", "checkpoint")
SCHEDULER_NAMES = ("lr_scheduler", "lr_schedule", "scheduler", "lr_scheduler_type")


class TrainingConfig(Section):
    """One training run. A step is always one optimizer update."""

    help_heading: ClassVar[str] = "Training"

    # `llm_trainer.config.resolve.batch_size` turns these into a micro-batch size and a number of accumulation
    # steps.
    batch_size: int | None = setting(
        None,
        "Micro-batch size per rank, in sequences. If micro_batch_size is set too: batch size of the whole "
        "step, over all ranks.",
        unit="sequences",
        common=True,
        gt=0,
    )
    micro_batch_size: Annotated[int, Field(gt=0)] | Literal["auto"] | None = setting(
        None,
        "Micro-batch size per rank, in sequences; batch_size is then that of the whole step. auto: the "
        "largest that fits in memory, with the same step.",
        unit="sequences",
        aliases=("per_device_train_batch_size",),
    )
    gradient_accumulation_steps: int | None = setting(
        None,
        "Number of micro-batches per step on each rank.",
        unit="micro-batches",
        aliases=("grad_accum", "accumulation_steps"),
        common=True,
        gt=0,
    )
    global_grad_accumulation: bool = setting(
        False,
        "Count gradient_accumulation_steps over all ranks together, as nanoGPT's configuration files do.",
    )
    eval_batch_size: int | None = setting(
        None,
        "Batch size per rank in validation. Unset: the micro-batch size.",
        unit="sequences",
        aliases=("per_device_eval_batch_size",),
        heading="Evaluation",
        gt=0,
    )

    max_steps: int | None = setting(
        None,
        "Number of steps to train for.",
        unit="steps",
        aliases=("max_iters", "num_steps"),
        common=True,
        heading="Training",
        ge=0,
    )
    num_epochs: float | None = setting(
        None,
        "Number of passes over the training data.",
        unit="epochs",
        aliases=("epochs", "num_train_epochs"),
        common=True,
        gt=0,
    )
    max_tokens: int | None = setting(
        None,
        "Number of tokens to train on.",
        unit="tokens",
        aliases=("max_train_tokens",),
        gt=0,
    )
    max_minutes: float | None = setting(
        None,
        "Save a checkpoint and stop when this process has trained for this long.",
        unit="minutes",
        gt=0,
    )

    learning_rate: float = setting(
        3e-4, "Peak learning rate.", aliases=("lr", "max_lr"), common=True, heading="Learning rate", ge=0
    )
    min_learning_rate: float | None = setting(
        None,
        "Learning rate at the end of the decay. Unset: a tenth of the peak.",
        aliases=("min_lr",),
        ge=0,
    )
    lr_scheduler: Literal["cosine", "linear", "constant", "wsd"] = setting(
        "cosine",
        "Learning rate schedule after the warm-up (wsd: warmup-stable-decay).",
        aliases=SCHEDULER_NAMES[1:],
        shorthands=("decay_lr",),
    )
    warmup_steps: DurationField | None = setting(
        None,
        "Length of the linear warm-up from zero. Unset: 2000 steps, or a tenth of a shorter run.",
        unit="steps, epochs or tokens",
        aliases=("warmup_iters",),
        common=True,
    )
    lr_decay_steps: DurationField | None = setting(
        None,
        "Point of the run at which the decay ends. Unset: the end of the run.",
        unit="steps, epochs or tokens",
        aliases=("lr_decay_iters",),
    )
    wsd_decay_fraction: float = setting(
        0.2,
        "With lr_scheduler wsd: fraction of the run in which the learning rate decays.",
        aliases=("cooldown_fraction",),
        gt=0,
        le=1,
    )
    lr_on_resume: Literal["extend", "rewarm", "keep"] | None = setting(
        None,
        "What happens to the learning rate when a resumed run ends at another step: extend stretches the "
        "decay to the new end, rewarm warms up again from here and decays to the new end, keep leaves the "
        "decay as it was.",
        aliases=("horizon",),
    )
    lr_multipliers: dict[str, Annotated[float, Field(ge=0)]] = setting(
        dict,
        "Learning rate multipliers by module, range or glob (attn.0-3, mlp.*, wte).",
        aliases=("lr_factors",),
    )
    layerwise_lr_decay: float = setting(
        1.0,
        "Factor by which the learning rate decreases per layer, from the head down to the embeddings.",
        aliases=("layer_decay", "llrd"),
        gt=0,
        le=1,
    )
    freeze_layers: list[str] = setting(
        list,
        "Modules that are not trained: names, ranges (attn.0-3) or globs (mlp.*).",
        aliases=("frozen_layers", "freeze_parts"),
        heading="Training",
    )

    optimizer: Literal["adamw", "muon"] = setting(
        "adamw",
        "Optimizer: adamw, or muon for the matrices of blocks with adamw for all other parameters.",
        aliases=("optim",),
        heading="Optimizer",
        common=True,
    )
    weight_decay: float = setting(0.1, "Decoupled weight decay, applied to matrices only.", common=True, ge=0)
    adam_beta1: float = setting(0.9, "Decay rate of AdamW's first moment.", aliases=("beta1",), ge=0, lt=1)
    adam_beta2: float = setting(0.95, "Decay rate of AdamW's second moment.", aliases=("beta2",), ge=0, lt=1)
    adam_epsilon: float = setting(
        1e-8, "Value added to AdamW's denominator.", aliases=("eps", "epsilon"), gt=0
    )
    muon_learning_rate: float = setting(
        0.02,
        "Peak learning rate of the matrices that Muon trains; it follows the same schedule.",
        aliases=("muon_lr", "matrix_lr"),
        ge=0,
    )
    muon_momentum: float = setting(0.95, "Momentum of Muon.", ge=0, lt=1)
    max_grad_norm: float = setting(
        1.0,
        "Clip the gradient norm to this value. 0: no clipping.",
        aliases=("grad_clip", "gradient_clip", "clip_grad_norm"),
        ge=0,
    )

    max_skipped_steps: int = setting(
        10,
        "Stop after this many steps in a row whose loss or gradient is not finite.",
        unit="steps",
        heading="Loss spikes",
        ge=1,
    )
    # See `llm_trainer.training.loss_spikes`.
    max_rollbacks: int = setting(
        0,
        "Number of times that a loss spike may roll the run back to an earlier checkpoint; the data since "
        "then is skipped. 0: no rollbacks.",
        ge=0,
    )
    spike_sigma: float = setting(
        6.0, "Standard deviations above the window's mean at which a loss is an outlier.", gt=0
    )
    spike_window: int = setting(
        128,
        "Number of steps over which mean and deviation are taken; detection starts when half of them have "
        "run.",
        unit="steps",
        ge=4,
    )
    spike_patience: int = setting(
        4, "Number of outliers in a row that count as a loss spike.", unit="steps", ge=1
    )
    spike_rollback_steps: int = setting(
        100,
        "Roll back to a checkpoint at least this long before the spike, if there is one.",
        unit="steps",
        ge=0,
    )
    spike_lr_factor: float = setting(
        1.0, "Factor by which the learning rate is multiplied at each rollback.", gt=0, le=1
    )

    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto",
        "Precision of the forward pass (autocast); weights and optimizer state stay in fp32.",
        aliases=("dtype", "amp_dtype", "mixed_precision_dtype"),
        shorthands=PRECISION_SWITCHES,
        heading="Device and precision",
        common=True,
    )
    compile: Literal["auto", "on", "off"] = setting(
        "auto",
        "Compile the model with torch.compile.",
        aliases=("compile_model", "torch_compile"),
        dotted_aliases=("computational_efficiency.use_model_compiler",),
        common=True,
    )
    autotune: bool = setting(
        False,
        "Measure on this machine what `precision: auto` and `compile: auto` should be, instead of deriving "
        "it from the hardware and the model's shape. Two runs of one command may then choose differently.",
    )
    loss: Literal["auto", "dense", "chunked"] = setting(
        "auto",
        "Compute the cross-entropy from all logits at once (dense), or in chunks that need less memory.",
        aliases=("cross_entropy",),
    )
    device: str = setting(
        "auto", "Device: auto, cpu, cuda, cuda:N or mps.", shorthands=CPU_SWITCHES, common=True
    )

    # See `llm_trainer.training.memory.batch_size_finder` and `memory_monitor`.
    memory_limit_gb: float | None = setting(
        None,
        "Memory that one rank may use. Unset: the free memory of its GPU, or its fraction of the machine's.",
        unit="GB",
        heading="Memory",
        gt=0,
    )
    memory_target_fraction: float = setting(
        0.9, "Largest fraction of the memory that micro_batch_size auto may fill.", gt=0, le=1
    )
    offload_optimizer: bool = setting(
        False,
        "Keep the optimizer state in host memory between updates.",
        aliases=("cpu_offload", "offload_optimizer_state"),
    )
    memory_warning_fraction: float = setting(
        0.85, "Print a warning when this fraction of the memory is used.", gt=0
    )
    memory_emergency_fraction: float = setting(
        0.95, "Save an emergency checkpoint when this fraction of the memory is used.", gt=0
    )
    memory_poll_seconds: float = setting(
        10.0,
        "Check memory this often between log lines. 0: only when a line is logged.",
        unit="seconds",
        ge=0,
    )

    eval_interval: IntervalField = setting(
        lambda: Duration(1000),
        "Interval between validations.",
        unit="steps, epochs or tokens",
        aliases=("eval_steps",),
        shorthands=EVAL_STRATEGIES,
        common=True,
        heading="Evaluation",
    )
    eval_iters: int | None = setting(
        None,
        "Number of batches per validation, spread over the validation set. Unset: the whole set.",
        unit="batches",
        aliases=("eval_batches",),
        gt=0,
    )
    eval_only: bool = setting(False, "Validate once and exit.")
    eval_at_start: bool = setting(False, "Validate before the first step.", aliases=("eval_on_start",))
    early_stopping_patience: int | None = setting(
        None,
        "Stop after this many validations without a better loss. Unset: no early stopping.",
        unit="validations",
        aliases=("patience",),
        gt=0,
    )
    early_stopping_min_delta: float = setting(
        0.0, "Smallest decrease of the validation loss that counts as better.", unit="nats", ge=0
    )
    save_interval: IntervalField | None = setting(
        lambda: Duration(1000),
        "Interval between checkpoints. none: save only at the end.",
        unit="steps, epochs or tokens",
        aliases=("save_steps",),
        shorthands=SAVE_STRATEGIES,
        common=True,
        heading="Checkpoints",
    )
    save_minutes: float | None = setting(
        None, "Also save when this much time has passed since the last checkpoint.", unit="minutes", gt=0
    )
    always_save_checkpoint: bool = setting(False, "Save a checkpoint at every validation.")
    save_total_limit: int | None = setting(
        3,
        "Number of newest checkpoints that are kept, in addition to the best and the last. none: all.",
        unit="checkpoints",
        gt=0,
    )
    ephemeral_save_interval: IntervalField | None = setting(
        None,
        "Interval between additional, short-lived checkpoints (recent-<step>), each of which replaces an "
        "earlier one. "
        "Unset: no such checkpoints.",
        unit="steps, epochs or tokens",
    )
    ephemeral_save_limit: int = setting(
        1, "Number of newest short-lived checkpoints that are kept.", unit="checkpoints", gt=0
    )
    asynchronous_saves: Literal["auto", "on", "off"] = setting(
        "auto",
        "Write checkpoints in the background, from copies in host memory. auto: for states of 64 MB or "
        "more, where training leaves a core and the memory free.",
        aliases=("async_save", "async_checkpointing"),
    )
    logging_steps: int = setting(
        10,
        "Interval between log lines.",
        unit="steps",
        aliases=("log_interval",),
        heading="Logging",
        gt=0,
    )
    report_to: list[Literal["tensorboard", "wandb"]] = setting(
        lambda: ["tensorboard"],
        "Where metrics are logged, in addition to metrics.jsonl.",
        shorthands=("wandb_log",),
    )
    wandb_project: str | None = setting(None, "Project on Weights & Biases.")
    wandb_run_name: str | None = setting(None, "Name of the run on Weights & Biases.", aliases=("run_name",))
    file_logging: bool = setting(True, "Write logs/train.log in the run folder.")

    output_dir: str = setting(
        "checkpoints",
        "Run folder: checkpoints, logs and metrics are written to it.",
        aliases=("save_dir", "checkpoint_dir", "out_dir"),
        common=True,
        heading="Checkpoints",
    )
    remote_dir: str | None = setting(
        None,
        "Address (s3://bucket/run, …) to which checkpoints are uploaded and from which they are resumed. "
        "output_dir may be such an address too.",
    )
    init_from: str = setting(
        "scratch",
        "Initial weights: scratch, resume, or the name or folder of a pretrained model (gpt2, gpt2-xl, …).",
        aliases=("model_path", "pretrained_model"),
        common=True,
    )
    transfer_from: str | None = setting(
        None,
        "Pretrained model whose matching weights are loaded into a model of another shape; a report lists "
        "them.",
        aliases=("partial_init_from",),
        heading="Transfer",
    )
    adapter_from: str | None = setting(
        None,
        "With pretrained weights in init_from: PEFT folder of a LoRA adapter that this run trains further.",
    )
    quantize_base: Literal["off", "nf4"] = setting(
        "off",
        "nf4: keep the frozen matrices of blocks under adapters in four bits (QLoRA, arXiv:2305.14314). "
        "Needs the extra 'quantize' and runs on one rank.",
    )
    transfer_modules: list[str] = setting(
        lambda: ["*"], "With transfer_from: modules that are loaded (names, ranges, globs)."
    )
    resume_from: str | None = setting(
        None,
        "Checkpoint or run folder to resume. auto: the newest checkpoint in output_dir, if there is one.",
        aliases=_RESUME_NAMES[1:],
        bare_value="auto",
        common=True,
        heading="Checkpoints",
    )
    seed: int = setting(
        1337,
        "Random seed for weight initialization, dropout and data order.",
        heading="Training",
        ge=0,
        le=MAX_SEED,
    )
    num_workers: int = setting(
        1,
        "Number of threads that prepare batches in advance. 0: none.",
        unit="threads",
        aliases=("dataloader_num_workers",),
        ge=0,
    )

    world_size: int | None = setting(
        None,
        "Number of ranks, checked against that of the launcher.",
        unit="ranks",
        heading="Distributed training",
        gt=0,
    )
    data_parallel: int | None = setting(
        None,
        "Number of replicas of the model. Unset: as many as the number of ranks allows.",
        unit="ranks",
        gt=0,
    )
    fsdp: int = setting(
        1,
        "Number of ranks over which a replica's weights, gradients and optimizer state are sharded (FSDP).",
        unit="ranks",
        aliases=("fsdp_size",),
        gt=0,
    )
    tensor_parallel: int = setting(
        1,
        "Number of ranks over which the matrices of each block are sharded, by columns and rows.",
        unit="ranks",
        aliases=("tensor_parallel_size", "tp_size"),
        gt=0,
    )
    pipeline_parallel: int = setting(
        1,
        "Number of pipeline stages; the stages run on different ranks.",
        unit="stages",
        aliases=("pipeline_parallel_size", "pp_size"),
        gt=0,
    )
    pipeline_schedule: Literal["gpipe", "1f1b", "interleaved"] = setting(
        "1f1b", "Order of micro-batches in a pipeline. interleaved: two stages on each rank."
    )
    context_parallel: int = setting(
        1,
        "Number of ranks over which each sequence is sharded; the replica's state is sharded over them too.",
        unit="ranks",
        aliases=("cp_size",),
        gt=0,
    )
    rank_timeout_seconds: float = setting(
        8.0, "Abort the run when a rank has sent no heartbeat for this long.", unit="seconds", ge=2
    )
    distributed_backend: Literal["auto", "nccl", "gloo"] = setting(
        "auto", "Communication library between ranks.", aliases=("backend", "ddp_backend")
    )
    use_deepspeed: bool = setting(False, "Train with DeepSpeed (extra 'deepspeed').")
    zero_stage: Literal[1, 2, 3] = setting(
        2,
        "With DeepSpeed: what is sharded over the ranks. 1: optimizer state, 2: also gradients, 3: also "
        "weights.",
    )
    deepspeed_config: str | None = setting(
        None,
        "DeepSpeed configuration file. It may set what no other source sets.",
    )

    use_domain_specific_data: bool = setting(
        False, "Train on the prepared domains, mixed by their weights.", heading="Features"
    )
    domain_data_dir: str | None = setting(
        None, "Folder of the prepared domains. Unset: data/domain_specific."
    )
    use_knowledge_distillation: bool = setting(False, "Learn from a teacher model.", not_implemented=True)
    teacher_model_path: str | None = setting(
        None,
        "The teacher model.",
        dotted_aliases=("knowledge_distillation.teacher_model_path",),
        not_implemented=True,
    )
    use_computational_efficiency: bool = setting(
        False, "Apply the settings of the section computational_efficiency."
    )
    use_adaptive_reasoning: bool = setting(
        False,
        "Use early exits.",
        dotted_aliases=("adaptive_reasoning.enabled",),
        not_implemented=True,
    )
    scaling_schedule_file: str | None = setting(
        None,
        "YAML or JSON list of operations that change the model or the run during training.",
        aliases=("scaling_schedule",),
    )

    @classmethod
    def translate(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Translate `fp16`, `use_amp` and the like to `precision`, booleans of `compile` and `resume_from`,
        names and values of transformers' `TrainingArguments`, `decay_lr` and `wandb_log`.
        """
        translated = dict(values)
        translate_precision(translated)
        for name in ("compile", "compile_model", "torch_compile"):
            translated |= {name: on_or_off(translated[name])} if name in translated else {}
        for name in _RESUME_NAMES:
            if isinstance(value := translated.get(name), bool):
                translated[name] = "auto" if value else None
        translate_training_arguments(translated, SCHEDULER_NAMES)
        _translate_decay(translated)
        _translate_wandb(translated)
        return translated


def _translate_decay(values: dict[str, Any]) -> None:
    """nanoGPT's `decay_lr`: false is the constant schedule, true any other one."""
    if "decay_lr" not in values:
        return
    decays = as_boolean("decay_lr", values.pop("decay_lr"))
    name = next((name for name in SCHEDULER_NAMES if name in values), None)
    if name is None:
        values["lr_scheduler"] = "cosine" if decays else "constant"
    elif (values[name] != "constant") != decays:
        raise UsageError(f"decay_lr={decays} and {name}={values[name]!r} contradict each other; keep one")


def _translate_wandb(values: dict[str, Any]) -> None:
    """nanoGPT's `wandb_log` adds `wandb` to `report_to`, or takes it away."""
    if "wandb_log" not in values:
        return
    logs = as_boolean("wandb_log", values.pop("wandb_log"))
    given = values.get("report_to")
    reporters = ["tensorboard"] if given is None else split_list(given) if isinstance(given, str) else given
    if not isinstance(reporters, (list, tuple)) or not all(isinstance(name, str) for name in reporters):
        return  # validation of the field reports what is wrong
    if given is not None and not logs and "wandb" in reporters:
        raise UsageError(f"wandb_log=False and report_to={given!r} contradict each other; keep one")
    values["report_to"] = [*dict.fromkeys([*reporters, *(["wandb"] if logs else [])])]
