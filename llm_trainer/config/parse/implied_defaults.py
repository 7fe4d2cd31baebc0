"""Settings that follow from others where they are not said themselves: each is noted in `origins`, so that
`--explain` shows why.
"""

from __future__ import annotations

from llm_trainer.config.parse.merge import Field, Value
from llm_trainer.config.schema.base import Section
from llm_trainer.config.schema.model import FAMILY_DEFAULTS


def derive(values: dict[Field, Value], defaults: set[Field]) -> list[str]:
    """Fill in `values` what follows from what was said; `defaults` are the keys that only the door's defaults
    gave. Returns notes.
    """
    _family(values, defaults)
    _follow(values, defaults, ("data", "vocab_size"), ("model", "vocab_size"))
    _follow(values, defaults, ("model", "max_position_embeddings"), ("data", "max_length"))
    _efficiency(values, defaults)
    _length(values, defaults)
    _batches(values, defaults)
    return _warmup(values, defaults)


def _family(values: dict[Field, Value], defaults: set[Field]) -> None:
    """Who says a family takes its shape: a door's defaults for another family's positions, norm and so on
    step back.
    """
    if ("model", "model_type") in values and ("model", "model_type") not in defaults:
        shaped = {("model", name) for family in FAMILY_DEFAULTS.values() for name in family}
        for key in defaults & shaped:
            del values[key]
        defaults -= shaped


def _follow(values: dict[Field, Value], defaults: set[Field], follower: Field, leader: Field) -> None:
    """The follower takes the leader's value, where the leader was said and the follower was not."""
    if leader in values and leader not in defaults and (follower not in values or follower in defaults):
        values[follower] = Value(values[leader].value, f"as {'.'.join(leader)} ({values[leader].origin})")
        defaults.discard(follower)


def _efficiency(values: dict[Field, Value], defaults: set[Field]) -> None:
    """`use_computational_efficiency` alone takes from the manual's section what is safe on every machine:
    activations are recomputed.
    """
    switch = values.get(("training", "use_computational_efficiency"))
    key = ("model", "gradient_checkpointing")
    if (
        switch is not None
        and str(switch.value).lower() in ("true", "1", "yes", "on")
        and (key not in values or key in defaults)
    ):
        values[key] = Value(True, f"use_computational_efficiency ({switch.origin})")
        defaults.discard(key)


def _length(values: dict[Field, Value], defaults: set[Field]) -> None:
    """Who says an end in steps, epochs or tokens means that end: a door's default in another unit steps back."""
    ends = {("training", name) for name in ("max_steps", "num_epochs", "max_tokens")}
    if any(key in values and key not in defaults and values[key].value is not None for key in ends):
        for key in ends & defaults:
            del values[key]
        defaults -= ends


def _batches(values: dict[Field, Value], defaults: set[Field]) -> None:
    """A door's batch size or accumulation steps back where what was said about batches has another form."""
    whole, micro, steps = (
        ("training", name) for name in ("batch_size", "micro_batch_size", "gradient_accumulation_steps")
    )
    said = {key for key in (whole, micro, steps) if key in values and key not in defaults}
    idle = ({whole} if micro in said else set()) | ({steps} if {whole, micro} <= said else set())
    for key in idle & defaults:
        del values[key]
    defaults -= idle


def _warmup(values: dict[Field, Value], defaults: set[Field]) -> list[str]:
    """A door's warm-up that is longer than the run steps back for a tenth of the run; one that was said is
    judged in `checks`.
    """
    key, end = ("training", "warmup_steps"), values.get(("training", "max_steps"))
    if key in defaults and end is not None and isinstance(end.value, (int, float)):
        warmup = values[key].value
        if isinstance(warmup, (int, float)) and warmup > end.value:
            del values[key]
            defaults.discard(key)
            return [
                f"the default warm-up of {warmup} steps is longer than the run of {end.value}; it becomes a tenth of the run"
            ]
    return []


def said_origin(section: Section, name: str, origins: dict[str, str], dotted: str) -> str:
    """Where a value came from, in words: a file, a flag, a preset, a door's default, the family's or the
    class's.
    """
    if dotted in origins:
        return origins[dotted]
    family = getattr(section, "model_type", None)
    if isinstance(family, str) and name in FAMILY_DEFAULTS.get(family, {}):
        return f"default of {family}"
    return "default"
