"""Definitions of domain loaders: data without code, in `domain_loaders.yaml` and in files of the user.

A definition names a dataset on the hub, its domain, and how a record becomes a text. This module reads and
validates definitions; `llm_trainer.data.domains.loaders` reads the datasets.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from llm_trainer.config.parse.config_files import read_mapping_or_list
from llm_trainer.config.schema.base import Section, setting
from llm_trainer.errors import UsageError

TABLE_FILE = "domain_loaders.yaml"
DOMAINS = ("math", "science", "coding", "logic", "reasoning", "general")
DIFFICULTIES = ("easy", "medium", "hard")
FIELD_FORMATS = ("first", "last", "lines", "lettered", "letter", "turns")

_FIELD = re.compile(r"\{\{|\}\}|\{(?P<name>[^{}|?]+)(?P<optional>\?)?(?:\|(?P<format>[^{}]*))?\}|[{}]")
_DOMAIN = re.compile(r"[a-z0-9][a-z0-9_-]*")

Scalar = str | bool | int | float | None


@dataclass(frozen=True)
class TemplateField:
    """A field in a template: `{name}`; `{name?}`: it may be missing; `{name|format}`: how a value that is not
    a text is formatted.
    """

    name: str
    is_optional: bool
    format: str | None


def parse_template(part: str) -> list[str | TemplateField]:
    """Parse a template.

    Args:
        part: The template, such as `Question: {question}`.

    Returns:
        Its texts and fields, in order.

    Raises:
        UsageError: A brace is not matched, or a format is unknown.
    """
    found: list[str | TemplateField] = []
    position = 0
    for match in _FIELD.finditer(part):
        found.append(part[position : match.start()])
        position = match.end()
        if match[0] in ("{{", "}}"):
            found.append(match[0][0])
        elif match["name"] is None:
            raise UsageError(
                f"the template {part!r} has an unmatched brace at {match.start()}; write {{field}}, and "
                f"{{{{ for a brace"
            )
        elif match["format"] is not None and match["format"] not in FIELD_FORMATS:
            raise UsageError(
                f"the template {part!r} has the unknown format |{match['format']}; use "
                f"{', '.join(FIELD_FORMATS)}"
            )
        else:
            found.append(TemplateField(match["name"], match["optional"] is not None, match["format"]))
    return [piece for piece in (*found, part[position:]) if piece]


class HubDataset(Section):
    """A dataset on the hub."""

    name: str = setting("", "Name on the hub.", min_length=1)
    configurations: list[str] = setting(list, "Configurations, all of which are read. Empty: the only one.")
    split: str = setting("train", "Split that is read.")
    files: list[str] = setting(
        list, "Files of the repository that are read directly, instead of loading it as a dataset."
    )
    revision: str | None = setting(None, "Commit of the repository. Unset: the newest.")
    domain: str | None = setting(None, "Domain of this dataset. Unset: that of the loader.")


class TextTemplate(Section):
    """How a record becomes a text."""

    text: list[str] = setting(
        list,
        "Templates of paragraphs, which are separated by an empty line.",
        min_length=1,
        split_commas=False,
    )
    text_with_cot: list[str] | None = setting(
        None, "The same, with the chain of thought.", split_commas=False
    )

    def parts(self, include_cot: bool) -> list[str]:
        """The templates to use, with or without the chain of thought."""
        return self.text_with_cot if include_cot and self.text_with_cot is not None else self.text


class DomainLoader(Section):
    """The definition of one loader."""

    about: str = setting("", "What the dataset is, in a line.")
    domain: str = setting("general", "Domain of the texts.")
    domain_field: str | None = setting(None, "Field that determines the domain of each record.")
    domain_map: dict[str, str] = setting(
        dict, "Domain by value of domain_field. For other values it is the loader's domain."
    )
    hub: list[HubDataset] = setting(list, "Datasets on the Hugging Face hub.")
    path: str | None = setting(None, "Local file or folder, instead of the hub.")
    templates: list[TextTemplate] = setting(
        list,
        "How a record becomes a text: the first template whose fields the record has.",
        aliases=("forms",),
        shorthands=("text", "text_with_cot"),
    )
    keep: dict[str, list[Scalar]] = setting(dict, "Values by field; records with other values are left out.")
    drop: dict[str, list[Scalar]] = setting(dict, "Values by field; records with one of them are left out.")
    difficulty_field: str | None = setting(None, "Field that holds the difficulty of a record.")
    difficulty_levels: dict[str, list[str]] = setting(
        dict, "Values of difficulty_field for easy, medium and hard."
    )
    licence: str = setting("not stated", "Licence of the dataset.", aliases=("license",))
    note: str = setting("", "What to know before using the dataset.")
    verified: list[str] = setting(list, "Where this was looked up.", split_commas=False)

    @classmethod
    def translate(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """`text` (and `text_with_cot`) mean a single template; `hub: name` and `hub: {…}` mean a single
        dataset.
        """
        translated = dict(values)
        if "text" in translated or "text_with_cot" in translated:
            if {"templates", "forms"} & translated.keys():
                raise UsageError("text and templates are two names of one setting; give one of them")
            template = {
                name: [text] if isinstance(text := translated.pop(name), str) else text
                for name in ("text", "text_with_cot")
                if name in translated
            }
            translated["templates"] = [template]
        hub = translated.get("hub")
        if isinstance(hub, (str, Mapping)):
            translated["hub"] = [{"name": hub} if isinstance(hub, str) else hub]
        return translated

    @property
    def has_cot(self) -> bool:
        """Whether the dataset has a chain of thought (`include_cot`)."""
        return any(template.text_with_cot is not None for template in self.templates)

    def domains(self) -> list[str]:
        """Every domain that the texts can belong to."""
        parts = [part.domain or self.domain for part in self.hub] or [self.domain]
        return list(
            dict.fromkeys([*parts, *([self.domain] if self.domain_field else []), *self.domain_map.values()])
        )

    def fields(self) -> list[str]:
        """The fields that the templates and the filters read."""
        texts = [
            part
            for template in self.templates
            for parts in (template.text, template.text_with_cot or [])
            for part in parts
        ]
        in_texts = [
            piece.name for part in texts for piece in parse_template(part) if isinstance(piece, TemplateField)
        ]
        others = [self.domain_field, self.difficulty_field]
        return list(
            dict.fromkeys([*in_texts, *(name for name in others if name is not None), *self.keep, *self.drop])
        )

    def options(self) -> Mapping[str, type]:
        """The options that this loader accepts in a bridge file, and their types."""
        found: dict[str, type] = dict(_COMMON_OPTIONS)
        if any(not part.files for part in self.hub):
            found["split"] = str
        if self.difficulty_field is not None:
            found |= {"filter_hard": bool, "difficulty": str}
        return found | ({"include_cot": bool} if self.has_cot else {})


_COMMON_OPTIONS: Mapping[str, type] = {
    "max_samples": int,
    "n_examples": int,
    "min_length": int,
    "max_length": int,
    "path": str,
}


def check_loader(name: str, loader: DomainLoader) -> None:
    """Raises UsageError for a definition that cannot work, with the name of the loader."""
    if not loader.templates:
        raise UsageError(
            f'the loader {name} has no text; define how a record becomes one: text: ["{{question}}", '
            f'"{{answer}}"]'
        )
    if not loader.hub and loader.path is None:
        raise UsageError(
            f"the loader {name} names no data; give hub (a name on the Hugging Face hub) or path (a file or "
            "folder)"
        )
    for domain in loader.domains():
        if not _DOMAIN.fullmatch(domain):
            raise UsageError(
                f"the loader {name}: the name of a domain consists of a-z, 0-9, - and _, unlike {domain!r}"
            )
    unknown = [level for level in loader.difficulty_levels if level not in DIFFICULTIES]
    if unknown or (loader.difficulty_levels and loader.difficulty_field is None):
        what = (
            f"difficulty_levels has {unknown[0]!r}" if unknown else "difficulty_levels needs difficulty_field"
        )
        raise UsageError(f"the loader {name}: {what}; the levels are {', '.join(DIFFICULTIES)}")
    try:
        loader.fields()
    except UsageError as error:
        raise UsageError(f"the loader {name}: {error}") from None


def read_definitions(content: object, source: str) -> dict[str, DomainLoader]:
    """Validate definitions of loaders.

    Args:
        content: The content of a file or a setting.
        source: Where it comes from, for messages.

    Returns:
        Loaders by name.

    Raises:
        UsageError: A definition is not valid.
    """
    if not isinstance(content, Mapping):
        raise UsageError(f"{source} holds no loaders: it must be a mapping of names to definitions")
    loaders: dict[str, DomainLoader] = {}
    for name, values in content.items():
        if not isinstance(values, Mapping):
            raise UsageError(f"{source}: the loader {name} must be a mapping, not {values!r}")
        try:
            loaders[str(name)] = DomainLoader(**{str(key): value for key, value in values.items()})
            check_loader(str(name), loaders[str(name)])
        except UsageError as error:
            message = str(error)
            raise UsageError(
                f"{source}: {message}"
                if f"loader {name}" in message
                else f"{source}: the loader {name}: {message}"
            ) from None
    return loaders


def read_loader_file(path: Path) -> dict[str, DomainLoader]:
    """Read additional loaders from a YAML or JSON file."""
    return read_definitions(read_mapping_or_list(path), str(path))


@functools.cache
def shipped_loaders() -> Mapping[str, DomainLoader]:
    """The loaders that come with the package."""
    text = resources.files(__package__).joinpath(TABLE_FILE).read_text(encoding="utf-8")
    return read_definitions(yaml.safe_load(text), TABLE_FILE)
