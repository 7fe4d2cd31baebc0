"""Many names, one setting: `fp16`, `bf16`, `use_amp`, `mixed_precision`, `mixed_precision_dtype`,
`amp_dtype`, `dtype` → `precision`.

Names of a type decide. `mixed_precision` and `use_amp` say only that it is mixed: without a type beside them
that means bf16, which needs no loss scaling and exists on every CPU and every recent GPU. An explicit `fp16:
false` alone means fp32.
"""

from __future__ import annotations

from typing import Any

from llm_trainer.config.schema.base import as_boolean
from llm_trainer.errors import UsageError

PRECISIONS = {
    "auto": "auto", "fp32": "fp32", "float32": "fp32", "32": "fp32", "no": "fp32", "fp16": "fp16", "float16": "fp16", "16": "fp16",
    "half": "fp16", "bf16": "bf16", "bfloat16": "bf16",
}  # fmt: skip
PRECISION_NAMES = ("precision", "dtype", "amp_dtype", "mixed_precision_dtype")
PRECISION_SWITCHES = ("mixed_precision", "use_amp", "fp16", "bf16")


def translate_precision(values: dict[str, Any]) -> None:
    """Replace every spelling of precision in `values` by one `precision`; raises UsageError where two of them
    disagree.
    """
    said = {
        name: _type_named(name, values.pop(name)) for name in PRECISION_NAMES if values.get(name) is not None
    }
    switches = {name: values.pop(name) for name in PRECISION_SWITCHES if values.get(name) is not None}
    for name, value in list(switches.items()):
        if str(value).lower() in PRECISIONS and str(value) not in (
            "0",
            "1",
        ):  # mixed_precision: bf16, as accelerate writes it
            said[name] = _type_named(name, switches.pop(name))
        else:
            switches[name] = as_boolean(name, value)
    for name in ("fp16", "bf16"):
        if switches.get(name):
            said[name] = name
    mixed_types = {"bf16", "fp16", "auto"} & set(said.values())
    for name in ("mixed_precision", "use_amp"):
        if name in switches and not (switches[name] and mixed_types):
            said[name] = "bf16" if switches[name] else "fp32"
    off = [name for name in ("fp16", "bf16") if switches.get(name) is False]
    for name in off:
        if not said:
            values["precision"] = "fp32"
        elif name in said.values():
            raise UsageError(
                f"precision is said twice and differently: {name}=False, but {_means(said)}; keep one"
            )
    if len(set(said.values())) > 1:
        raise UsageError(f"precision is said twice and differently: {_means(said)}; keep one")
    if said:
        values["precision"] = next(iter(said.values()))


def _type_named(name: str, value: object) -> str:
    word = str(value).removeprefix("torch.").lower()
    if word not in PRECISIONS:
        raise UsageError(f"{name}={value!r} is not a precision; choose auto, fp32, bf16 or fp16")
    return PRECISIONS[word]


def _means(said: dict[str, str]) -> str:
    return ", ".join(f"{name} means {value}" for name, value in said.items())
