"""The reference of all settings as Markdown, from the schema: `python -m llm_trainer.config.reference >
docs/reference/settings.md`.
"""

from __future__ import annotations

from llm_trainer.config.schema.base import Section
from llm_trainer.config.schema.run_config import section_types


def reference() -> str:
    """One table a section: setting, default, unit, meaning, other names."""
    lines = [
        "# All settings",
        "",
        "Generated from the schema by `python -m llm_trainer.config.reference > docs/reference/settings.md`.",
        "[Configuration](configuration.md) says how to give them. Names with a dot are places in another section where the setting may",
        "stand as well. † parses, but is not built yet and refuses to be switched on.",
    ]
    for name, kind in section_types().items():
        lines += [
            "",
            f"## {name}",
            "",
            (kind.__doc__ or "").strip().split("\n")[0],
            "",
            "| setting | default | unit | meaning | also |",
            "|---|---|---|---|---|",
        ]
        lines += [_row(kind, field) for field in kind.model_fields]
    return "\n".join(lines) + "\n"


def _row(kind: type[Section], name: str) -> str:
    field, declared = kind.model_fields[name], kind.setting_of(name)
    default = field.get_default(call_default_factory=True)
    shown = "none" if default is None else f"`{default}`"
    also = ", ".join(f"`{other}`" for other in (*declared.aliases, *declared.spellings, *declared.paths))
    mark = " †" if declared.owed else ""
    meaning = (field.description or "").replace("|", "\\|")
    return f"| `{name}`{mark} | {shown} | {declared.unit or ''} | {meaning} | {also} |"


if __name__ == "__main__":
    print(reference(), end="")
