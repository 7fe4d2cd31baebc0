"""Scaling schedules: operations that change the run while it trains, read and judged entry by entry.

An entry names an operation and its value, and fires below a validation loss (`trigger_loss`), after so many
steps (`max_wait_iters`), or on whichever comes first. This module knows each operation's kind of value, and
which parts exist; how operations change a model is `llm_trainer/orchestration`'s.
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

_PART = re.compile(r"(attn|mlp|ln_1|ln_2)\.(\d+)|wte|wpe|ln_f|lm_head")
_LORA_PART = re.compile(r"(attn|mlp)\.(\d+)|wte|lm_head")


class Operation(Section):
    """One entry of a schedule."""

    model_config = ConfigDict(allow_inf_nan=True)

    name: str = setting("", "the operation")
    value: Any = setting(None, "its argument")
    trigger_loss: float | None = setting(None, "fires when a validation loss is below it", unit="nats")
    max_wait_iters: int | None = setting(
        None, "fires after so many steps since the previous operation, whatever the loss", unit="steps", ge=0
    )
    reevaluate: bool = setting(False, "evaluate again right after")
    desc: str | None = setting(None, "free text for the log", aliases=("description",))
    mode: Literal["copy", "identity"] | None = setting(
        None, "stack_layers: identity keeps the function exactly; none: copy"
    )
    approximate: bool = setting(False, "widen_model: allow a change that is not exact")


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _positive(value: Any, layers: int) -> str | None:
    return None if _number(value) and value > 0 else "a number above 0"


def _count(value: Any, layers: int) -> str | None:
    return None if _number(value) and value > 0 and value == int(value) else "a whole number above 0"


def _count_or_zero(value: Any, layers: int) -> str | None:
    return None if _number(value) and value >= 0 and value == int(value) else "a whole number, 0 or more"


def _rate(value: Any, layers: int) -> str | None:
    return None if _number(value) and value >= 0 else "a number, 0 or more"


def _nothing(value: Any, layers: int) -> str | None:
    return None if value is None else "null"


def _switch(value: Any, layers: int) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def _exists(part: Any, layers: int, pattern: re.Pattern[str] = _PART) -> bool:
    """Whether there is such a part; of a range (`attn.0-3`) its last, of a glob (`mlp.*`) any of its kind."""
    if not isinstance(part, str):
        return False
    if set(part) & set("*?["):
        return any(
            fnmatch.fnmatch(name, part) for name in _names(min(layers, 1000)) if pattern.fullmatch(name)
        )
    match = pattern.fullmatch(re.sub(r"\.\d+-(\d+)$", r".\1", part))
    return match is not None and (match[2] is None or int(match[2]) < layers)


def _names(layers: int) -> list[str]:
    return [
        "wte",
        "wpe",
        "ln_f",
        "lm_head",
        *(f"{kind}.{layer}" for kind in ("attn", "mlp", "ln_1", "ln_2") for layer in range(layers)),
    ]


def _parts(value: Any, layers: int) -> str | None:
    parts = value if isinstance(value, list) and value else [value]
    known = f"attn.N, mlp.N, ln_1.N, ln_2.N (N below {layers}), wte, wpe, ln_f, lm_head, or a list of them"
    return None if all(_exists(part, layers) for part in parts) else known


def _part_and_rank(value: Any, layers: int) -> str | None:
    fits = (
        isinstance(value, list)
        and len(value) == 2
        and _exists(value[0], layers, _LORA_PART)
        and _count_or_zero(value[1], layers) is None
    )
    return (
        None
        if fits
        else f"[part, rank] with a part attn.N, mlp.N (N below {layers}), wte or lm_head and a rank of 0 or more"
    )


def _part_and_share(value: Any, layers: int) -> str | None:
    fits = (
        isinstance(value, list)
        and len(value) == 2
        and _exists(value[0], layers)
        and _number(value[1])
        and 0 < value[1] < 1
    )
    return None if fits else "[part, share] with a share between 0 and 1"


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
            else "{target_vram_percent, max_batch_size}: a percentage up to 100 and a number of sequences, or one of them"
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
    "change_lr": _positive, "set_lr": _rate,
    "change_batch_size": _positive, "set_batch_size": _count,
    "change_grad_accum": _positive, "set_grad_accum": _count,
    "change_warmup_iters": _positive, "set_warmup_iters": _count_or_zero,
    "change_eval_iters": _positive, "set_eval_iters": _count,
    "change_eval_interval": _positive, "set_eval_interval": _count,
    "reset_lr_schedule": _nothing, "adjust_batch_size": _batch_fit,
    "freeze_layer": _parts, "unfreeze_layer": _parts,
    "set_layer_lora_rank": _part_and_rank, "set_attn_lora_rank": _count_or_zero, "set_embedding_lora_rank": _count_or_zero,
    "merge_lora_weights": _nothing, "stack_layers": _layer_list, "widen_mlp": _count, "widen_model": _width_and_heads,
    "resize_vocabulary": _vocabulary, "set_embedding_freeze_mode": _switch, "set_embedding_finetune_mode": _switch,
    "prune_heads": _part_and_share, "prune_mlp": _part_and_share, "enable_exit": _layer, "disable_exit": _layer,
}  # fmt: skip
"""Operation → what is wrong with its value: (value, layers of the model at that point) → what it should be,
or None.
"""


def read_schedule(path: Path, *, layers: int | None = None) -> list[Operation]:
    """The operations of a YAML or JSON schedule, in order.

    `layers` is the model's number of blocks at the start; `stack_layers` is followed through the list. Without it parts may have any
    number. Raises UsageError that names the file, the entry and what is wrong with it.
    """
    content = read_mapping_or_list(path)
    if not isinstance(content, list):
        raise UsageError(f"{path} is not a scaling schedule: it must be a list of operations")
    depth = 1 << 30 if layers is None else layers
    operations = []
    for number, entry in enumerate(content, start=1):
        place = f"{path}, entry {number}"
        operation = _operation(entry, place)
        wanted = OPERATIONS[operation.name](operation.value, depth)
        if wanted is not None:
            raise UsageError(f"{place}: {operation.name} takes {wanted}, not {operation.value!r}")
        if operation.name == "stack_layers":
            depth = len(operation.value)
        operations.append(operation)
    return operations


def _operation(entry: object, place: str) -> Operation:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise UsageError(f"{place}: an entry is a mapping with a name, a value and a trigger, not {entry!r}")
    try:
        operation = Operation(**{str(key): value for key, value in entry.items()})
    except UsageError as error:
        raise UsageError(f"{place}: {error}") from None
    if operation.name not in OPERATIONS:
        raise UsageError(
            f"{place}: {unknown_name(operation.name, 'a schedule', OPERATIONS).replace('setting', 'operation')}"
        )
    if operation.trigger_loss is None and operation.max_wait_iters is None:
        raise UsageError(
            f"{place}: {operation.name} would never fire; give it trigger_loss, max_wait_iters or both"
        )
    return operation
