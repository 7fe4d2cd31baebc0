"""Translates names and values of Hugging Face's `TrainingArguments` that mean something else than ours:
strategies with intervals, `use_cpu`, names of optimizers and schedules, `max_steps=-1`.

Plain aliases are in the schema; names without a counterpart are in `config/training_arguments.py`.
"""

from __future__ import annotations

from typing import Any

from llm_trainer.config.schema.base import as_boolean
from llm_trainer.errors import UsageError

EVAL_STRATEGIES = ("eval_strategy", "evaluation_strategy")
SAVE_STRATEGIES = ("save_strategy",)
CPU_SWITCHES = ("use_cpu", "no_cuda")
_SCHEDULERS = {
    "constant_with_warmup": "constant",
    "warmup_stable_decay": "wsd",
    "cosine_with_min_lr": "cosine",
}
_OPTIMIZERS = {"adamw_torch": "adamw", "adamw_torch_fused": "adamw"}


def translate_training_arguments(values: dict[str, Any], schedulers: tuple[str, ...]) -> None:
    """Translate names and values that mean something else in `TrainingArguments`, in place.

    Args:
        values: Settings by any name.
        schedulers: The names of `lr_scheduler`.

    Raises:
        UsageError: A value has no counterpart, or contradicts another name's.
    """
    for names, words in ((schedulers, _SCHEDULERS), (("optimizer", "optim"), _OPTIMIZERS)):
        for name in names:
            given = values.get(name)
            values |= {name: words[given]} if isinstance(given, str) and given in words else {}
    if str(values.get("max_steps")) == "-1":  # not set
        values["max_steps"] = None
    for name in EVAL_STRATEGIES:
        _translate_strategy(values, name, "eval_interval", "eval_steps")
    for name in SAVE_STRATEGIES:
        _translate_strategy(values, name, "save_interval", "save_steps")
    for name in CPU_SWITCHES:
        _translate_device(values, name)
    fsdp = values.get("fsdp")
    if isinstance(fsdp, bool) or (isinstance(fsdp, str) and not fsdp.strip().isdigit()):
        raise UsageError(
            f"invalid value for fsdp: {fsdp!r} is not a number; give the number of ranks over which a "
            "replica is sharded (1: none)"
        )


def _translate_strategy(values: dict[str, Any], name: str, interval: str, alias: str) -> None:
    if name not in values:
        return
    strategy = values.pop(name)
    word = str(getattr(strategy, "value", strategy)).lower()
    word = {"false": "no", "none": "no"}.get(word, word)  # `no` without quotes in YAML
    given = next((other for other in (interval, alias) if values.get(other) is not None), None)
    if word == "steps":
        return
    if word not in ("epoch", "no") or (word == "no" and interval == "eval_interval"):
        raise UsageError(
            f"invalid value for {name}: {strategy!r} has no counterpart; give {interval} in steps, epochs or "
            "tokens" + ("; a run always validates at its end" if word == "no" else "")
        )
    if given is not None:
        raise UsageError(f"{name}={strategy!r} and {given}={values[given]!r} contradict each other; keep one")
    values[interval] = None if word == "no" else "1 epochs"


def _translate_device(values: dict[str, Any], name: str) -> None:
    if name in values and as_boolean(name, values.pop(name)):
        if values.get("device", "auto") not in ("cpu", "auto"):
            raise UsageError(f"{name}=True and device={values['device']!r} contradict each other; keep one")
        values["device"] = "cpu"
