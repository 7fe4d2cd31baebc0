"""Settings that parse but whose feature is not built yet: they load, and they refuse to be switched on, all at once and by name.

A section whose own switch is off is not active, and what it says is not refused: a file may describe what another run will use.
"""

from __future__ import annotations

from llm_trainer.config.errors import UsageError
from llm_trainer.config.features import SWITCHES
from llm_trainer.config.run import RunConfig, section_types


def owed_settings(config: RunConfig) -> list[str]:
    """`section.field = value` of each switched-on setting whose feature is not built yet."""
    found = []
    for section, kind in section_types().items():
        if section in SWITCHES and not getattr(config.training, SWITCHES[section]):
            continue
        values = getattr(config, section)
        for name, field in kind.model_fields.items():
            value = getattr(values, name)
            if (
                kind.setting_of(name).owed
                and value != field.get_default(call_default_factory=True)
                and not _inactive(config, section, name)
            ):
                found.append(f"{section}.{name} = {value!r} ({field.description})")
    return found


def _inactive(config: RunConfig, section: str, name: str) -> bool:
    """Settings that mean something only beside a switch, which is off."""
    switch = {"training.teacher_model_path": "use_knowledge_distillation", "training.deepspeed_config": "use_deepspeed"}.get(
        f"{section}.{name}"
    )
    return switch is not None and not getattr(config.training, switch)


def refuse_owed(config: RunConfig) -> None:
    """Raises UsageError that names every switched-on setting whose feature is not built yet."""
    found = owed_settings(config)
    if found:
        listed = "\n".join(f"  {line}" for line in found)
        raise UsageError(
            f"not built yet in this version:\n{listed}\nLeave {'it' if len(found) == 1 else 'them'} out, or switch off, to go on without."
        )
