"""Training through DeepSpeed's ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054), behind the interface of
Engine.

The run itself stays ours: the order of data, the loss divided by the tokens of all ranks, the schedule, the
checkpoint folder. DeepSpeed gets a configuration that is generated from the settings, because a second file
would contradict them sooner or later. It reduces gradients, shards optimizer state (stage 1), gradients (2)
and weights (3), clips, and updates. It averages gradients over ranks, so each rank's loss is multiplied by
their number, which is exact where that is a power of two.

The arithmetic is the same as everywhere: fp32 weights and autocast, not DeepSpeed's low-precision weights
with fp32 masters. So a checkpoint contains the same tensors under the same names, with AdamW's moments, and
can be resumed without DeepSpeed, and the other way round. DeepSpeed counts AdamW's steps once per group of
parameters; a checkpoint stores the same count for each parameter.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor, nn

from llm_trainer.config import TrainingConfig, UsageError
from llm_trainer.config.resolve.batch_size import BatchPlan
from llm_trainer.config.resolve.deepspeed import DeepSpeedConfig, zero_settings
from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.data.optional_deps import require_extra
from llm_trainer.data.sampling.batch import Batch
from llm_trainer.distributed.dropout_seed import seed_dropout
from llm_trainer.distributed.process_group import ProcessGroup
from llm_trainer.model.hf.checkpoint import empty_model
from llm_trainer.model.surgery.model_state import ModelState
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.engines.autotune import TuneResult, WorkLeft
from llm_trainer.training.engines.compile import CompileMode
from llm_trainer.training.engines.engine import Engine, StepResult
from llm_trainer.training.engines.precision import Precision, PrecisionName
from llm_trainer.training.objectives.objective import ModelWithObjective, Objective
from llm_trainer.training.optim.optimizers import build_optimizers, set_lrs

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine as Zero

Result = TypeVar("Result")
_NEVER = 10**9
_MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedEngine(Engine):
    """Trains through DeepSpeed. Until `start` each rank holds a full replica, into which weights are loaded;
    from then on the model is sharded as the ZeRO stage says.

    Args:
        model: The model.
        training: The settings.
        objective: What is minimised (default: next-token cross-entropy).
        process_group: The ranks.
        device: Where this rank computes.
        batches: Micro-batch size and accumulation per rank.
        file: The user's DeepSpeed file.

    Raises:
        UsageError: For settings that are not supported with DeepSpeed.
    """

    def __init__(
        self,
        model: Transformer,
        training: TrainingConfig,
        objective: Objective | None,
        process_group: ProcessGroup,
        device: torch.device,
        *,
        batches: BatchPlan,
        file: DeepSpeedConfig | None = None,
    ) -> None:
        _check_supported(training, device)
        self._batches, self._file = batches, file
        super().__init__(model, training, objective, process_group, device)
        self._zero: Zero | None = None
        self._full_copy: tuple[Transformer, list[torch.optim.Optimizer]] | None = None
        self._full_copy_update = -1  # the number of updates at which it was made
        self._updates = 0

    def tune(
        self,
        batch: Callable[[], Batch],
        work: WorkLeft,
        *,
        precision: str | None = None,
        compiled: str | None = None,
        cache_dir: Path | None = None,
    ) -> TuneResult:
        """As `Engine.tune`, but nothing is compiled: DeepSpeed replaces the modules that compiled code refers
        to.
        """
        return super().tune(batch, work, precision=precision, compiled="off", cache_dir=cache_dir)

    def start(
        self,
        precision: PrecisionName,
        compile_mode: CompileMode,
        scaler: dict[str, float | int] | None = None,
    ) -> None:
        """As `Engine.start`: passes the model and its optimizer, as loaded so far, to DeepSpeed."""
        if precision == "fp16":
            raise UsageError(_NO_FP16)
        self._is_started, self.compile_mode = True, compile_mode
        self.precision = Precision(precision, self.device)
        before = {
            id(parameter): dict(self.optimizers[0].state.pop(parameter, {})) for parameter in self._parameters
        }
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        with _silence_deepspeed():
            settings = generated_config(
                self.training, self._batches, self.process_group.world_size, precision, self._file
            )
            self._zero = _initialize(self._full_step, self.optimizers[0], settings)
        self._step_module = cast(nn.Module, self._zero)
        self._set_moments({names[key]: state for key, state in before.items()})

    def step(self, batches: Sequence[Batch], tokens: int, *, lr_factor: float, index: int) -> StepResult:
        """As `Engine.step`. DeepSpeed clips and updates, and skips a step with a non-finite gradient on all
        ranks.
        """
        assert self._zero is not None, "start comes before the first step"
        set_lrs(self.optimizers, self._peaks, lr_factor)
        is_empty = torch.full((), float(tokens == 0), device=self.device)
        self.optimizers[0].found_inf = is_empty  # type: ignore[attr-defined]  # with 1, torch's fused AdamW changes nothing
        mean = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches):
            if self.dropout_seed is not None:
                seed_dropout(self.dropout_seed, index, number, self.process_group.rank, self.device)
            self._zero.set_gradient_accumulation_boundary(number == len(batches) - 1)
            total = self._zero(batch.to(self.device)).total / max(tokens, 1)
            mean += total.detach()
            self._zero.backward(total * self.process_group.world_size, scale_wrt_gas=False)
            self._zero.step()
        self._updates += 1
        self.timings.step_done()
        norm = self._zero.get_global_grad_norm()
        skipped = is_empty if self._zero.was_step_applied() else torch.ones_like(is_empty)
        return StepResult(
            self.process_group.all_reduce_tensor(mean),
            torch.as_tensor(norm if norm is not None else float("nan"), device=self.device),
            skipped,
        )

    def check_change(self, shape: ModelConfig) -> NoReturn:
        """Operations cannot change a model that DeepSpeed trains.

        Raises:
            UsageError: Always.
        """
        raise UsageError(
            "use_deepspeed cannot train a model that operations change; remove use_deepspeed (fsdp shards "
            "too)"
        )

    def rebuild(self, state: ModelState) -> None:
        """As `Engine.rebuild`, until `start`.

        Raises:
            UsageError: After `start`.
        """
        if self._zero is not None:
            self.check_change(state.config)
        super().rebuild(state)

    def saved_objects(self) -> tuple[Transformer, Sequence[torch.optim.Optimizer]]:
        """Full copies on the main rank's CPU, gathered one tensor at a time; a model without contents on
        other ranks. A collective call.
        """
        if self._zero is None:
            return super().saved_objects()
        if self._full_copy is None:
            copy = empty_model(self.model.config, device="cpu" if self.process_group.is_main else "meta")
            _copy_frozen(copy, self.model)
            optimizers = build_optimizers(copy, self.training) if self.process_group.is_main else []
            self._full_copy = copy, optimizers
        copy, optimizers = self._full_copy
        if self._full_copy_update != self._updates:  # best, final and periodic saves of a step use one copy
            self._gather(copy, optimizers)
            self._full_copy_update = self._updates
        return copy, optimizers

    def load(self, load: Callable[[Transformer, Sequence[torch.optim.Optimizer]], Result]) -> Result:
        """As `Engine.load`: loads into a model of its own, and copies weights and moments to DeepSpeed."""
        if self._zero is None:
            return super().load(load)
        from deepspeed.utils import safe_set_full_fp32_param

        loaded = empty_model(self.model.config)
        _copy_frozen(loaded, self.model)
        optimizers = build_optimizers(loaded, self.training)
        result = load(loaded, optimizers)
        values = dict(loaded.named_parameters())
        states = {name: dict(optimizers[0].state.get(parameter, {})) for name, parameter in values.items()}
        for name, parameter in self.model.named_parameters():
            value = values[name].detach().to(self.device)
            with _gather_parameter(parameter, 0), torch.no_grad():
                parameter.copy_(value)
            if parameter.requires_grad:
                safe_set_full_fp32_param(parameter, value)
        self._set_moments(states)
        self._full_copy_update = -1
        return result

    def _gather(self, copy: Transformer, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Fill the main rank's copies with the present weights and moments."""
        from deepspeed.utils import safe_get_full_optimizer_state

        targets = dict(copy.named_parameters())
        counted = max(
            (float(self._state_of(flat).get("step", 0.0)) for flat in self._flat_shards()), default=0.0
        )
        for name, parameter in self.model.named_parameters():
            with _gather_parameter(parameter, None), torch.no_grad():
                if self.process_group.is_main:
                    targets[name].copy_(parameter)
            if not parameter.requires_grad or counted == 0:
                continue
            moments = {key: safe_get_full_optimizer_state(parameter, key) for key in _MOMENTS}
            if self.process_group.is_main:
                state = optimizers[0].state[targets[name]]
                state["step"] = torch.tensor(counted)
                state |= {key: value.cpu() for key, value in moments.items()}

    def _set_moments(self, states: dict[str, dict[str, Any]]) -> None:
        """Give DeepSpeed's shards the moments of full parameters, by name. Missing moments are zero."""
        from deepspeed.utils import safe_set_full_optimizer_state

        assert self._zero is not None
        counted = max((float(state["step"]) for state in states.values() if "step" in state), default=0.0)
        for flat in self._flat_shards():
            state = {key: torch.zeros_like(flat) for key in _MOMENTS}
            self.optimizers[0].state[flat] = {"step": torch.full((), counted, device=flat.device), **state}
        link = getattr(self._zero.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            # Stages 1 and 2 find a parameter's moments by views, which they make too early: after the step of
            # the first group.
            self._zero.optimizer._hp_optimizer_states_linked = False
            link()
        for name, parameter in self.model.named_parameters():
            for key in _MOMENTS:
                if (value := states.get(name, {}).get(key)) is not None:
                    safe_set_full_optimizer_state(parameter, value.to(self.device), key)

    def _flat_shards(self) -> list[Tensor]:
        """The fp32 vectors that this rank updates."""
        assert self._zero is not None
        zero = self._zero.optimizer
        return list(
            zero.fp32_partitioned_groups_flat
            if self.training.zero_stage == 3
            else zero.single_partition_of_fp32_groups
        )

    def _state_of(self, flat: Tensor) -> dict[str, Any]:
        return dict(self.optimizers[0].state.get(flat, {}))


_NO_FP16 = (
    "precision fp16 is not supported with use_deepspeed: DeepSpeed has no fp16 on CPUs, and checkpoints do "
    "not store its loss scaling on GPUs; choose precision bf16 or fp32, or remove use_deepspeed"
)


def _check_supported(training: TrainingConfig, device: torch.device) -> None:
    require_extra("deepspeed", "deepspeed", "use_deepspeed")
    if training.precision == "fp16":
        raise UsageError(_NO_FP16)
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"use_deepspeed is not supported on {device.type}; choose device cpu or cuda")
    if training.optimizer != "adamw":
        raise UsageError(
            f"optimizer {training.optimizer} is not supported with use_deepspeed, which flattens the "
            "matrices; choose optimizer adamw"
        )
    for name in ("fsdp", "tensor_parallel", "pipeline_parallel", "context_parallel"):
        if (size := getattr(training, name)) > 1:
            raise UsageError(
                f"{name} {size} cannot be combined with use_deepspeed; keep one of them (zero_stage 3 shards "
                "weights as fsdp does)"
            )
    if training.compile == "on":
        raise UsageError("compile on is not supported with use_deepspeed; remove compile")


def _initialize(
    step: ModelWithObjective,
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
) -> Zero:
    import torch.distributed as dist

    if not dist.is_initialized():  # a single process, not started by a launcher
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed refuses to start without it
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # Only inference uses this extension (an all-reduce in shared memory). It takes half a minute to compile.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed's own calls of torch cause this warning at every collective.
    warnings.filterwarnings(
        "ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning
    )
    return cast(
        "Zero",
        deepspeed.initialize(
            model=step,
            optimizer=optimizer,
            config=settings,
            dist_init_required=False,
        )[0],
    )


def generated_config(
    training: TrainingConfig,
    batches: BatchPlan,
    ranks: int,
    precision: PrecisionName,
    file: DeepSpeedConfig | None = None,
) -> dict[str, Any]:
    """DeepSpeed's configuration, from the settings of a run.

    Args:
        training: The settings.
        batches: Micro-batch size and accumulation per rank.
        ranks: Number of ranks.
        precision: Precision of passes.
        file: The user's DeepSpeed file, which may set buffer sizes.
    """
    return {
        "train_batch_size": batches.sequences_per_step(ranks),
        "train_micro_batch_size_per_gpu": batches.micro_batch_size,
        "gradient_accumulation_steps": batches.gradient_accumulation_steps,
        "gradient_clipping": training.max_grad_norm,
        "zero_optimization": zero_settings(training, file),
        "zero_allow_untested_optimizer": True,  # torch's fused AdamW, which can skip a step
        "zero_force_ds_cpu_optimizer": False,
        # Autocast, but gradients are sent in fp32: modules listed here would send theirs in bf16.
        "torch_autocast": {
            "enabled": precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "steps_per_print": _NEVER,
    }


@contextmanager
def _gather_parameter(parameter: Tensor, writer: int | None) -> Iterator[None]:
    """A context in which the parameter is full on every rank, also with stage 3. Changes by rank `writer` are
    kept.
    """
    import deepspeed

    with deepspeed.zero.GatheredParameters(
        [parameter], modifier_rank=writer, enabled=hasattr(parameter, "ds_id")
    ):
        yield


def _copy_frozen(copy: Transformer, model: Transformer) -> None:
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in copy.named_parameters():
        parameter.requires_grad_(name in trained)


@contextmanager
def _silence_deepspeed() -> Iterator[None]:
    """A context without DeepSpeed's messages below the level of errors."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
