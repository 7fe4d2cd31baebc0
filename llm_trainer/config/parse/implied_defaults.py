"""Settings whose default follows from other settings. The reason becomes the origin of the value, which
`--explain` shows.
"""

from __future__ import annotations

from llm_trainer.config.parse.merge import FieldKey, ResolvedValue
from llm_trainer.config.schema.base import Section
from llm_trainer.config.schema.model import FAMILY_DEFAULTS


def apply_implied_defaults(values: dict[FieldKey, ResolvedValue], defaults: set[FieldKey]) -> list[str]:
    """Fill in the settings that follow from others.

    Args:
        values: The values given so far, changed in place.
        defaults: Keys of those that only the command's defaults gave, changed in place.

    Returns:
        Lines to print to the user.
    """
    _family(values, defaults)
    _follow(values, defaults, ("data", "vocab_size"), ("model", "vocab_size"))
    _follow(values, defaults, ("model", "max_position_embeddings"), ("data", "max_length"))
    _efficiency(values, defaults)
    _length(values, defaults)
    _batches(values, defaults)
    return _warmup(values, defaults)


def _family(values: dict[FieldKey, ResolvedValue], defaults: set[FieldKey]) -> None:
    """Setting a family selects its shape: the command's defaults for position embedding, norm and so on,
    which are of another family, are dropped.
    """
    if ("model", "model_type") in values and ("model", "model_type") not in defaults:
        shaped = {("model", name) for family in FAMILY_DEFAULTS.values() for name in family}
        for key in defaults & shaped:
            del values[key]
        defaults -= shaped


def _follow(
    values: dict[FieldKey, ResolvedValue], defaults: set[FieldKey], follower: FieldKey, leader: FieldKey
) -> None:
    """Set the follower to the leader's value where the user set the leader and not the follower."""
    if leader in values and leader not in defaults and (follower not in values or follower in defaults):
        values[follower] = ResolvedValue(
            values[leader].value, f"as {'.'.join(leader)} ({values[leader].origin})"
        )
        defaults.discard(follower)


def _efficiency(values: dict[FieldKey, ResolvedValue], defaults: set[FieldKey]) -> None:
    """`use_computational_efficiency` alone enables what the manual's section has and every machine can do:
    gradient checkpointing.
    """
    switch = values.get(("training", "use_computational_efficiency"))
    key = ("model", "gradient_checkpointing")
    if (
        switch is not None
        and str(switch.value).lower() in ("true", "1", "yes", "on")
        and (key not in values or key in defaults)
    ):
        values[key] = ResolvedValue(True, f"use_computational_efficiency ({switch.origin})")
        defaults.discard(key)


def _length(values: dict[FieldKey, ResolvedValue], defaults: set[FieldKey]) -> None:
    """Setting an end in steps, epochs or tokens drops the command's default in another unit."""
    ends = {("training", name) for name in ("max_steps", "num_epochs", "max_tokens")}
    if any(key in values and key not in defaults and values[key].value is not None for key in ends):
        for key in ends & defaults:
            del values[key]
        defaults -= ends


def _batches(values: dict[FieldKey, ResolvedValue], defaults: set[FieldKey]) -> None:
    """Drop the command's default batch size or accumulation where other settings determine the batch."""
    batch, micro, steps = (
        ("training", name) for name in ("batch_size", "micro_batch_size", "gradient_accumulation_steps")
    )
    given = {key for key in (batch, micro, steps) if key in values and key not in defaults}
    idle = ({batch} if micro in given else set()) | ({steps} if {batch, micro} <= given else set())
    for key in idle & defaults:
        del values[key]
    defaults -= idle


def _warmup(values: dict[FieldKey, ResolvedValue], defaults: set[FieldKey]) -> list[str]:
    """Replace a command's default warm-up that is longer than the run by a tenth of the run. One that the
    user set is checked in `validation`.
    """
    key, end = ("training", "warmup_steps"), values.get(("training", "max_steps"))
    if key in defaults and end is not None and isinstance(end.value, (int, float)):
        warmup = values[key].value
        if isinstance(warmup, (int, float)) and warmup > end.value:
            del values[key]
            defaults.discard(key)
            return [
                f"the default warm-up of {warmup} steps is longer than the run of {end.value} steps; it "
                "becomes a tenth of "
                "the run"
            ]
    return []


def origin_of(section: Section, name: str, origins: dict[str, str], dotted: str) -> str:
    """Where a value came from: a file, a flag, a preset, or a default of the command, the model family or the
    schema.

    Args:
        section: The section that holds the value.
        name: The canonical name of its field.
        origins: Dotted name → origin of the values that were given.
        dotted: The dotted name of the field.
    """
    if dotted in origins:
        return origins[dotted]
    family = getattr(section, "model_type", None)
    if isinstance(family, str) and name in FAMILY_DEFAULTS.get(family, {}):
        return f"default of {family}"
    return "default"
