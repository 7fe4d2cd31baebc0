"""Domains: texts of several data sets gathered by what they are about, split, tokenised with one tokenizer,
and mixed by weight.

    output_dir/
      mixture.json                     written last: training takes the folder as one corpus in these shares
      domains.json                     what was read, kept and left out, and under which licences
      math/texts/train.jsonl, val.jsonl, test.jsonl    {"text": …, "domain": "math", "source": "load_math"}
      math/vocabulary.json             the domain's terms with their scores, where asked for
      math/dataset/, tokenizer.json, metadata.json     the prepared folder

Texts are streamed to disk as they come, so memory does not grow with them but for about a hundred bytes each.
The same text from two data sets counts once, in the domain of the first. What a cap leaves and what is held
out is decided by hashes of the text and the seed: it depends on no order.
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
from llm_trainer.data.mixture_dataset import MIXTURE_FILE, write_mixture
from llm_trainer.data.pipeline import atomic_output as staging
from llm_trainer.data.pipeline.pipeline import prepare_dataset
from llm_trainer.data.pipeline.splits import hash_fraction
from llm_trainer.data.progress import ByteProgress
from llm_trainer.data.sources.builtin_corpus import language_reference
from llm_trainer.data.sources.presplit_source import PresplitSource
from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.errors import DataError

DOMAINS_FILE = "domains.json"
VOCABULARY_FILE = "vocabulary.json"
TEXTS = "texts"
_SPREAD = 4  # a loader is read until it has given so many times the cap: enough to draw evenly from, without reading millions
_SAMPLE_BYTES = 64e6  # of training text that a tokenizer learns from
_FEW_TOKENS = 4096  # a domain with fewer of them is pointed out
_ENOUGH_GENERAL = 100_000  # bytes of general text to hold the domains' words against


@dataclass
class DomainStats:
    """One domain: examples and tokens by split, how much there is of each source, its weight, and its first
    terms.
    """

    weight: float
    examples: dict[str, int]
    sources: dict[str, int]
    tokens: dict[str, int] = field(default_factory=dict)
    terms: int = 0
    first_terms: list[str] = field(default_factory=list)


@dataclass
class DomainsReport:
    """What came of it."""

    folder: Path
    domains: dict[str, DomainStats]
    readings: list[LoaderStats]
    tokenizer_ids: int
    notes: list[str]

    def lines(self) -> list[str]:
        """For the console: each data set, then each domain."""
        lines = []
        for reading in self.readings:
            lines.append(reading.line())
            lines += [f"  left out: {example}" for example in reading.examples[:2]]
        total = sum(facts.weight for facts in self.domains.values())
        for name, facts in self.domains.items():
            counts = ", ".join(f"{count:,} {split}" for split, count in facts.examples.items())
            line = f"{name}: {counts} examples, {facts.tokens.get('train', 0):,} training tokens, {facts.weight / total:.1%} of the mixture"
            lines.append(line + (f"; terms: {', '.join(facts.first_terms)}, …" if facts.first_terms else ""))
        return [*lines, f"tokenizer: {self.tokenizer_ids:,} ids, one for all domains", *self.notes]


def prepare_domains(bridge: DomainBridge, console: Console | None = None) -> DomainsReport:
    """Everything that the bridge asks for, in its `output_dir`.

    Raises DataError where a data set can be found neither locally nor on the hub (all of them in one message, unless
    `skip_unavailable`), and where nothing is left to train on.
    """
    if not bridge.loaders:
        raise DataError("the domain bridge names no loaders; `--list_loaders` prints those that there are")
    return _prepare(
        bridge, lambda gathered, readings: _read_all(bridge, gathered, readings, console), console
    )


def prepare_builtin_domains(
    bridge: DomainBridge, console: Console | None = None, exercises: int = builtin_domains.EXERCISES
) -> DomainsReport:
    """The built-in domains in the bridge's `output_dir`, by its weights, ratios and caps; its loaders are not
    read.
    """

    def read(gathered: TextStore, readings: list[LoaderStats]) -> list[str]:
        reading = LoaderStats(
            builtin_domains.NAME, "this Python installation, and exercises made from the seed"
        )
        readings.append(reading)
        for example in builtin_domains.builtin_examples(bridge.seed, exercises):
            reading.records, reading.texts = reading.records + 1, reading.texts + 1
            _keep(gathered, example, reading)
        return []

    return _prepare(bridge, read, console)


_Reader = Callable[[TextStore, list[LoaderStats]], list[str]]


def _prepare(bridge: DomainBridge, read: _Reader, console: Console | None) -> DomainsReport:
    folder = Path(bridge.output_dir)
    with staging.folder_lock(folder):
        readings: list[LoaderStats] = []
        with staging.staging_folder(folder) as workplace, ExitStack() as stack:
            gathered = stack.enter_context(TextStore(workplace))
            notes = read(gathered, readings)
            (folder / MIXTURE_FILE).unlink(
                missing_ok=True
            )  # until the end the folder does not pass for whole
            domains = _split(bridge, gathered, folder, readings)
        tokenizer = _with_terms(
            bridge, domains, folder, _tokenizer(bridge, list(domains), folder, console), notes
        )
        for name, facts in domains.items():
            _tell(console, f"{name}: tokenising")
            config = _data_config(bridge)
            summary = prepare_dataset(
                config, folder / name, console=console, tokenizer=tokenizer, source=_texts(folder, name)
            )
            notes += [f"{name}: {note}" for note in summary.metadata.notes]
            facts.tokens = {split: found.tokens for split, found in summary.metadata.splits.items()}
            if facts.tokens["train"] < _FEW_TOKENS:
                notes.append(
                    f"{name}: only {facts.tokens['train']:,} training tokens; the model's context must be shorter than that"
                )
        result = DomainsReport(folder, domains, readings, tokenizer.vocab_size, notes)
        _write_json(folder / DOMAINS_FILE, _as_json(result, bridge))
        weights = {name: facts.weight for name, facts in domains.items()}
        write_mixture(folder, {name: folder / name for name in domains}, weights=weights)
    return result


def _texts(folder: Path, domain: str) -> PresplitSource:
    """The splits of a domain as texts."""
    return PresplitSource(folder / domain / TEXTS, domain)


def _data_config(bridge: DomainBridge) -> DataConfig:
    """How one domain is prepared: its splits are given, what is the same was left out before."""
    near: Literal["near", "none"] = "near" if bridge.deduplicate == "near" else "none"
    return DataConfig(
        val_ratio=bridge.val_ratio,
        test_ratio=bridge.test_ratio,
        seed=bridge.seed,
        deduplicate=near,
        num_workers=bridge.num_workers,
    )


def _read_all(
    bridge: DomainBridge, gathered: TextStore, readings: list[LoaderStats], console: Console | None
) -> list[str]:
    """Read every loader; returns notes. Raises DataError that names each data set that cannot be had."""
    rows, local_dir = bridge.rows(), Path(bridge.local_dir)
    missing = []
    for name in bridge.loaders:
        reading, most = LoaderStats(name), _most(bridge, rows[name].domains())
        _tell(console, f"{name}: reading")
        try:
            with ByteProgress(console, name, None) as progress:
                for example in read_loader(
                    reading, rows[name], bridge.options(name), local_dir, bridge.seed, most
                ):
                    progress.advance(len(example.text))
                    _keep(gathered, example, reading)
        except DataError as error:
            missing.append(
                f"  {name}: {error}" + (f", after {reading.texts:,} texts" if reading.texts else "")
            )
            if not reading.records:
                continue
        readings.append(reading)
    if missing and (not bridge.skip_unavailable or not readings):
        raise DataError(
            f"{len(missing)} of {len(bridge.loaders)} data sets cannot be had:\n" + "\n".join(missing) + "\n"
            f"Without a network, put each as a file or a folder with the same fields into {local_dir} under its loader's name "
            f"({local_dir}/load_math.jsonl, {local_dir}/load_math/…), or give its path in the bridge file; "
            "--skip_unavailable goes on without them"
        )
    return [f"left out, since it cannot be had: {line.strip()}" for line in missing]


def _most(bridge: DomainBridge, domains: Iterable[str]) -> int | None:
    """How many texts of a loader with these domains are read at most."""
    caps = [bridge.cap(domain) for domain in domains]
    return None if None in caps else _SPREAD * max(cap for cap in caps if cap is not None)


def _keep(gathered: TextStore, example: DomainText, reading: LoaderStats) -> None:
    if not gathered.add(example):
        reading.left_out["repeated"] += 1
        reading.texts -= 1


def _split(
    bridge: DomainBridge, gathered: TextStore, folder: Path, readings: Sequence[LoaderStats]
) -> dict[str, DomainStats]:
    """Write each domain's splits; raises DataError where no domain has a text."""
    domains = {}
    for name in gathered.domains():
        counts, sources = write_splits(gathered, name, folder / name / TEXTS, bridge)
        domains[name] = DomainStats(bridge.domain_weights.get(name, 1.0), counts, sources)
    if not domains:
        raise DataError(
            "no text is left in any domain:\n" + "\n".join(f"  {reading.line()}" for reading in readings)
        )
    return domains


def _tokenizer(
    bridge: DomainBridge, domains: Sequence[str], folder: Path, console: Console | None
) -> Tokenizer:
    """The tokenizer that is named, else one learned from the training texts of all domains."""
    if bridge.tokenizer_path is not None:
        return Tokenizer.load(bridge.tokenizer_path)
    sources = [_texts(folder, name) for name in domains]
    size = sum(source.size() * source.share("train") for source in sources)
    megabytes = min(size, _SAMPLE_BYTES) / 1e6
    _tell(
        console,
        f"learning a tokenizer of at most {bridge.tokenizer_vocab_size:,} ids from {megabytes:.1f} MB of training text",
    )
    return Tokenizer.train("bpe", _sample(sources, size), bridge.tokenizer_vocab_size)


def _sample(sources: Iterable[PresplitSource], size: float) -> Iterator[str]:
    """Training texts, about `_SAMPLE_BYTES` of them, drawn by hash."""
    for source in sources:
        for text in source.texts("train"):
            if size <= _SAMPLE_BYTES or hash_fraction(text, "tokenizer sample") < _SAMPLE_BYTES / size:
                yield text


def _with_terms(
    bridge: DomainBridge,
    domains: Mapping[str, DomainStats],
    folder: Path,
    tokenizer: Tokenizer,
    notes: list[str],
) -> Tokenizer:
    """Collect and write each domain's terms, where asked for; the tokenizer, with these as words if that was
    asked for too.
    """
    if not bridge.extract_vocab:
        for name in domains:
            (folder / name / VOCABULARY_FILE).unlink(missing_ok=True)
        return tokenizer
    found = extract_terms({name: _texts(folder, name) for name in domains}, bridge.vocab_size)
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
        f"{len(split_words):,} of {len(candidates):,} terms were several tokens, and are one each now"
    )
    return tokenizer.with_added_tokens(split_words)


def extract_terms(sources: Mapping[str, PresplitSource], limit: int) -> dict[str, tuple[str, list[Term]]]:
    """Domain → (what its words were held against, its terms). That is the domain `general`, where there is
    enough of it; for `general` itself, and without one, Python's language reference.
    """
    counts = {name: WordCounts.of(source.texts("train")) for name, source in sources.items()}
    reference = WordCounts.of(text for _, text in language_reference())
    has_general = (
        "general" in sources
        and sources["general"].size() * sources["general"].share("train") >= _ENOUGH_GENERAL
    )
    found = {}
    for name, words in counts.items():
        uses_general = has_general and name != "general"
        label = "the domain general" if uses_general else "Python's language reference"
        found[name] = (label, rank_terms(words, counts["general"] if uses_general else reference, limit))
    return found


def _as_json(result: DomainsReport, bridge: DomainBridge) -> dict[str, JsonValue]:
    rows = bridge.rows()
    loaders: list[JsonValue] = []
    for reading in result.readings:
        row = rows.get(reading.loader)
        entry: dict[str, JsonValue] = {
            "loader": reading.loader,
            "origin": reading.origin,
            "records": reading.records,
            "texts": reading.texts,
            "left_out": dict(reading.left_out),
            "licence": row.licence
            if row is not None
            else "of the Python installation; made exercises have none",
        }
        loaders.append(entry)
    domains: dict[str, JsonValue] = {name: asdict(facts) for name, facts in result.domains.items()}
    return {
        "domains": domains,
        "loaders": loaders,
        "tokenizer_ids": result.tokenizer_ids,
        "seed": bridge.seed,
        "notes": list(result.notes),
    }


def _write_json(file: Path, content: dict[str, JsonValue]) -> None:
    temporary = file.with_name(f".{file.name}.partial")
    temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)


def _tell(console: Console | None, line: str) -> None:
    if console is not None:
        console.print(line, markup=False, highlight=False)
