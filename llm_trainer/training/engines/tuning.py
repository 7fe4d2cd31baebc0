"""One choice of precision and compilation for all ranks: measured by the main one, taken over by the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, cast

import torch

from llm_trainer.config import TrainingConfig
from llm_trainer.distributed.parallelize import is_sharded
from llm_trainer.distributed.process_group import Ranks
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.engines.autotune import Choice
from llm_trainer.training.engines.compile import CompileMode, compile_model
from llm_trainer.training.engines.precision import PrecisionName

if TYPE_CHECKING:
    from llm_trainer.training.trainer import Trainer


def tuned(trainer: Trainer) -> Choice:
    """Precision and compilation of a run: as said, as before a resume, or as the main rank's machine does it
    fastest.
    """
    state, batches = trainer.state, trainer.batches
    if trainer.training.eval_only:
        return Choice(cast(PrecisionName, state.precision or trainer.engine.precision.name), "off")
    steps_left = max(0, trainer.length.steps - state.step)
    return trainer.engine.tune(
        lambda: trainer.sampler.batch(state.samples, batches.micro_batch_size),
        steps_left * batches.gradient_accumulation_steps,
        precision=state.precision,
        compiled=state.compile,
        cache_dir=trainer.cache_dir,
        say=trainer.say,
    )


def agreed_choice(
    model: Transformer,
    training: TrainingConfig,
    ranks: Ranks,
    device: torch.device,
    measure: Callable[[], Choice],
    *,
    precision: str | None = None,
    compiled: str | None = None,
) -> Choice:
    """The choice, with `model` compiled or not accordingly; `measure` makes it on one rank alone.

    `precision` and `compiled` are what a checkpoint says, which holds.
    """
    if is_sharded(model):
        return unmeasured_choice(model, precision or training.precision, compiled, training, device)
    if ranks.count == 1:
        return measure()
    measured = ranks.main_does(measure)
    choice = Choice(**json.loads(ranks.of_main(json.dumps(asdict(measured) if measured else {}))))
    if not ranks.is_main:
        compile_model(model, choice.compile)
    return choice


def unmeasured_choice(
    model: Transformer, said: str, compiled: str | None, training: TrainingConfig, device: torch.device
) -> Choice:
    """For a model cut over ranks, which cannot be run on one of them: bf16 where a GPU has it, compiled where
    that was asked for.
    """
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    precision = ("bf16" if has_bf16 else "fp32") if said == "auto" else said
    mode = cast(CompileMode, compiled or ("blocks" if training.compile == "on" else "off"))
    compile_model(model, mode)
    return Choice(cast(PrecisionName, precision), mode)
