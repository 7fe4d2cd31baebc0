"""The domain bridge file: which datasets make up which domain, their weights, and how they are split.

`vocab_size` is here the number of domain terms that are collected, and a loader's `min_length` is in characters: this file has words of its
own, which is why it is not a section of a run. Preparing domains is not built yet; the file is read and judged now.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import model_validator

from llm_trainer.config.errors import UsageError
from llm_trainer.config.fields import Section, setting, unknown_name
from llm_trainer.config.files import read_mapping_or_list

_COMMON = {"max_samples": int, "n_examples": int, "min_length": int, "max_length": int, "split": str}
LOADER_OPTIONS: Mapping[str, Mapping[str, type]] = {
    "load_math": _COMMON,
    "load_numinamath": _COMMON,
    "load_scieval": _COMMON,
    "load_olympiad_bench": {**_COMMON, "filter_hard": bool},
    "load_livecodebench": {**_COMMON, "difficulty": str},
    "load_quant": _COMMON,
    "load_curated_thoughts": {**_COMMON, "include_cot": bool},
    "load_wildchat": _COMMON,
}
"""Loader → its options and their types."""


class DomainBridge(Section):
    """The file as a whole."""

    loaders: dict[str, dict[str, bool | int | str]] = setting(dict, "loader → its options")
    domain_weights: dict[str, float] = setting(dict, "domain → how often it is drawn, relative to the others")
    train_ratio: float = setting(0.8, "share of examples for training", ge=0, le=1)
    val_ratio: float = setting(0.1, "share for validation", ge=0, le=1)
    test_ratio: float = setting(0.1, "share for testing", ge=0, le=1)
    max_examples_per_domain: int | None = setting(None, "at most so many of each domain", unit="examples", gt=0)
    extract_vocab: bool = setting(False, "collect each domain's terms")
    vocab_size: int = setting(1000, "how many terms", unit="terms", gt=0)
    seed: int = setting(42, "of the split", ge=0)
    output_dir: str = setting("data/domain_specific", "where the domains go")

    @model_validator(mode="after")
    def _fits_together(self) -> DomainBridge:
        total = self.train_ratio + self.val_ratio + self.test_ratio
        if abs(total - 1) > 1e-6:
            raise UsageError(f"train_ratio, val_ratio and test_ratio add up to {total:g}, not to 1")
        for domain, weight in self.domain_weights.items():
            if not weight > 0:
                raise UsageError(f"domain_weights.{domain}={weight:g} must be above 0; leave the domain out instead")
        for loader, options in self.loaders.items():
            _check_loader(loader, options)
        return self


def _check_loader(loader: str, options: Mapping[str, object]) -> None:
    if loader not in LOADER_OPTIONS:
        raise UsageError(unknown_name(loader, "a domain bridge file", LOADER_OPTIONS).replace("setting", "loader"))
    for option, value in options.items():
        kind = LOADER_OPTIONS[loader].get(option)
        if kind is None:
            raise UsageError(unknown_name(option, loader, LOADER_OPTIONS[loader]))
        if type(value) is not kind or (kind is int and isinstance(value, int) and value < 0):
            raise UsageError(f"{loader}.{option}={value!r} must be {'a whole number, 0 or more' if kind is int else kind.__name__}")


def read_domain_bridge(path: Path) -> DomainBridge:
    """The domain bridge file; raises UsageError where it says what is unknown or out of bounds."""
    content = read_mapping_or_list(path)
    if not isinstance(content, dict):
        raise UsageError(f"{path} is not a domain bridge file: it must be a mapping")
    try:
        return DomainBridge.model_validate(content)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
