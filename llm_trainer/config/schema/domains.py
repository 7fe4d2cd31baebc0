"""The domain bridge file: which datasets belong to which domain, their weights, and how they are split.

This file is not a section of a run, because some names have another meaning: `vocab_size` is the number of
terms that are collected per domain, and `min_length` of a loader is in characters.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from llm_trainer.config.parse.config_files import read_mapping_or_list
from llm_trainer.config.schema.base import MAX_SEED, Section, setting, unknown_name
from llm_trainer.config.schema.domain_loaders import (
    DIFFICULTIES,
    DOMAINS,
    DomainLoader,
    read_definitions,
    read_loader_file,
    shipped_loaders,
)
from llm_trainer.errors import UsageError


class LoaderOptions(Section):
    """Options of one loader in a bridge file. Which of them a loader accepts depends on its definition."""

    max_samples: int | None = setting(
        None, "Read only the first texts, up to this number.", unit="texts", gt=0
    )
    n_examples: int | None = setting(
        None, "Keep this many texts, sampled uniformly from all that are read.", unit="texts", gt=0
    )
    min_length: int = setting(0, "Leave out (and count) shorter texts.", unit="characters", ge=0)
    max_length: int | None = setting(None, "Leave out (and count) longer texts.", unit="characters", gt=0)
    split: str | None = setting(None, "Another split of the hub dataset.")
    path: str | None = setting(None, "Local file or folder with the same fields, instead of the hub.")
    filter_hard: bool = setting(False, "Keep only the hard ones.")
    difficulty: str | None = setting(None, "Keep only these: easy, medium, hard, or a value of the dataset.")
    include_cot: bool = setting(False, "Include the chain of thought, where the dataset has one.")


class DomainBridge(Section):
    """The content of a domain bridge file."""

    loaders: dict[str, dict[str, bool | int | str]] = setting(dict, "Options by loader.")
    custom_loaders: dict[str, dict[str, Any]] = setting(
        dict, "Additional loaders, defined like those of the built-in table, without code."
    )
    loader_files: list[str] = setting(
        list, "YAML files that define additional loaders.", aliases=("loaders_file",)
    )
    local_dir: str = setting(
        "data/domain_raw",
        "A file or folder in this folder that is named like a loader is read instead of the hub.",
    )
    domain_weights: dict[str, float] = setting(
        dict, "Sampling weight of each domain in training, relative to the others. 1 where it is not given."
    )
    train_ratio: float = setting(0.8, "Fraction of examples for training.", ge=0, le=1)
    val_ratio: float = setting(0.1, "Fraction of examples for validation.", ge=0, le=1)
    test_ratio: float = setting(0.1, "Fraction of examples for testing.", ge=0, le=1)
    deduplicate: Literal["exact", "near"] = setting(
        "exact",
        "Keep only one of equal texts; near: also only one of nearly equal texts (such as questions on the "
        "same passage).",
    )
    max_examples_per_domain: int | None = setting(
        None, "Largest number of examples of each domain, sampled uniformly.", unit="examples", gt=0
    )
    domain_caps: dict[str, int] = setting(
        dict, "Largest number of examples by domain, instead of max_examples_per_domain."
    )
    extract_vocab: bool = setting(False, "Collect the terms of each domain.")
    vocab_size: int = setting(1000, "Number of terms of each domain.", unit="terms", gt=0)
    add_terms: bool = setting(False, "Add these terms to the tokenizer's vocabulary. Needs extract_vocab.")
    tokenizer_path: str | None = setting(
        None,
        "Existing tokenizer for all domains, such as that of a model to train further. Unset: one is trained "
        "on them.",
    )
    tokenizer_vocab_size: int = setting(
        32000, "Largest vocabulary size of a tokenizer that is trained.", unit="tokens", gt=256
    )
    num_workers: int = setting(1, "Number of processes that tokenize in parallel.", unit="workers", ge=1)
    skip_unavailable: bool = setting(False, "Continue without datasets that are not available.")
    seed: int = setting(42, "Random seed of the split and of the sampling.", ge=0, le=MAX_SEED)
    output_dir: str = setting("data/domain_specific", "Folder that the prepared domains are written to.")

    @model_validator(mode="after")
    def _check(self) -> DomainBridge:
        total = self.train_ratio + self.val_ratio + self.test_ratio
        if abs(total - 1) > 1e-6:
            raise UsageError(f"train_ratio, val_ratio and test_ratio add up to {total:g}, not to 1")
        if not self.train_ratio:
            raise UsageError("train_ratio=0 leaves no training data; raise it")
        if self.add_terms and not self.extract_vocab:
            raise UsageError(
                "add_terms is on, but extract_vocab is off, so that no terms are collected; enable "
                "extract_vocab"
            )
        definitions = self.all_loaders()
        for loader, options in self.loaders.items():
            _check_options(loader, options, definitions)
        known = dict.fromkeys(
            [*DOMAINS, *(domain for one in definitions.values() for domain in one.domains())]
        )
        for name in ("domain_weights", "domain_caps"):
            for domain, value in getattr(self, name).items():
                if domain not in known:
                    raise UsageError(unknown_name(domain, name, known, "domain"))
                if not value > 0:
                    raise UsageError(
                        f"invalid value for {name}.{domain}: {value:g} must be above 0; remove the domain "
                        "instead"
                    )
        return self

    def all_loaders(self) -> Mapping[str, DomainLoader]:
        """Every loader by name: the built-in ones, those of `loader_files`, and those of this file. A later
        one replaces an earlier one of the same name.
        """
        definitions = dict(shipped_loaders())
        for name in self.loader_files:
            definitions |= read_loader_file(Path(name))
        return definitions | read_definitions(self.custom_loaders, "custom_loaders")

    def cap(self, domain: str) -> int | None:
        """Largest number of examples of a domain; None: no limit."""
        return self.domain_caps.get(domain, self.max_examples_per_domain)

    def options(self, loader: str) -> LoaderOptions:
        """The options of a loader."""
        options: dict[str, Any] = dict(self.loaders[loader])
        return LoaderOptions(**options)


def _check_options(loader: str, options: Mapping[str, Any], definitions: Mapping[str, DomainLoader]) -> None:
    if loader not in definitions:
        raise UsageError(unknown_name(loader, "a domain bridge file", definitions, "loader"))
    allowed = definitions[loader].options()
    for option, value in options.items():
        kind = allowed.get(option)
        if kind is None:
            raise UsageError(unknown_name(option, loader, allowed))
        if type(value) is not kind or (kind is int and isinstance(value, int) and value < 0):
            raise UsageError(
                f"invalid value for {loader}.{option}: {value!r} must be "
                f"{'an integer, 0 or more' if kind is int else f'of type {kind.__name__}'}"
            )
    difficulty = options.get("difficulty")
    levels = definitions[loader].difficulty_levels
    if difficulty in DIFFICULTIES and difficulty not in levels:
        raise UsageError(
            f"invalid value for {loader}.difficulty: {difficulty!r}; its dataset has "
            f"{', '.join(levels) or 'no such levels'}"
        )
    if options.get("filter_hard") and difficulty not in (None, "hard"):
        raise UsageError(
            f"{loader}: filter_hard and difficulty={difficulty!r} contradict each other; keep one"
        )
    try:
        LoaderOptions(**options)
    except UsageError as error:
        raise UsageError(f"{loader}.{error}") from None


def parse_domain_bridge(values: Mapping[str, Any], source: str) -> DomainBridge:
    """Validate the content of a domain bridge file.

    Args:
        values: The settings. Names that begin with an underscore are comments.
        source: Where they come from, for messages.

    Raises:
        UsageError: A name is unknown or a value is invalid.
    """
    try:
        return DomainBridge(**{name: value for name, value in values.items() if not name.startswith("_")})
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from None


def read_bridge_file(path: Path) -> dict[str, object]:
    """Read the content of a domain bridge file without validating it; raises UsageError where it is not a
    mapping.
    """
    content = read_mapping_or_list(path)
    if not isinstance(content, dict):
        raise UsageError(f"{path} is not a domain bridge file: it must be a mapping")
    return {str(name): value for name, value in content.items()}
