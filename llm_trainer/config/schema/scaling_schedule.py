"""Scaling schedules: lists of operations that change the model or the run during training.

An entry names an operation and its value. It fires when a validation loss is below `trigger_loss`, after
`max_wait_iters` steps, or on whichever comes first. This module validates entries: the kind of value of each
operation, and the names of modules. `llm_trainer/orchestration` applies the operations.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict

from llm_trainer.config.parse.config_files import read_mapping_or_list
from llm_trainer.config.schema.base import Section, setting, unknown_name
from llm_trainer.errors import UsageError

MAX_FACTOR = 10**6
MAX_COUNT = 2**31 - 1  # of steps, sequences, ids, ranks of matrices

_MODULE = re.compile(r"(attn|mlp|ln_1|ln_2)\.(\d{1,9})|wte|wpe|ln_f|lm_head")
_LORA_MODULE = re.compile(r"(attn|mlp)\.(\d{1,9})|wte|lm_head")


class Operation(Section):
    """One entry of a schedule."""

    model_config = ConfigDict(allow_inf_nan=True)

    name: str = setting("", "Name of the operation.")
    value: Any = setting(None, "Argument of the operation.")
    trigger_loss: float | None = setting(None, "Fire when a validation loss is below this.", unit="nats")
    max_wait_iters: int | None = setting(
        None,
        "Fire this long after the previous operation, whatever the loss.",
        unit="steps",
        ge=0,
        le=MAX_COUNT,
    )
    reevaluate: bool = setting(False, "Validate again right after the operation.")
    desc: str | None = setting(None, "Text for the log.", aliases=("description",))
    mode: Literal["copy", "identity"] | None = setting(
        None, "stack_layers: identity keeps the model's function exactly. Unset: copy."
    )
    approximate: bool = setting(
        False, "widen_model: allow a change that does not keep the model's function exactly."
    )


def _number(value: Any, maximum: float = MAX_FACTOR) -> bool:
    """Whether it is a number that is finite and not absurdly large."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= maximum


def _whole(value: Any) -> bool:
    return _number(value, MAX_COUNT) and value == int(value)


def _factor(value: Any, layers: int) -> str | None:
    if _number(value) and value == 1:
        return "another number; a factor of 1 has no effect"
    return None if _number(value) and value > 0 else f"a number above 0, up to {MAX_FACTOR:,}"


def _count(value: Any, layers: int) -> str | None:
    return None if _whole(value) and value > 0 else f"an integer above 0, up to {MAX_COUNT:,}"


def _count_or_zero(value: Any, layers: int) -> str | None:
    return None if _whole(value) and value >= 0 else f"an integer, 0 or more, up to {MAX_COUNT:,}"


def _not_negative(value: Any, layers: int) -> str | None:
    return None if _number(value) and value >= 0 else f"a number, 0 or more, up to {MAX_FACTOR:,}"


def _nothing(value: Any, layers: int) -> str | None:
    return None if value is None else "null"


def _switch(value: Any, layers: int) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def _exists(module: Any, layers: int, pattern: re.Pattern[str] = _MODULE) -> bool:
    """Whether there is such a module. Of a range (`attn.0-3`) the last must exist, of a glob (`mlp.*`) at
    least one.
    """
    if not isinstance(module, str):
        return False
    if set(module) & set("*?["):
        return any(
            fnmatch.fnmatch(name, module) for name in _names(min(layers, 1000)) if pattern.fullmatch(name)
        )
    match = pattern.fullmatch(re.sub(r"\.\d+-(\d+)$", r".\1", module))
    return match is not None and (match[2] is None or int(match[2]) < layers)


def _names(layers: int) -> list[str]:
    return [
        "wte",
        "wpe",
        "ln_f",
        "lm_head",
        *(f"{kind}.{layer}" for kind in ("attn", "mlp", "ln_1", "ln_2") for layer in range(layers)),
    ]


def _modules(value: Any, layers: int) -> str | None:
    modules = value if isinstance(value, list) and value else [value]
    known = f"attn.N, mlp.N, ln_1.N, ln_2.N (N below {layers}), wte, wpe, ln_f, lm_head, or a list of them"
    return None if all(_exists(module, layers) for module in modules) else known


def _module_and_rank(value: Any, layers: int) -> str | None:
    fits = (
        isinstance(value, list)
        and len(value) == 2
        and _exists(value[0], layers, _LORA_MODULE)
        and _count_or_zero(value[1], layers) is None
    )
    return (
        None
        if fits
        else f"[module, rank] with a module attn.N, mlp.N (N below {layers}), wte or lm_head, and a rank "
        "of 0 or more"
    )


def _module_and_fraction(value: Any, layers: int) -> str | None:
    fits = (
        isinstance(value, list)
        and len(value) == 2
        and _exists(value[0], layers)
        and _number(value[1])
        and 0 < value[1] < 1
    )
    return None if fits else "[module, fraction] with a fraction between 0 and 1"


def _layer_list(value: Any, layers: int) -> str | None:
    fits = (
        isinstance(value, list)
        and value
        and all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < layers for item in value)
    )
    return None if fits else f"a list of layer indices from 0 to {layers - 1}, such as [0, 0, 1, 1]"


def _width_and_heads(value: Any, layers: int) -> str | None:
    numbers = (
        list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
    )
    return (
        None
        if 1 <= len(numbers) <= 2 and all(_count(item, layers) is None for item in numbers)
        else "a new hidden size, or [hidden size, heads]"
    )


def _vocabulary(value: Any, layers: int) -> str | None:
    if isinstance(value, dict):
        fits = (
            not set(value) - {"size", "remap_file"}
            and _count(value.get("size"), layers) is None
            and isinstance(value.get("remap_file", ""), str)
        )
        return None if fits else "a size, or {size, remap_file}"
    return None if _count(value, layers) is None else "a size, or {size, remap_file}"


def _batch_fit(value: Any, layers: int) -> str | None:
    if isinstance(value, dict):
        percent, most = value.get("target_vram_percent", 100), value.get("max_batch_size", 1)
        fits = (
            value
            and not set(value) - {"target_vram_percent", "max_batch_size"}
            and _number(percent)
            and 0 < percent <= 100
        )
        fits = fits and _count(most, layers) is None
        return (
            None
            if fits
            else "{target_vram_percent, max_batch_size}: a percentage up to 100 and a number of sequences, "
            "or one of them"
        )
    fits = value is None or (_number(value) and 0 < value <= 1)
    return None if fits else "null, a factor above 0 and up to 1, or {target_vram_percent, max_batch_size}"


def _layer(value: Any, layers: int) -> str | None:
    return (
        None
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < layers
        else f"a layer from 0 to {layers - 1}"
    )


OPERATIONS: Mapping[str, Callable[[Any, int], str | None]] = {
    "change_lr": _factor, "set_lr": _not_negative,
    "change_batch_size": _factor, "set_batch_size": _count,
    "change_grad_accum": _factor, "set_grad_accum": _count,
    "change_warmup_iters": _factor, "set_warmup_iters": _count_or_zero,
    "change_eval_iters": _factor, "set_eval_iters": _count,
    "change_eval_interval": _factor, "set_eval_interval": _count,
    "reset_lr_schedule": _nothing, "adjust_batch_size": _batch_fit,
    "freeze_layer": _modules, "unfreeze_layer": _modules,
    "set_layer_lora_rank": _module_and_rank, "set_attn_lora_rank": _count_or_zero,
    "set_embedding_lora_rank": _count_or_zero, "merge_lora_weights": _nothing,
    "stack_layers": _layer_list, "widen_mlp": _count, "widen_model": _width_and_heads,
    "resize_vocabulary": _vocabulary,
    "set_embedding_freeze_mode": _switch, "set_embedding_finetune_mode": _switch,
    "prune_heads": _module_and_fraction, "prune_mlp": _module_and_fraction,
    "enable_exit": _layer, "disable_exit": _layer,
}  # fmt: skip
"""Operation → its check: (value, layers of the model at that point) → what the value should be, or None if it
is valid.
"""


def read_schedule(path: Path, *, layers: int | None = None) -> list[Operation]:
    """Read a YAML or JSON schedule.

    Args:
        path: The file.
        layers: Number of the model's layers at the start, which `stack_layers` changes along the list.
            None: unknown, and modules may have any number.

    Returns:
        The operations, in order.

    Raises:
        UsageError: An entry is not valid; the message names the file and the entry.
    """
    content = read_mapping_or_list(path)
    if not isinstance(content, list):
        raise UsageError(f"{path} is not a scaling schedule: it must be a list of operations")
    depth = 1 << 30 if layers is None else layers
    operations = []
    for number, entry in enumerate(content, start=1):
        where = f"{path}, entry {number}"
        operation = _operation(entry, where)
        expected = OPERATIONS[operation.name](operation.value, depth)
        if expected is not None:
            raise UsageError(f"{where}: {operation.name} takes {expected}, not {operation.value!r}")
        if operation.name == "stack_layers":
            depth = len(operation.value)
        operations.append(operation)
    return operations


def _operation(entry: object, where: str) -> Operation:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise UsageError(f"{where}: an entry is a mapping with a name, a value and a trigger, not {entry!r}")
    try:
        operation = Operation(**{str(key): value for key, value in entry.items()})
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    if operation.name not in OPERATIONS:
        message = unknown_name(operation.name, "a schedule", OPERATIONS, "operation")
        everything = "" if "did you mean" in message else f"; there are {', '.join(OPERATIONS)}"
        raise UsageError(f"{where}: {message}{everything}")
    _check_has_effect(operation, where)
    if operation.trigger_loss is None and operation.max_wait_iters is None:
        raise UsageError(
            f"{where}: {operation.name} would never fire; give it trigger_loss, max_wait_iters or both"
        )
    return operation


def _check_has_effect(operation: Operation, where: str) -> None:
    """Raises UsageError for a part of an entry that would be ignored."""
    trigger = operation.trigger_loss
    if trigger is not None and not trigger > 0:  # NaN too
        raise UsageError(
            f"{where}: trigger_loss {trigger:g} of {operation.name}: no loss is ever below it; give a number "
            "above 0 (.inf: at once), or max_wait_iters alone"
        )
    for name, is_set, owner in (
        ("mode", operation.mode is not None, "stack_layers"),
        ("approximate", operation.approximate, "widen_model"),
    ):
        if is_set and operation.name != owner:
            raise UsageError(
                f"{where}: {name} has an effect on {owner} only, not on {operation.name}; remove it"
            )
