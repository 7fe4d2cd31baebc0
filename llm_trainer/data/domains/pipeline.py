"""Prepares domains: texts grouped by subject, split, tokenized with one tokenizer, and mixed by weight.

    output_dir/
      mixture.json                     written last: training takes the folder as one dataset with these
      weights domains.json                     what was read, kept and left out, and under which licences
      math/texts/train.jsonl, val.jsonl, test.jsonl    {"text": …, "domain": "math", "source": "load_math"}
      math/vocabulary.json             the domain's terms with their scores, with extract_vocab math/dataset/,
      tokenizer.json, metadata.json     the prepared dataset

Texts are streamed to disk as they are read, so memory grows only by about a hundred bytes per text. The same
text from two datasets counts once, in the domain of the first. Which texts a cap keeps, and which are held
out, is decided by hashes of the text and the seed, so it does not depend on any order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import JsonValue
from rich.console import Console

from llm_trainer.config.schema.data import DataConfig
from llm_trainer.config.schema.domains import DomainBridge
from llm_trainer.data.domains import builtin as builtin_domains
from llm_trainer.data.domains.loaders import DomainText, LoaderStats, read_loader
from llm_trainer.data.domains.text_store import TextStore, write_splits
from llm_trainer.data.domains.vocabulary import SCORE, Term, WordCounts, rank_terms, tokens_of_terms
from llm_trainer.data.hashing import hash_fraction
from llm_trainer.data.mixture_dataset import MIXTURE_FILE, write_mixture
from llm_trainer.data.pipeline.atomic_output import folder_lock, staging_folder
from llm_trainer.data.pipeline.pipeline import prepare_dataset
from llm_trainer.data.progress import ByteProgress
from llm_trainer.data.sources.builtin_corpus import language_reference
from llm_trainer.data.sources.presplit_source import PresplitSource
from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.errors import DataError

DOMAINS_FILE = "domains.json"
VOCABULARY_FILE = "vocabulary.json"
TEXTS = "texts"
_READ_PER_CAP = 4
"""A loader is read until it has given this many times the cap: enough to draw evenly from, without stats
millions.
"""
_SAMPLE_BYTES = 64e6
"""Bytes of training text that a tokenizer is trained on."""
_FEW_TOKENS = 4096
"""A domain with fewer training tokens gets a note."""
_MIN_GENERAL_BYTES = 100_000
"""Bytes of general text that are enough to compare the domains' words with."""


@dataclass
class DomainStats:
    """What one domain consists of.

    Attributes:
        weight: Its weight in the mixture.
        examples: Number of texts by split.
        sources: Number of texts by loader.
        tokens: Number of tokens by split.
        terms: Number of terms, with `extract_vocab`.
        first_terms: The highest scoring terms.
    """

    weight: float
    examples: dict[str, int]
    sources: dict[str, int]
    tokens: dict[str, int] = field(default_factory=dict)
    terms: int = 0
    first_terms: list[str] = field(default_factory=list)


@dataclass
class DomainsReport:
    """The result of preparing domains.

    Attributes:
        folder: The output folder.
        domains: Each domain's counts.
        loaders: Each loader's counts.
        vocab_size: The size of the tokenizer's vocabulary.
        notes: What the user should know.
    """

    folder: Path
    domains: dict[str, DomainStats]
    loaders: list[LoaderStats]
    vocab_size: int
    notes: list[str]

    def lines(self) -> list[str]:
        """Return lines for the console: each dataset, then each domain."""
        lines = []
        for loader in self.loaders:
            lines.append(loader.line())
            lines += [f"  left out: {example}" for example in loader.examples[:2]]
        total = sum(stats.weight for stats in self.domains.values())
        for name, stats in self.domains.items():
            counts = ", ".join(f"{count:,} {split}" for split, count in stats.examples.items())
            line = (
                f"{name}: {counts} examples, {stats.tokens.get('train', 0):,} training tokens, "
                f"{stats.weight / total:.1%} of the mixture"
            )
            lines.append(line + (f"; terms: {', '.join(stats.first_terms)}, …" if stats.first_terms else ""))
        return [*lines, f"tokenizer: {self.vocab_size:,} tokens, the same for all domains", *self.notes]


def prepare_domains(bridge: DomainBridge, console: Console | None = None) -> DomainsReport:
    """Prepare the domains of a domain bridge in its `output_dir`.

    Args:
        bridge: The loaders and settings.
        console: Where progress is shown.

    Raises:
        DataError: Datasets are neither local nor on the hub (all of them are named in one message, unless
            `skip_unavailable` is set), or no text is left.
    """
    if not bridge.loaders:
        raise DataError("the domain bridge names no loaders; --list_loaders prints the available ones")
    return _prepare(bridge, lambda store, loaders: _read_all(bridge, store, loaders, console), console)


def prepare_builtin_domains(
    bridge: DomainBridge, console: Console | None = None, exercises: int = builtin_domains.NUM_EXERCISES
) -> DomainsReport:
    """Prepare the built-in domains, which need no network, in a bridge's `output_dir`.

    Args:
        bridge: The weights, fractions and caps; its loaders are not read.
        console: Where progress is shown.
        exercises: Number of exercises of each domain that has them.
    """

    def read(store: TextStore, loaders: list[LoaderStats]) -> list[str]:
        stats = LoaderStats(
            builtin_domains.NAME, "this Python installation, and exercises generated from the seed"
        )
        loaders.append(stats)
        for text in builtin_domains.builtin_texts(bridge.seed, exercises):
            stats.records, stats.texts = stats.records + 1, stats.texts + 1
            _store(store, text, stats)
        return []

    return _prepare(bridge, read, console)


_Reader = Callable[[TextStore, list[LoaderStats]], list[str]]


def _prepare(bridge: DomainBridge, read: _Reader, console: Console | None) -> DomainsReport:
    folder = Path(bridge.output_dir)
    with folder_lock(folder):
        loaders: list[LoaderStats] = []
        with staging_folder(folder) as staging, ExitStack() as stack:
            store = stack.enter_context(TextStore(staging))
            notes = read(store, loaders)
            # Until the end of the preparation, the folder must not look complete.
            (folder / MIXTURE_FILE).unlink(missing_ok=True)
            domains = _write_domains(bridge, store, folder, loaders)
        tokenizer = _tokenizer(bridge, list(domains), folder, console)
        tokenizer = _extract_vocab(bridge, domains, folder, tokenizer, notes)
        for name, stats in domains.items():
            _print(console, f"{name}: tokenizing")
            summary = prepare_dataset(
                _data_config(bridge),
                folder / name,
                console=console,
                tokenizer=tokenizer,
                source=_split_source(folder, name),
            )
            notes += [f"{name}: {note}" for note in summary.metadata.notes]
            stats.tokens = {split: found.tokens for split, found in summary.metadata.splits.items()}
            if stats.tokens["train"] < _FEW_TOKENS:
                notes.append(
                    f"{name}: only {stats.tokens['train']:,} training tokens; the model's context must be "
                    "shorter than that"
                )
        report = DomainsReport(folder, domains, loaders, tokenizer.vocab_size, notes)
        _write_json(folder / DOMAINS_FILE, _as_json(report, bridge))
        weights = {name: stats.weight for name, stats in domains.items()}
        write_mixture(folder, {name: folder / name for name in domains}, weights=weights)
    return report


def _split_source(folder: Path, domain: str) -> PresplitSource:
    """The texts of a domain, by split."""
    return PresplitSource(folder / domain / TEXTS, domain)


def _data_config(bridge: DomainBridge) -> DataConfig:
    """How one domain is prepared: it is split already, and exact duplicates are already removed."""
    near: Literal["near", "none"] = "near" if bridge.deduplicate == "near" else "none"
    return DataConfig(
        val_ratio=bridge.val_ratio,
        test_ratio=bridge.test_ratio,
        seed=bridge.seed,
        deduplicate=near,
        num_workers=bridge.num_workers,
    )


def _read_all(
    bridge: DomainBridge, store: TextStore, loaders: list[LoaderStats], console: Console | None
) -> list[str]:
    """Read every loader; returns notes. Raises DataError that names each dataset that is not available."""
    definitions, local_dir = bridge.all_loaders(), Path(bridge.local_dir)
    missing = []
    for name in bridge.loaders:
        stats, max_texts = LoaderStats(name), _max_texts(bridge, definitions[name].domains())
        _print(console, f"{name}: reading")
        try:
            with ByteProgress(console, name, None) as progress:
                for text in read_loader(
                    stats, definitions[name], bridge.options(name), local_dir, bridge.seed, max_texts
                ):
                    progress.advance(len(text.text))
                    _store(store, text, stats)
        except DataError as error:
            missing.append(f"  {name}: {error}" + (f", after {stats.texts:,} texts" if stats.texts else ""))
            if not stats.records:
                continue
        loaders.append(stats)
    if missing and (not bridge.skip_unavailable or not loaders):
        raise DataError(
            f"{len(missing)} of {len(bridge.loaders)} datasets are not available:\n"
            + "\n".join(missing)
            + "\n"
            "Without a network, put each as a file or a folder with the same fields into "
            f"{local_dir}, named after its loader ({local_dir}/load_math.jsonl, {local_dir}/load_math/…), "
            "or give its path in the bridge file; --skip_unavailable continues without them"
        )
    return [f"left out because it is not available: {line.strip()}" for line in missing]


def _max_texts(bridge: DomainBridge, domains: Iterable[str]) -> int | None:
    """After how many texts of a loader with these domains reading stops."""
    caps = [bridge.cap(domain) for domain in domains]
    return None if None in caps else _READ_PER_CAP * max(cap for cap in caps if cap is not None)


def _store(store: TextStore, text: DomainText, stats: LoaderStats) -> None:
    if not store.add(text):
        stats.left_out["repeated"] += 1
        stats.texts -= 1


def _write_domains(
    bridge: DomainBridge, store: TextStore, folder: Path, loaders: Sequence[LoaderStats]
) -> dict[str, DomainStats]:
    """Write each domain's splits. Raises DataError if no domain has a text."""
    domains = {}
    for name in store.domains():
        counts, sources = write_splits(store, name, folder / name / TEXTS, bridge)
        domains[name] = DomainStats(bridge.domain_weights.get(name, 1.0), counts, sources)
    if not domains:
        raise DataError(
            "no text is left in any domain:\n" + "\n".join(f"  {stats.line()}" for stats in loaders)
        )
    return domains


def _tokenizer(
    bridge: DomainBridge, domains: Sequence[str], folder: Path, console: Console | None
) -> Tokenizer:
    """The tokenizer that the bridge names, else one trained on the training texts of all domains."""
    if bridge.tokenizer_path is not None:
        return Tokenizer.load(bridge.tokenizer_path)
    sources = [_split_source(folder, name) for name in domains]
    size = sum(source.size() * source.fraction("train") for source in sources)
    _print(
        console,
        f"training a tokenizer of at most {bridge.tokenizer_vocab_size:,} tokens on "
        f"{min(size, _SAMPLE_BYTES) / 1e6:.1f} MB of training text",
    )
    return Tokenizer.train("bpe", _training_sample(sources, size), bridge.tokenizer_vocab_size)


def _training_sample(sources: Iterable[PresplitSource], size: float) -> Iterator[str]:
    """Training texts, about `_SAMPLE_BYTES` of them, drawn by hash."""
    for source in sources:
        for text in source.texts("train"):
            if size <= _SAMPLE_BYTES or hash_fraction(text, "tokenizer sample") < _SAMPLE_BYTES / size:
                yield text


def _extract_vocab(
    bridge: DomainBridge,
    domains: Mapping[str, DomainStats],
    folder: Path,
    tokenizer: Tokenizer,
    notes: list[str],
) -> Tokenizer:
    """Write each domain's terms (`extract_vocab`), and return the tokenizer, with the terms (`add_terms`)."""
    if not bridge.extract_vocab:
        for name in domains:
            (folder / name / VOCABULARY_FILE).unlink(missing_ok=True)
        return tokenizer
    found = extract_terms({name: _split_source(folder, name) for name in domains}, bridge.vocab_size)
    for name, (general, ranked) in found.items():
        content: dict[str, JsonValue] = {
            "domain": name,
            "score": SCORE,
            "general": general,
            "terms": [asdict(term) for term in ranked],
        }
        _write_json(folder / name / VOCABULARY_FILE, content)
        domains[name].terms, domains[name].first_terms = len(ranked), [term.term for term in ranked[:5]]
    if not bridge.add_terms:
        return tokenizer
    candidates = tokens_of_terms([ranked for _, ranked in found.values()], ())
    split_words = [
        word for word, ids in zip(candidates, tokenizer.encode_batch(candidates), strict=True) if len(ids) > 1
    ]
    notes.append(
        f"{len(split_words):,} of {len(candidates):,} terms were several tokens each, and are one token now"
    )
    return tokenizer.with_added_tokens(split_words)


def extract_terms(sources: Mapping[str, PresplitSource], limit: int) -> dict[str, tuple[str, list[Term]]]:
    """Find the terms of each domain by comparison with general text.

    General text is the domain `general`, if it is large enough; for `general` itself, and without one, it is
    Python's language reference.

    Args:
        sources: The texts of each domain.
        limit: The most terms per domain.

    Returns:
        For each domain, the name of the general text and the terms, best first.
    """
    counts = {name: WordCounts.from_texts(source.texts("train")) for name, source in sources.items()}
    reference = WordCounts.from_texts(text for _, text in language_reference())
    has_general = (
        "general" in sources
        and sources["general"].size() * sources["general"].fraction("train") >= _MIN_GENERAL_BYTES
    )
    found = {}
    for name, words in counts.items():
        uses_general = has_general and name != "general"
        label = "the domain general" if uses_general else "Python's language reference"
        found[name] = (label, rank_terms(words, counts["general"] if uses_general else reference, limit))
    return found


def _as_json(report: DomainsReport, bridge: DomainBridge) -> dict[str, JsonValue]:
    definitions = bridge.all_loaders()
    loaders: list[JsonValue] = []
    for stats in report.loaders:
        definition = definitions.get(stats.loader)
        entry: dict[str, JsonValue] = {
            "loader": stats.loader,
            "origin": stats.origin,
            "records": stats.records,
            "texts": stats.texts,
            "left_out": dict(stats.left_out),
            "licence": definition.licence
            if definition is not None
            else "that of the Python installation; generated exercises have none",
        }
        loaders.append(entry)
    domains: dict[str, JsonValue] = {name: asdict(stats) for name, stats in report.domains.items()}
    return {
        "domains": domains,
        "loaders": loaders,
        "tokenizer_ids": report.vocab_size,
        "seed": bridge.seed,
        "notes": list(report.notes),
    }


def _write_json(file: Path, content: dict[str, JsonValue]) -> None:
    temporary = file.with_name(f".{file.name}.partial")
    temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)


def _print(console: Console | None, line: str) -> None:
    if console is not None:
        console.print(line, markup=False, highlight=False)
