"""The domain bridge file: which data sets make up which domain, their weights, and how they are split.

`vocab_size` is here the number of domain terms that are collected, and a loader's `min_length` is in characters: this file has words of its
own, which is why it is not a section of a run.
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
    read_loader_file,
    read_rows,
    shipped_loaders,
)
from llm_trainer.errors import UsageError


class LoaderOptions(Section):
    """What a bridge file says about one loader; which of these a loader takes is in its row of the table."""

    max_samples: int | None = setting(
        None, "at most so many texts, the first ones; reading stops there", unit="texts", gt=0
    )
    n_examples: int | None = setting(
        None, "so many texts, drawn evenly from all that are read", unit="texts", gt=0
    )
    min_length: int = setting(0, "shorter texts are left out and counted", unit="characters", ge=0)
    max_length: int | None = setting(None, "longer texts are left out and counted", unit="characters", gt=0)
    split: str | None = setting(None, "another split of the data set on the hub")
    path: str | None = setting(None, "a local file or folder with the same fields, in place of the hub")
    filter_hard: bool = setting(False, "only the hard ones")
    difficulty: str | None = setting(None, "only these: easy, medium, hard, or a value of the data set's own")
    include_cot: bool = setting(False, "with the chain of thought, where the data set has one")


class DomainBridge(Section):
    """The file as a whole."""

    loaders: dict[str, dict[str, bool | int | str]] = setting(dict, "loader → its options")
    custom_loaders: dict[str, dict[str, Any]] = setting(
        dict, "loader → its row, for loaders of your own: no code, the form of the table"
    )
    loader_files: list[str] = setting(
        list, "YAML files with more loaders of that form", aliases=("loaders_file",)
    )
    local_dir: str = setting(
        "data/domain_raw", "a file or folder here that is called as a loader is read in place of the hub"
    )
    domain_weights: dict[str, float] = setting(
        dict, "domain → its share of the tokens in training, relative to the others; 1 if not given"
    )
    train_ratio: float = setting(0.8, "share of examples for training", ge=0, le=1)
    val_ratio: float = setting(0.1, "share for validation", ge=0, le=1)
    test_ratio: float = setting(0.1, "share for testing", ge=0, le=1)
    deduplicate: Literal["exact", "near"] = setting(
        "exact",
        "the same text counts once; near: of texts that hardly differ one is kept as well (questions on one passage look so)",
    )
    max_examples_per_domain: int | None = setting(
        None, "at most so many of each domain, drawn evenly", unit="examples", gt=0
    )
    domain_caps: dict[str, int] = setting(
        dict, "domain → at most so many of it; other domains: max_examples_per_domain"
    )
    extract_vocab: bool = setting(False, "collect each domain's terms")
    vocab_size: int = setting(1000, "how many terms of each domain", unit="terms", gt=0)
    add_terms: bool = setting(
        False, "give these terms ids of their own in the tokenizer; needs extract_vocab"
    )
    tokenizer_path: str | None = setting(
        None,
        "the tokenizer of all domains, as of a model that goes on learning; none: one is trained on them",
    )
    tokenizer_vocab_size: int = setting(
        32000, "ids of a tokenizer that is trained, at most", unit="tokens", gt=256
    )
    num_workers: int = setting(1, "workers that tokenise at once", unit="workers", ge=1)
    skip_unavailable: bool = setting(False, "go on without the data sets that cannot be had")
    seed: int = setting(42, "of the split and of what is drawn", ge=0, le=MAX_SEED)
    output_dir: str = setting("data/domain_specific", "where the domains go")

    @model_validator(mode="after")
    def _fits_together(self) -> DomainBridge:
        total = self.train_ratio + self.val_ratio + self.test_ratio
        if abs(total - 1) > 1e-6:
            raise UsageError(f"train_ratio, val_ratio and test_ratio add up to {total:g}, not to 1")
        if not self.train_ratio:
            raise UsageError("train_ratio=0 leaves nothing to train on")
        if self.add_terms and not self.extract_vocab:
            raise UsageError(
                "add_terms is on and extract_vocab is off: no terms are collected; switch extract_vocab on"
            )
        rows = self.rows()
        for loader, options in self.loaders.items():
            _check_options(loader, options, rows)
        known = dict.fromkeys([*DOMAINS, *(domain for row in rows.values() for domain in row.domains())])
        for name in ("domain_weights", "domain_caps"):
            for domain, value in getattr(self, name).items():
                if domain not in known:
                    raise UsageError(unknown_name(domain, name, known).replace("setting", "domain"))
                if not value > 0:
                    raise UsageError(
                        f"{name}.{domain}={value:g} must be above 0; leave the domain out instead"
                    )
        return self

    def rows(self) -> Mapping[str, DomainLoader]:
        """Every loader that can be named: the shipped table, the files', this file's own; a later one of the
        same name wins.
        """
        rows = dict(shipped_loaders())
        for name in self.loader_files:
            rows |= read_loader_file(Path(name))
        return rows | read_rows(self.custom_loaders, "custom_loaders")

    def cap(self, domain: str) -> int | None:
        """At most so many examples of a domain."""
        return self.domain_caps.get(domain, self.max_examples_per_domain)

    def options(self, loader: str) -> LoaderOptions:
        """What was said about a loader."""
        said: dict[str, Any] = dict(self.loaders[loader])
        return LoaderOptions(**said)


def _check_options(loader: str, options: Mapping[str, Any], rows: Mapping[str, DomainLoader]) -> None:
    if loader not in rows:
        raise UsageError(unknown_name(loader, "a domain bridge file", rows).replace("setting", "loader"))
    allowed = rows[loader].options()
    for option, value in options.items():
        kind = allowed.get(option)
        if kind is None:
            raise UsageError(unknown_name(option, loader, allowed))
        if type(value) is not kind or (kind is int and isinstance(value, int) and value < 0):
            raise UsageError(
                f"{loader}.{option}={value!r} must be {'a whole number, 0 or more' if kind is int else kind.__name__}"
            )
    difficulty = options.get("difficulty")
    levels = rows[loader].difficulty_levels
    if difficulty in DIFFICULTIES and difficulty not in levels:
        raise UsageError(
            f"{loader}.difficulty={difficulty!r}: its data set has {', '.join(levels) or 'no such levels'}"
        )
    if options.get("filter_hard") and difficulty not in (None, "hard"):
        raise UsageError(
            f"{loader}: filter_hard and difficulty={difficulty!r} contradict each other; keep one"
        )
    try:
        LoaderOptions(**options)
    except UsageError as error:
        raise UsageError(f"{loader}.{error}") from None


def read_domain_bridge(path: Path) -> DomainBridge:
    """The domain bridge file; raises UsageError where it says what is unknown or out of bounds."""
    return parse_domain_bridge(read_bridge_file(path), str(path))


def parse_domain_bridge(values: Mapping[str, Any], place: str) -> DomainBridge:
    """A bridge from what was said; raises UsageError that names the place. Names that begin with an
    underscore are remarks.
    """
    try:
        return DomainBridge(**{name: value for name, value in values.items() if not name.startswith("_")})
    except UsageError as error:
        raise UsageError(f"{place}: {error}") from None


def read_bridge_file(path: Path) -> dict[str, object]:
    content = read_mapping_or_list(path)
    if not isinstance(content, dict):
        raise UsageError(f"{path} is not a domain bridge file: it must be a mapping")
    return {str(name): value for name, value in content.items()}
