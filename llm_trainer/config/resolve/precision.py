"""Resolves the many names of precision (`fp16`, `bf16`, `use_amp`, `mixed_precision`,
`mixed_precision_dtype`, `amp_dtype`, `dtype`) to the one setting `precision`.

A name of a data type decides. `mixed_precision` and `use_amp` name no data type: alone they mean bf16, which
needs no loss scaling and is supported by every CPU and every recent GPU. `fp16: false` alone means fp32.
"""

from __future__ import annotations

from typing import Any

from llm_trainer.config.schema.base import as_boolean
from llm_trainer.errors import UsageError

PRECISIONS = {
    "auto": "auto", "fp32": "fp32", "float32": "fp32", "32": "fp32", "no": "fp32",
    "fp16": "fp16", "float16": "fp16", "16": "fp16", "half": "fp16", "bf16": "bf16", "bfloat16": "bf16",
}  # fmt: skip
PRECISION_NAMES = ("precision", "dtype", "amp_dtype", "mixed_precision_dtype")
PRECISION_SWITCHES = ("mixed_precision", "use_amp", "fp16", "bf16")


def translate_precision(values: dict[str, Any]) -> None:
    """Replace all names of precision by `precision`, in place.

    Args:
        values: Settings by any name.

    Raises:
        UsageError: Two of the names disagree.
    """
    types = {
        name: _data_type(name, values.pop(name)) for name in PRECISION_NAMES if values.get(name) is not None
    }
    switches = {name: values.pop(name) for name in PRECISION_SWITCHES if values.get(name) is not None}
    for name, value in list(switches.items()):
        if str(value).lower() in PRECISIONS and str(value) not in (
            "0",
            "1",
        ):  # mixed_precision: bf16, as accelerate writes it
            types[name] = _data_type(name, switches.pop(name))
        else:
            switches[name] = as_boolean(name, value)
    for name in ("fp16", "bf16"):
        if switches.get(name):
            types[name] = name
    mixed_types = {"bf16", "fp16", "auto"} & set(types.values())
    for name in ("mixed_precision", "use_amp"):
        if name in switches and not (switches[name] and mixed_types):
            types[name] = "bf16" if switches[name] else "fp32"
    off = [name for name in ("fp16", "bf16") if switches.get(name) is False]
    for name in off:
        if not types:
            values["precision"] = "fp32"
        elif name in types.values():
            raise UsageError(
                f"contradictory settings of precision: {name}=False, but {_meanings(types)}; keep one"
            )
    if len(set(types.values())) > 1:
        raise UsageError(f"contradictory settings of precision: {_meanings(types)}; keep one")
    if types:
        values["precision"] = next(iter(types.values()))


def _data_type(name: str, value: object) -> str:
    word = str(value).removeprefix("torch.").lower()
    if word not in PRECISIONS:
        raise UsageError(
            f"invalid value for {name}: {value!r} is not a precision; choose auto, fp32, bf16 or fp16"
        )
    return PRECISIONS[word]


def _meanings(types: dict[str, str]) -> str:
    return ", ".join(f"{name} means {value}" for name, value in types.items())
