"""`--explain`: every setting that a command reads, its value, where the value came from, its unit and its
meaning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_trainer.config.parse.implied_defaults import said_origin
from llm_trainer.config.parse.merge import OWN
from llm_trainer.config.schema.base import Section

if TYPE_CHECKING:
    from llm_trainer.config.parse.loader import LoadedRun


def explain(loaded: LoadedRun) -> str:
    """One aligned line a setting, section by section; plain text, so that it can be searched and compared."""
    rows: list[tuple[str, str, str, str, str]] = []
    names = loaded.door.names()
    for home, name in names.fields():
        section = loaded.own if home == OWN else getattr(loaded.config, home)
        assert isinstance(section, Section)
        dotted = f"{home}.{name}" if home else name
        field, declared = type(section).model_fields[name], type(section).setting_of(name)
        value = getattr(section, name)
        shown = "none" if value is None else repr(value) if isinstance(value, str) else str(value)
        rows.append(
            (
                dotted,
                shown,
                said_origin(section, name, loaded.origins, dotted),
                declared.unit or "",
                field.description or "",
            )
        )
    header = ("setting", "value", "from", "unit", "meaning")
    widths = [min(44, max(len(row[column]) for row in [header, *rows])) for column in range(4)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]).rstrip()
        for row in [header, *rows]
    )
