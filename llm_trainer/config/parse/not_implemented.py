"""Settings that parse but whose feature is not built yet: they load, and they refuse to be switched on, all
at once and by name.

A section whose own switch is off is not active, and what it says is not refused: a file may describe what
another run will use.
"""

from __future__ import annotations

from collections.abc import Iterator

from llm_trainer.config.parse.merge import Names
from llm_trainer.config.schema.base import Section
from llm_trainer.config.schema.features import SWITCHES
from llm_trainer.config.schema.run_config import RunConfig, section_types
from llm_trainer.errors import UsageError

# Settings that mean something only beside a switch.
_BESIDE = {"training.teacher_model_path": "use_knowledge_distillation"}


def owed_settings(config: RunConfig, reads: Names | None = None, own: Section | None = None) -> list[str]:
    """`section.field = value (meaning)` of each switched-on setting whose feature is not built yet.

    `reads` is what the command reads (default: everything): what a shared file says to other commands is theirs to refuse. `own` are the
    command's own flags.
    """
    found = (
        [f"{name} = {value!r} ({meaning})" for name, value, meaning in _switched_on(own)]
        if own is not None
        else []
    )
    for section in section_types():
        if section in SWITCHES and not getattr(config.training, SWITCHES[section]):
            continue
        for name, value, meaning in _switched_on(getattr(config, section)):
            switch = _BESIDE.get(f"{section}.{name}")
            if (reads is None or reads.reads(section, name)) and (
                switch is None or getattr(config.training, switch)
            ):
                found.append(f"{section}.{name} = {value!r} ({meaning})")
    return found


def _switched_on(values: Section) -> Iterator[tuple[str, object, str]]:
    """Name, value and meaning of each owed field whose value is not the default."""
    kind = type(values)
    for name, field in kind.model_fields.items():
        value = getattr(values, name)
        if kind.setting_of(name).owed and value != field.get_default(call_default_factory=True):
            yield name, value, field.description or ""


def refuse_owed(config: RunConfig, reads: Names | None = None, own: Section | None = None) -> None:
    """Raises UsageError that names every switched-on setting whose feature is not built yet; arguments as for
    `owed_settings`.
    """
    found = owed_settings(config, reads, own)
    if found:
        listed = "\n".join(f"  {line}" for line in found)
        them = "it" if len(found) == 1 else "them"
        raise UsageError(
            f"not built yet in this version:\n{listed}\nLeave {them} out, or switch {them} off, to go on without."
        )
