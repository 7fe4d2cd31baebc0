"""How a model is trained: how long, with which rate, optimizer and precision, what is saved and what is
reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from llm_trainer.config.duration import Duration, DurationField, IntervalField
from llm_trainer.config.resolve.precision import PRECISION_SWITCHES, translate_precision
from llm_trainer.config.schema.base import LARGEST_SEED, Section, as_boolean, setting, split_list, switch_word
from llm_trainer.errors import UsageError

SCHEDULE_NAMES = ("lr_scheduler", "lr_schedule", "scheduler", "lr_scheduler_type")


class TrainingConfig(Section):
    """One training run. A step is one optimizer update, everywhere."""

    # How much goes through at once. `llm_trainer.config.resolve.batch_size` turns these into one pair.
    batch_size: int | None = setting(
        None,
        "sequences a micro-batch on one rank; with micro_batch_size given, the whole step's over all ranks",
        unit="sequences",
        gt=0,
    )
    micro_batch_size: Annotated[int, Field(gt=0)] | Literal["auto"] | None = setting(
        None,
        "sequences that one rank sends through the model at once; auto: as many as fit, the step stays the same",
        unit="sequences",
    )
    gradient_accumulation_steps: int | None = setting(
        None,
        "micro-batches a step on each rank",
        unit="micro-batches",
        aliases=("grad_accum", "accumulation_steps"),
        gt=0,
    )
    global_grad_accumulation: bool = setting(
        False, "gradient_accumulation_steps counts all ranks together, as nanoGPT's files mean it"
    )
    eval_batch_size: int | None = setting(
        None, "sequences at once in validation; none: as micro_batch_size", unit="sequences", gt=0
    )

    # How long.
    max_steps: int | None = setting(
        None, "end after this many steps", unit="steps", aliases=("max_iters", "num_steps"), ge=0
    )
    num_epochs: float | None = setting(
        None,
        "end after so many passes over the data",
        unit="epochs",
        aliases=("epochs", "num_train_epochs"),
        gt=0,
    )
    max_tokens: int | None = setting(
        None, "end after so many training tokens", unit="tokens", aliases=("max_train_tokens",), gt=0
    )
    max_minutes: float | None = setting(
        None, "end after so many minutes of this process, saving", unit="minutes", gt=0
    )

    # Learning rate.
    learning_rate: float = setting(3e-4, "peak learning rate", aliases=("lr", "max_lr"), ge=0)
    min_learning_rate: float | None = setting(
        None, "learning rate at the end of the decay; none: a tenth of the peak", aliases=("min_lr",), ge=0
    )
    lr_scheduler: Literal["cosine", "linear", "constant", "wsd"] = setting(
        "cosine",
        "shape of the decay (wsd: flat, then down at the end)",
        aliases=SCHEDULE_NAMES[1:],
        spellings=("decay_lr",),
    )
    warmup_steps: DurationField | None = setting(
        None,
        "rise of the rate from zero; none: 2000 steps, or a tenth of a shorter run",
        unit="steps, epochs or tokens",
        aliases=("warmup_iters",),
    )
    lr_decay_steps: DurationField | None = setting(
        None,
        "where the decay reaches its end; none: where the run ends",
        unit="steps, epochs or tokens",
        aliases=("lr_decay_iters",),
    )
    wsd_decay_fraction: float = setting(
        0.2, "wsd: share of the run that decays", aliases=("cooldown_fraction",), gt=0, le=1
    )
    lr_on_resume: Literal["extend", "rewarm", "keep"] | None = setting(
        None,
        "on a resume that moves the run's end: stretch the decay to it, warm up again from here, or keep the old decay",
        aliases=("horizon",),
    )

    lr_multipliers: dict[str, Annotated[float, Field(ge=0)]] = setting(
        dict,
        "part, range or glob (attn.0-3, mlp.*, wte) → what its learning rate is multiplied by",
        aliases=("lr_factors",),
    )
    layerwise_lr_decay: float = setting(
        1.0,
        "learning rates fall by this factor a layer from the head down to the embeddings",
        aliases=("layer_decay", "llrd"),
        gt=0,
        le=1,
    )
    freeze_layers: list[str] = setting(
        list,
        "parts that are not trained: names, ranges (attn.0-3), globs (mlp.*)",
        aliases=("frozen_layers", "freeze_parts"),
    )

    # Optimizer.
    optimizer: Literal["adamw", "muon"] = setting(
        "adamw", "adamw, or muon for the blocks' matrices with adamw for the rest"
    )
    weight_decay: float = setting(0.1, "decoupled decay, on matrices only", ge=0)
    adam_beta1: float = setting(0.9, "decay of AdamW's first moment", aliases=("beta1",), ge=0, lt=1)
    adam_beta2: float = setting(0.95, "decay of AdamW's second moment", aliases=("beta2",), ge=0, lt=1)
    adam_epsilon: float = setting(1e-8, "added to AdamW's denominator", aliases=("eps", "epsilon"), gt=0)
    muon_learning_rate: float = setting(
        0.02,
        "peak rate of the matrices under muon; follows the same schedule",
        aliases=("muon_lr", "matrix_lr"),
        ge=0,
    )
    muon_momentum: float = setting(0.95, "muon's momentum", ge=0, lt=1)
    max_grad_norm: float = setting(
        1.0,
        "gradients are scaled down to this norm; 0: never",
        aliases=("grad_clip", "gradient_clip", "clip_grad_norm"),
        ge=0,
    )
    max_skipped_steps: int = setting(
        10, "stop after so many steps in a row with a non-finite loss or gradient", unit="steps", ge=1
    )

    # Loss spikes; see `llm_trainer.training.loss_spikes`.
    max_rollbacks: int = setting(
        0,
        "at a loss spike go back to a checkpoint before it and leave out the data since, at most so often; 0: never",
        ge=0,
    )
    spike_sigma: float = setting(
        6.0, "a loss so many standard deviations above the mean of the window is an outlier", gt=0
    )
    spike_window: int = setting(
        128, "steps that mean and deviation are taken over; half of them must have been", unit="steps", ge=4
    )
    spike_patience: int = setting(4, "outliers in a row that are a spike", unit="steps", ge=1)
    spike_rollback_steps: int = setting(
        100,
        "go back to at least so long before the spike, where such a checkpoint is kept",
        unit="steps",
        ge=0,
    )
    spike_lr_factor: float = setting(
        1.0, "the learning rate is multiplied by this at each rollback", gt=0, le=1
    )

    # Arithmetic.
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto",
        "arithmetic of the forward pass; weights and optimizer stay fp32",
        aliases=("dtype", "amp_dtype", "mixed_precision_dtype"),
        spellings=PRECISION_SWITCHES,
    )
    compile: Literal["auto", "on", "off"] = setting(
        "auto",
        "torch.compile",
        aliases=("compile_model", "torch_compile"),
        paths=("computational_efficiency.use_model_compiler",),
    )
    loss: Literal["auto", "dense", "chunked"] = setting(
        "auto",
        "cross-entropy with all logits at once, or in chunks that never hold them all",
        aliases=("cross_entropy",),
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")

    # Memory; see `llm_trainer.training.memory.batch_size_finder` and `watching`.
    memory_limit_gb: float | None = setting(
        None,
        "memory that one rank may hold; none: what is free on its GPU, or its part of what is free on the machine",
        unit="GB",
        gt=0,
    )
    memory_target_fraction: float = setting(
        0.9, "share of it that micro_batch_size auto fills at most", gt=0, le=1
    )
    offload_optimizer: bool = setting(
        False,
        "keep the optimizer's state in host memory between updates",
        aliases=("cpu_offload", "offload_optimizer_state"),
    )
    memory_warning_fraction: float = setting(0.85, "warn when so large a share of the memory is used", gt=0)
    memory_emergency_fraction: float = setting(
        0.95, "save an emergency checkpoint when so large a share of the memory is used", gt=0
    )
    memory_poll_seconds: float = setting(
        10.0, "look at memory this often between reports; 0: only with them", unit="seconds", ge=0
    )

    # Validation, saving, reporting.
    eval_interval: IntervalField = setting(
        lambda: Duration(1000), "validate this often", unit="steps, epochs or tokens", aliases=("eval_steps",)
    )
    eval_iters: int | None = setting(
        None,
        "validate on so many batches spread over the set; none: on every window",
        unit="batches",
        aliases=("eval_batches",),
        gt=0,
    )
    eval_only: bool = setting(False, "validate once and leave")
    eval_at_start: bool = setting(False, "validate before the first step")
    early_stopping_patience: int | None = setting(
        None,
        "stop after so many validations without a better loss",
        unit="validations",
        aliases=("patience",),
        gt=0,
    )
    early_stopping_min_delta: float = setting(0.0, "what counts as better", unit="nats", ge=0)
    save_interval: IntervalField | None = setting(
        lambda: Duration(1000),
        "save a checkpoint this often; none: only at the end",
        unit="steps, epochs or tokens",
        aliases=("save_steps",),
    )
    save_minutes: float | None = setting(
        None, "also save when so many minutes have passed since the last save", unit="minutes", gt=0
    )
    always_save_checkpoint: bool = setting(False, "save a checkpoint at every validation")
    save_total_limit: int | None = setting(
        3,
        "keep the newest so many checkpoints (the best model and the last one are always kept)",
        unit="checkpoints",
        gt=0,
    )
    ephemeral_save_interval: IntervalField | None = setting(
        None,
        "also save this often, as recent-<step>, which the next of its kind replaces; none: no such saves",
        unit="steps, epochs or tokens",
    )
    ephemeral_save_limit: int = setting(
        1, "keep the newest so many of the recent ones", unit="checkpoints", gt=0
    )
    asynchronous_saves: Literal["auto", "on", "off"] = setting(
        "auto",
        "write checkpoints in the background, from copies in host memory; auto: from 64 MB, where training leaves a core and the memory",
        aliases=("async_save", "async_checkpointing"),
    )
    logging_steps: int = setting(10, "report this often", unit="steps", aliases=("log_interval",), gt=0)
    report_to: list[Literal["tensorboard", "wandb"]] = setting(
        lambda: ["tensorboard"], "where metrics go beside metrics.jsonl", spellings=("wandb_log",)
    )
    wandb_project: str | None = setting(None, "project on Weights & Biases")
    wandb_run_name: str | None = setting(None, "run name on Weights & Biases", aliases=("run_name",))
    file_logging: bool = setting(True, "write logs/train.log in the run folder")

    # Where from, where to.
    output_dir: str = setting("checkpoints", "run folder", aliases=("save_dir", "checkpoint_dir", "out_dir"))
    remote_dir: str | None = setting(
        None,
        "address (s3://bucket/run, …) where checkpoints are uploaded and resumed from; output_dir may be such an address too",
    )
    init_from: str = setting(
        "scratch",
        "scratch, resume, or the name or folder of a pretrained model (gpt2, gpt2-xl, …)",
        aliases=("model_path", "pretrained_model"),
    )
    transfer_from: str | None = setting(
        None,
        "a pretrained model of which what fits is taken into this run's own shape, with a report",
        aliases=("partial_init_from",),
    )
    adapter_from: str | None = setting(
        None,
        "with pretrained weights in init_from: a folder of PEFT's whose low-rank adapter the run goes on training",
    )
    quantize_base: Literal["off", "nf4"] = setting(
        "off",
        "nf4: the frozen matrices of blocks under adapters in four bits (QLoRA, arXiv:2305.14314), an extra; on one rank",
    )
    transfer_modules: list[str] = setting(
        lambda: ["*"], "with transfer_from: the parts that are taken (names, ranges, globs)"
    )
    resume_from: str | None = setting(
        None,
        "continue this checkpoint or run folder; auto: the newest in output_dir, if any",
        aliases=("resume", "resume_from_checkpoint", "checkpoint"),
        bare="auto",
    )
    seed: int = setting(1337, "of weights, dropout and data order", ge=0, le=LARGEST_SEED)
    num_workers: int = setting(
        1,
        "threads that prepare batches ahead; 0: none",
        unit="threads",
        aliases=("dataloader_num_workers",),
        ge=0,
    )

    # Many machines; checked against the launcher's.
    world_size: int | None = setting(None, "number of ranks", unit="ranks", gt=0)
    data_parallel: int | None = setting(
        None, "replicas of the model; none: as many as the ranks make", unit="ranks", gt=0
    )
    fsdp: int = setting(
        1,
        "ranks that share one replica's weights, gradients and optimizer state (FSDP)",
        unit="ranks",
        aliases=("fsdp_size",),
        gt=0,
    )
    tensor_parallel: int = setting(
        1,
        "ranks that share each block's matrices by columns and rows",
        unit="ranks",
        aliases=("tensor_parallel_size", "tp_size"),
        gt=0,
    )
    pipeline_parallel: int = setting(
        1,
        "stages of layers, each on ranks of its own",
        unit="stages",
        aliases=("pipeline_parallel_size", "pp_size"),
        gt=0,
    )
    pipeline_schedule: Literal["gpipe", "1f1b", "interleaved"] = setting(
        "1f1b", "order of micro-batches in a pipeline; interleaved: two stages on each rank"
    )
    context_parallel: int = setting(
        1,
        "ranks that share each sequence, and its replica's state as fsdp does",
        unit="ranks",
        aliases=("cp_size",),
        gt=0,
    )
    rank_timeout_seconds: float = setting(
        8.0, "a rank that has not been heard of for so long ends the run", unit="seconds", ge=2
    )
    distributed_backend: Literal["auto", "nccl", "gloo"] = setting(
        "auto", "communication library", aliases=("backend",)
    )
    use_deepspeed: bool = setting(False, "train through DeepSpeed, an extra")
    zero_stage: Literal[1, 2, 3] = setting(
        2,
        "through DeepSpeed, what ranks keep in parts: 1 the optimizer's state, 2 gradients too, 3 weights too",
    )
    deepspeed_config: str | None = setting(
        None, "DeepSpeed's own file, which may say what no other source does"
    )

    # Features with sections of their own.
    use_domain_specific_data: bool = setting(False, "train on the prepared domains, mixed by their weights")
    domain_data_dir: str | None = setting(None, "where the domains were prepared; none: data/domain_specific")
    use_knowledge_distillation: bool = setting(False, "learn from a teacher", owed=True)
    teacher_model_path: str | None = setting(
        None, "the teacher", paths=("knowledge_distillation.teacher_model_path",), owed=True
    )
    use_computational_efficiency: bool = setting(False, "apply the section computational_efficiency")
    use_adaptive_reasoning: bool = setting(
        False, "early exits", paths=("adaptive_reasoning.enabled",), owed=True
    )
    scaling_schedule_file: str | None = setting(
        None,
        "YAML or JSON list of operations that change the run while it trains",
        aliases=("scaling_schedule",),
    )

    @classmethod
    def translate(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """`fp16`, `use_amp` and friends set precision; compile takes booleans; `decay_lr` and `wandb_log` are
        switches.
        """
        settled = dict(values)
        translate_precision(settled)
        for name in ("compile", "compile_model", "torch_compile"):
            settled |= {name: switch_word(settled[name])} if name in settled else {}
        _translate_decay(settled)
        _translate_wandb(settled)
        return settled


def _translate_decay(values: dict[str, Any]) -> None:
    """nanoGPT's `decay_lr`: false is the constant schedule, true any other."""
    if "decay_lr" not in values:
        return
    decays = as_boolean("decay_lr", values.pop("decay_lr"))
    name = next((name for name in SCHEDULE_NAMES if name in values), None)
    if name is None:
        values["lr_scheduler"] = "cosine" if decays else "constant"
    elif (values[name] != "constant") != decays:
        raise UsageError(f"decay_lr={decays} and {name}={values[name]!r} contradict each other; keep one")


def _translate_wandb(values: dict[str, Any]) -> None:
    """nanoGPT's `wandb_log` adds `wandb` to `report_to`, or takes it away."""
    if "wandb_log" not in values:
        return
    logs = as_boolean("wandb_log", values.pop("wandb_log"))
    said = values.get("report_to")
    reporters = ["tensorboard"] if said is None else split_list(said) if isinstance(said, str) else said
    if not isinstance(reporters, (list, tuple)) or not all(isinstance(name, str) for name in reporters):
        return  # the field says what is wrong with it
    if said is not None and not logs and "wandb" in reporters:
        raise UsageError(f"wandb_log=False and report_to={said!r} contradict each other; keep one")
    values["report_to"] = [*dict.fromkeys([*reporters, *(["wandb"] if logs else [])])]
