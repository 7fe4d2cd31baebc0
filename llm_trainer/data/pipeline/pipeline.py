"""From text to a prepared folder, in six stages: read, deduplicate, split, tokenizer, encode, assemble.

A source is a sequence of units (`reading/documents.py`). No copy of the text is kept: each stage that needs a
unit's text reads and cleans it again, and leaves behind something small. Every result is found again by its
key, a hash of what it was made from (`stages.py`), so a run that was killed goes on, a changed input or
option redoes what depends on it and nothing else, and the bytes are the same whoever did the work and in
whatever order (`executors.py`). Memory does not grow with the corpus but for a few bytes a document.

The prepared folder appears whole or not at all (`staging.py`), metadata.json last. Its own key is the hash of
the contents and the options alone: the same again is a hit, in another folder or after touching the files
too.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydantic import JsonValue
from rich.console import Console

from llm_trainer.config.schema.data import DataConfig
from llm_trainer.data.cleaning.cleaner import Cleaning
from llm_trainer.data.deduplication.minhash import MinHasher
from llm_trainer.data.metadata import FORMAT, METADATA_FILE, Metadata, TokenizerFacts
from llm_trainer.data.pipeline import atomic_output as staging
from llm_trainer.data.pipeline import deduplicate as duplicates
from llm_trainer.data.pipeline import write_shards as assembly
from llm_trainer.data.pipeline.document_index import EXAMPLES, ReadTask, UnitTable
from llm_trainer.data.pipeline.executors import open_executor
from llm_trainer.data.pipeline.split_plan import Corpus, plan_corpus
from llm_trainer.data.pipeline.splits import Shares
from llm_trainer.data.pipeline.stage_cache import VERSIONS, Stages, key_of
from llm_trainer.data.pipeline.summary import PICTURE_FILE, PreparedSummary, lengths_picture
from llm_trainer.data.pipeline.tokenize import EncodeTask, SampleTask, load_tokenizer, read_sample, too_short
from llm_trainer.data.prepared_dataset import open_prepared
from llm_trainer.data.progress import ByteProgress
from llm_trainer.data.sampling.packing import Packing, packing_lines
from llm_trainer.data.sampling.window_sampler import require_window
from llm_trainer.data.sources.base import Source, Unit
from llm_trainer.data.sources.builtin_corpus import BuiltinSource
from llm_trainer.data.sources.file_source import FileSource
from llm_trainer.data.sources.hub_source import HubSource
from llm_trainer.data.token_shards import TokenDataset
from llm_trainer.data.tokenization.factory import (
    given_tokenizer,
    kind_to_train,
    tokenizer_options,
    train_tokenizer,
)
from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.data.tokenization.vocab_training import training_estimate
from llm_trainer.errors import DataError, UsageError

__all__ = ["PreparedSummary", "open_source", "prepare"]

_LENGTHS = 200_000  # documents of a split that its picture and the waste of packing are measured on


def prepare(
    config: DataConfig,
    output_dir: str | Path,
    *,
    console: Console | None = None,
    tokenizer: Tokenizer | None = None,
    source: Source | None = None,
    with_texts: bool = False,
) -> PreparedSummary:
    """Prepare `config.input` (a file, a folder, or "builtin") or `config.dataset_name` into `output_dir`.

    `tokenizer` and `source` override the settings' choice; `with_texts` writes the splits as texts too. Progress goes to `console`. Raises
    UsageError for settings that do not fit together and DataError for a corpus that cannot be used: missing, nothing readable in it, or
    shorter than one window of `max_length`.
    """
    folder = Path(output_dir)
    shares = Shares.of(config)
    if with_texts:
        _refuse_overwriting(config, folder)
    source = source or open_source(config, folder)
    given = tokenizer or given_tokenizer(config)
    cleaning = Cleaning.of(config)
    hasher = MinHasher.of(config) if config.deduplicate == "near" else None
    units = source.units()
    if console is not None:
        _announce(source, console)
    options = {**_options(config, shares, given, cleaning, hasher), **({"texts": True} if with_texts else {})}
    with staging.exclusive(folder):
        hashes = _content_hashes(units, config.num_workers, console)
        key = key_of("assemble", options, [*hashes])
        found = _find_prepared(folder, key)
        if found is not None:
            return PreparedSummary(folder, found, from_cache=True)
        with (
            staging.clear_about_space(folder),
            open_executor(config.executor, config.num_workers, config.ray_address) as executor,
        ):
            stages = Stages.under(folder, executor, console)
            preparation = _Preparation(
                config, source.name, shares, given, cleaning, hasher, with_texts, stages, console
            )
            with staging.staged(folder) as workplace:
                result = preparation.run(units, hashes, workplace, options, key)
                staging.publish(workplace, folder, result.metadata)
            stages.forget_others() if config.keep_stages else stages.remove()
    return dataclasses.replace(result, folder=folder)


@dataclass
class _Preparation:
    """One run from a source to staged files."""

    config: DataConfig
    source_name: str
    shares: Shares
    given: Tokenizer | None
    cleaning: Cleaning
    hasher: MinHasher | None
    with_texts: bool
    stages: Stages
    console: Console | None
    rejected: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def run(
        self,
        units: Sequence[Unit],
        hashes: Sequence[str],
        workplace: Path,
        options: dict[str, JsonValue],
        key: str,
    ) -> PreparedSummary:
        """The six stages."""
        tables = self.read(units, hashes)
        states = self.deduplicate(tables)
        corpus, leaks = self.split(tables, states)
        tokenizer = self.tokenizer(tables, corpus)
        encoded = self.encode(corpus, tokenizer)
        return self.assemble(corpus, leaks, tokenizer, encoded, workplace, options, key)

    def read(self, units: Sequence[Unit], hashes: Sequence[str]) -> list[UnitTable]:
        """1: each unit's documents as a table. Raises DataError where nothing in the corpus can be used."""
        tasks = [
            ReadTask(unit, self.cleaning, self.hasher, self._is_character_level, self.config.keep_rejected)
            for unit in units
        ]
        keys = [task.key(content) for task, content in zip(tasks, hashes, strict=True)]
        folders = self.stages.results("read", dict(zip(keys, tasks, strict=True)), "reading")
        tables = [UnitTable(unit, key, folders[key]) for unit, key in zip(units, keys, strict=True)]
        for table in tables:
            self.rejected += table.rejected()
            self.examples += table.examples()[: EXAMPLES - len(self.examples)]
        if not any(table.rows()["kept"].any() for table in tables):
            counts = (
                ", ".join(f"{count} {reason}" for reason, count in self.rejected.items())
                or "no documents at all"
            )
            where = f" — {'; '.join(self.examples)}" if self.examples else ""
            raise DataError(f"nothing usable in {self.source_name}: {counts}{where}. Give utf-8 text")
        return tables

    def deduplicate(self, tables: Sequence[UnitTable]) -> np.ndarray:
        """2: what becomes of each document (see `duplicates`), uint8 `(documents,)`."""
        states = duplicates.kept_only(tables)
        if self.config.deduplicate == "none":
            return states

        def make(folder: Path) -> None:
            duplicates.mark_exact(tables, states, self.console)
            if self.hasher is not None:
                duplicates.mark_near(tables, states, self.hasher, self.console)
            np.save(folder / duplicates.DUPLICATES_FILE, states, allow_pickle=False)

        near: JsonValue = None if self.hasher is None else self.hasher.key
        key = key_of("deduplicate", near, [table.key for table in tables])
        states = duplicates.load_states(self.stages.result("deduplicate", key, make))
        self.rejected += Counter(
            {reason: int((states == state).sum()) for state, reason in duplicates.REASONS.items()}
        )
        return states

    def split(self, tables: Sequence[UnitTable], states: np.ndarray) -> tuple[Corpus, int]:
        """3: each document's split; and how many held-out documents have an equal or near one in another
        split.
        """
        with self.stages.timed("split"):
            corpus = plan_corpus(tables, states, self.cleaning, self.shares, self.config.seed)
            return corpus, duplicates.count_leaks(tables, states, corpus.codes, self.hasher, self.console)

    def tokenizer(self, tables: Sequence[UnitTable], corpus: Corpus) -> Path:
        """4: the folder of the tokenizer: the given one, or one that has learned from a sample of the
        training split.
        """
        config, given = self.config, self.given
        options = tokenizer_options(config, given)
        if given is not None:
            return self.stages.result("tokenizer", key_of("tokenizer", options), given.save)
        if (
            self._is_character_level
        ):  # an alphabet is no statistic: characters of the held-out text get an id as well
            alphabet = sorted(set().union(*(table.alphabet() for table in tables)))
            characters = Tokenizer.from_alphabet(alphabet).with_special_tokens(config.special_tokens)
            return self.stages.result(
                "tokenizer", key_of("tokenizer", options, "".join(alphabet)), characters.save
            )
        cap = config.tokenizer_sample_megabytes * 1e6
        size = min(cap, corpus.training_bytes)
        samples = self._sample(corpus, size / max(1, corpus.training_bytes))
        if (
            next(read_sample(samples.values(), cap), None) is None
        ):  # a small cap, and documents that are all larger
            samples = self._sample(corpus, 1.0)

        def make(folder: Path) -> None:
            if self.console is not None:
                what = f"learning {config.vocab_size} ids from {size / 1e6:.1f} MB of training text"
                self.console.print(f"{what}, {training_estimate(size)}", highlight=False)
            with ByteProgress(self.console, "learning", int(size)) as progress:
                train_tokenizer(config, read_sample(samples.values(), cap), progress).save(folder)

        return self.stages.result("tokenizer", key_of("tokenizer", options, [*samples]), make)

    def encode(self, corpus: Corpus, tokenizer: Path) -> list[Path]:
        """5: the folder of each unit's token files."""
        states = corpus.states_of_units() if self.config.keep_rejected else itertools.repeat(None)
        digest, least = load_tokenizer(tokenizer).hash, self.config.min_length
        tasks = [
            EncodeTask(unit, tokenizer, digest, least, own, self.with_texts)
            for unit, own in zip(corpus.units, states, strict=False)
        ]
        keys = [task.key for task in tasks]
        folders = self.stages.results("encode", dict(zip(keys, tasks, strict=True)), "encoding")
        return [folders[key] for key in keys]

    def assemble(
        self, corpus: Corpus, leaks: int, tokenizer_folder: Path, encoded: list[Path], workplace: Path,
        options: dict[str, JsonValue], key: str,
    ) -> PreparedSummary:  # fmt: skip
        """6: shards, metadata and summary in `workplace`. Raises DataError where the training split cannot be
        trained on.
        """
        with self.stages.timed("assemble"):
            tokenizer = load_tokenizer(tokenizer_folder)
            tokenizer.save(workplace)
            opened = assembly.write_shards(encoded, corpus.splits, tokenizer, workplace, self.console)
            if self.with_texts:
                assembly.write_texts(encoded, corpus.splits, workplace, self.console)
            if self.config.keep_rejected:
                assembly.write_rejected(
                    [*dict.fromkeys(unit.table.folder for unit in corpus.units), *dict.fromkeys(encoded)],
                    workplace,
                )
            cut, dropped = assembly.total(encoded, "cut"), assembly.total(encoded, "dropped")
            kept = int((corpus.states == duplicates.KEPT).sum())
            rejected = self.rejected + Counter({too_short(self.config.min_length): dropped})
            documents = sum(tokens.num_documents for tokens in opened.values())
            metadata = Metadata(
                format=FORMAT, key=key, source=self.source_name, max_length=self.config.max_length, split_method=corpus.method,
                tokenizer=TokenizerFacts(
                    kind=self.config.tokenizer_path or tokenizer.kind, vocab_size=tokenizer.vocab_size, hash=tokenizer.hash,
                    eos_id=tokenizer.eos_id,
                ),
                splits={split: assembly.facts_of(tokens, workplace / "dataset", split) for split, tokens in opened.items()},
                documents_in=kept + self.rejected.total(), documents_kept=kept - dropped, documents_rejected=dict(sorted(rejected.items())),
                rejected_examples=self.examples, documents_cut=cut, options=options, notes=self._check(opened),
                supervised_end_share=(documents - cut) / documents if tokenizer.eos_id is not None else 0.0,
                leaks=leaks, leak_check="exact" if self.hasher is None else "near",
            )  # fmt: skip
            lengths = {split: assembly.document_lengths(tokens, _LENGTHS) for split, tokens in opened.items()}
            (workplace / PICTURE_FILE).write_text(lengths_picture(lengths), encoding="utf-8")
        packing = packing_lines(lengths["train"], self.config.max_length, Packing.of(self.config))
        made = PreparedSummary(
            Path(), metadata, False, self.stages.made, self.stages.found, self.stages.seconds, packing
        )
        made.write(workplace)
        return made

    @property
    def _is_character_level(self) -> bool:
        return self.given is None and kind_to_train(self.config) == "char"

    def _sample(self, corpus: Corpus, share: float) -> dict[str, Path]:
        tasks = [SampleTask(planned, share) for planned in corpus.units]
        return self.stages.results("sample", {task.key: task for task in tasks}, "reading for the tokenizer")

    def _check(self, opened: dict[str, TokenDataset]) -> list[str]:
        """Notes on the splits."""
        if not len(opened["train"]):
            least = self.config.min_length
            raise DataError(
                f"no training text is left of {self.source_name}; lower min_length ({least}) or give more text"
            )
        if self.config.max_length is not None and Packing.of(self.config).strategy == "greedy":
            require_window(
                opened["train"], self.config.max_length, source=self.source_name, setting="max_length"
            )
        return [
            f"the {split} split is empty: give more text, or a larger share"
            for split, tokens in opened.items()
            if not len(tokens)
        ]


def open_source(config: DataConfig, output_dir: Path) -> Source:
    """The documents that the settings name; raises UsageError where they name none or two."""
    if config.input is not None and config.dataset_name is not None:
        raise UsageError(
            f"input={config.input!r} and dataset_name={config.dataset_name!r} both name a corpus; give one"
        )
    if config.input is not None:
        if config.input == "builtin":
            return BuiltinSource()
        return FileSource(
            Path(config.input), config.text_column, config.one_document_a_line, excluded=output_dir
        )
    if config.dataset_name is not None:
        names = (config.dataset_name, config.dataset_config, config.dataset_split, config.validation_split)
        return HubSource(*names, config.text_column, streams=config.dataset_streaming)
    ways_out = "give --input with a text file, a folder or the word builtin, or --dataset_name with a name on the hub"
    raise UsageError(f"nothing to prepare: {ways_out}")


def _refuse_overwriting(config: DataConfig, folder: Path) -> None:
    """Raises UsageError where the texts of the splits would take the place of the input."""
    if config.input is not None and Path(config.input).resolve() in {
        (folder / name).resolve() for name in staging.OTHER_FORM
    }:
        raise UsageError(
            f"{config.input} would be overwritten by the texts of a split; choose another --output_dir"
        )


def _options(
    config: DataConfig, shares: Shares, given: Tokenizer | None, cleaning: Cleaning, hasher: MinHasher | None
) -> dict[str, JsonValue]:
    """Every setting that decides the result, for the key and for metadata.json; paths and numbers of workers
    do not.
    """
    return {
        **tokenizer_options(config, given),
        "cleaning": cleaning.key,
        "deduplicate": config.deduplicate if hasher is None else hasher.key,
        "keep_rejected": config.keep_rejected,
        "max_length": config.max_length,
        "min_length": config.min_length,
        "packing": Packing.of(config).to_json(),
        "shares": [shares.train, shares.validation, shares.test],
        "seed": config.seed,
        "versions": {**VERSIONS},
    }


def _content_hashes(units: Sequence[Unit], workers: int, console: Console | None) -> list[str]:
    """Each unit's content hash; threads suffice, since hashing lets go of the interpreter's lock."""
    with (
        ThreadPoolExecutor(workers) as pool,
        ByteProgress(console, "looking for changes", sum(unit.size for unit in units)) as progress,
    ):
        hashes = []
        for unit, found in zip(units, pool.map(lambda unit: unit.content_hash(), units), strict=True):
            hashes.append(found)
            progress.advance(unit.size)
        return hashes


def _find_prepared(folder: Path, key: str) -> Metadata | None:
    """The metadata of a whole result with this key."""
    if not (folder / METADATA_FILE).is_file():
        return None
    try:
        found = open_prepared(folder).metadata
    except DataError:  # damaged or of another version: made again
        return None
    return found if found.key == key else None


def _announce(source: Source, console: Console) -> None:
    if isinstance(source, BuiltinSource):
        for part, size in source.sizes().items():
            console.print(f"built-in corpus: {part}, {size / 1e6:.2f} MB", highlight=False)
