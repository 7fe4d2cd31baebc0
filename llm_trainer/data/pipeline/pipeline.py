"""Prepares text for training, in six stages: read, deduplicate, split, tokenizer, encode, assemble.

A source is a sequence of partitions (`sources/base.py`). No copy of the text is kept: each stage that needs
the text of a partition reads and cleans it again, and stores only a small result. Every result is cached
under a key, a hash of what it was made from (`stage_cache.py`). So an interrupted run resumes, a change of
the input or of an option recomputes what depends on it and nothing else, and the output is the same bytes
whichever executor did the work and in whichever order (`executors.py`). Memory grows by a few bytes per
document, and otherwise not with the corpus.

The prepared folder is published completely or not at all (`atomic_output.py`), metadata.json last. Its own
key is a hash of the contents and the options alone, so preparing the same again finds the result, also in
another folder or after the files have been touched.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import JsonValue
from rich.console import Console

from llm_trainer.config.schema.data import DataConfig
from llm_trainer.data.cleaning.cleaner import DocumentCleaner
from llm_trainer.data.deduplication.minhash import MinHasher
from llm_trainer.data.metadata import FORMAT, METADATA_FILE, Metadata, TokenizerInfo
from llm_trainer.data.pipeline.atomic_output import (
    OTHER_FORMAT,
    explain_full_disk,
    folder_lock,
    publish,
    staging_folder,
)
from llm_trainer.data.pipeline.deduplicate import (
    DUPLICATES_FILE,
    KEPT,
    REASONS,
    count_leaks,
    initial_states,
    load_states,
    mark_exact_duplicates,
    mark_near_duplicates,
)
from llm_trainer.data.pipeline.document_index import MAX_EXAMPLES, DocumentIndex, ReadTask
from llm_trainer.data.pipeline.executors import open_executor
from llm_trainer.data.pipeline.split_plan import SplitPlan, plan_splits
from llm_trainer.data.pipeline.splits import SplitRatios
from llm_trainer.data.pipeline.stage_cache import VERSIONS, StageCache, stage_key
from llm_trainer.data.pipeline.summary import HISTOGRAM_FILE, PreparationSummary, document_length_histogram
from llm_trainer.data.pipeline.tokenize import (
    EncodeTask,
    SampleTask,
    load_tokenizer,
    read_sample,
    too_short_reason,
)
from llm_trainer.data.pipeline.write_shards import (
    concat_rejected,
    document_lengths,
    split_info,
    sum_stats,
    write_shards,
    write_split_texts,
)
from llm_trainer.data.prepared_dataset import open_prepared_dataset
from llm_trainer.data.progress import ByteProgress
from llm_trainer.data.sampling.packing import Packing, format_packing_stats
from llm_trainer.data.sampling.window_sampler import check_fits_window
from llm_trainer.data.sources.base import Partition, Source
from llm_trainer.data.sources.builtin_corpus import BuiltinSource
from llm_trainer.data.sources.file_source import FileSource
from llm_trainer.data.sources.hub_source import HubSource
from llm_trainer.data.token_shards import TokenDataset
from llm_trainer.data.tokenization.factory import (
    kind_to_train,
    load_existing_tokenizer,
    tokenizer_options,
    train_tokenizer,
)
from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.data.tokenization.vocab_training import estimate_training
from llm_trainer.errors import DataError, UsageError

_MEASURED_DOCUMENTS = 200_000  # documents per split for the histogram and the statistics of packing


def prepare_dataset(
    data: DataConfig | str | Path | None = None,
    output_dir: str | Path | None = None,
    *,
    tokenizer: Tokenizer | str | Path | None = None,
    source: Source | None = None,
    with_texts: bool = False,
    console: Console | None = None,
    **settings: Any,
) -> PreparationSummary:
    """Prepare text for training: clean, deduplicate, split, tokenize and pack it into token shards.

        prepare_dataset("texts/", "data/mine", vocab_size=8192)
        prepare_dataset(dataset_name="roneneldan/TinyStories", output_dir="data/stories")
        prepare_dataset(DataConfig(input="texts/", deduplicate="near"), "data/mine")

    Calling it again with the same input and settings finds the result; after an interruption it resumes. With
    `num_workers` greater than 1 call it under `if __name__ == "__main__":`, since it starts processes.

    Args:
        data: The settings, or the text: a file, a folder, or "builtin" for the built-in corpus.
        output_dir: The prepared folder; `load_dataset` opens it.
        tokenizer: An existing tokenizer, or its file, folder or hub name; by default the settings decide,
            and without any a byte-level BPE is trained.
        source: Documents from anywhere else, instead of those that the settings name.
        with_texts: Write the texts of the splits as well.
        console: Shows progress.
        **settings: Fields of `DataConfig`, if `data` is not one.

    Returns:
        What was made or found.

    Raises:
        DataError: The corpus is missing, has no usable text, or is shorter than one row of `max_length`.
        UsageError: Settings are unknown, or do not fit together.
    """
    config = _data_config(data, settings)
    if isinstance(tokenizer, str | Path):
        config = config.model_copy(update={"tokenizer_path": str(tokenizer)})
        tokenizer = None
    if output_dir is None:
        output_dir = config.output_dir
    if output_dir is None:
        raise UsageError("no output_dir is set; give the folder for the prepared data")
    folder = Path(output_dir)
    ratios = SplitRatios.from_config(config)
    if with_texts:
        _check_input_is_not_overwritten(config, folder)
    source = source or open_source(config, folder)
    existing = tokenizer or load_existing_tokenizer(config)
    cleaner = DocumentCleaner.from_config(config)
    hasher = MinHasher.from_config(config) if config.deduplicate == "near" else None
    partitions = source.partitions()
    if console is not None:
        _print_source(source, console)
    options = _options(config, ratios, existing, cleaner, hasher)
    if with_texts:
        options["texts"] = True
    with folder_lock(folder):
        hashes = _content_hashes(partitions, config.num_workers, console)
        key = stage_key("assemble", options, [*hashes])
        found = _find_prepared(folder, key)
        if found is not None:
            return PreparationSummary(folder, found, from_cache=True)
        with (
            explain_full_disk(folder),
            open_executor(config.executor, config.num_workers, config.ray_address) as executor,
        ):
            cache = StageCache.open(folder, executor, console)
            stages = _Stages(
                config, source.name, ratios, existing, cleaner, hasher, with_texts, cache, console
            )
            with staging_folder(folder) as staging:
                summary = stages.run(partitions, hashes, staging, options, key)
                publish(staging, folder, summary.metadata)
            cache.remove_unused() if config.cache_stages else cache.remove()
    return dataclasses.replace(summary, folder=folder)


@dataclass
class _Stages:
    """The six stages of one preparation, from a source to the files in the staging folder."""

    config: DataConfig
    source_name: str
    ratios: SplitRatios
    existing: Tokenizer | None
    cleaner: DocumentCleaner
    hasher: MinHasher | None
    with_texts: bool
    cache: StageCache
    console: Console | None
    rejected: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def run(
        self,
        partitions: Sequence[Partition],
        hashes: Sequence[str],
        staging: Path,
        options: dict[str, JsonValue],
        key: str,
    ) -> PreparationSummary:
        """Run all stages; returns the summary, still without the folder."""
        indexes = self.read(partitions, hashes)
        states = self.deduplicate(indexes)
        plan, leaks = self.split(indexes, states)
        tokenizer = self.tokenizer(indexes, plan)
        encoded = self.encode(plan, tokenizer)
        return self.assemble(plan, leaks, tokenizer, encoded, staging, options, key)

    def read(self, partitions: Sequence[Partition], hashes: Sequence[str]) -> list[DocumentIndex]:
        """Stage 1: index the documents of each partition.

        Raises:
            DataError: No document of the corpus can be used.
        """
        tasks = [
            ReadTask(
                partition, self.cleaner, self.hasher, self._is_character_level, self.config.keep_rejected
            )
            for partition in partitions
        ]
        keys = [task.key(content) for task, content in zip(tasks, hashes, strict=True)]
        folders = self.cache.run_tasks("read", dict(zip(keys, tasks, strict=True)), "reading")
        indexes = [
            DocumentIndex(partition, key, folders[key])
            for partition, key in zip(partitions, keys, strict=True)
        ]
        for index in indexes:
            self.rejected += index.rejected()
            self.examples += index.examples()[: MAX_EXAMPLES - len(self.examples)]
        if not any(index.rows()["kept"].any() for index in indexes):
            counts = (
                ", ".join(f"{count} {reason}" for reason, count in self.rejected.items())
                or "it has no documents"
            )
            where = f" ({'; '.join(self.examples)})" if self.examples else ""
            raise DataError(f"no usable documents in {self.source_name}: {counts}{where}; {self._advice()}")
        return indexes

    def _advice(self) -> str:
        """What to do where no document can be used, by the most frequent reason."""
        reason = max(self.rejected, key=lambda each: self.rejected[each], default="")
        if "column" in reason:
            return "name the column that holds the text with --text_column"
        if reason.startswith("language"):
            return "change --languages"
        return "give text in UTF-8, or relax the filters"

    def deduplicate(self, indexes: Sequence[DocumentIndex]) -> np.ndarray:
        """Stage 2: the state of each document (see `deduplicate.py`), uint8 `(documents,)`."""
        states = initial_states(indexes)
        if self.config.deduplicate == "none":
            return states

        def compute(folder: Path) -> None:
            mark_exact_duplicates(indexes, states, self.console)
            if self.hasher is not None:
                mark_near_duplicates(indexes, states, self.hasher, self.console)
            np.save(folder / DUPLICATES_FILE, states, allow_pickle=False)

        near: JsonValue = None if self.hasher is None else self.hasher.key
        key = stage_key("deduplicate", near, [index.key for index in indexes])
        states = load_states(self.cache.run_here("deduplicate", key, compute))
        self.rejected += Counter({reason: int((states == state).sum()) for state, reason in REASONS.items()})
        return states

    def split(self, indexes: Sequence[DocumentIndex], states: np.ndarray) -> tuple[SplitPlan, int]:
        """Stage 3: the split of each document, and the number of held-out documents in several splits."""
        with self.cache.timed("split"):
            plan = plan_splits(indexes, states, self.cleaner, self.ratios, self.config.seed)
            return plan, count_leaks(indexes, states, plan.codes, self.hasher, self.console)

    def tokenizer(self, indexes: Sequence[DocumentIndex], plan: SplitPlan) -> Path:
        """Stage 4: the folder of the existing tokenizer, or of one trained on a sample of the text."""
        config, existing = self.config, self.existing
        options = tokenizer_options(config, existing)
        if existing is not None:
            return self.cache.run_here("tokenizer", stage_key("tokenizer", options), existing.save)
        if self._is_character_level:
            # The alphabet includes the characters of held-out text, so that it can be encoded.
            alphabet = sorted(set().union(*(index.alphabet() for index in indexes)))
            characters = Tokenizer.from_alphabet(alphabet).with_special_tokens(config.special_tokens)
            key = stage_key("tokenizer", options, "".join(alphabet))
            return self.cache.run_here("tokenizer", key, characters.save)
        max_bytes = config.tokenizer_sample_megabytes * 1e6
        size = min(max_bytes, plan.training_bytes)
        samples = self._sample(plan, size / max(1, plan.training_bytes))
        if next(read_sample(samples.values(), max_bytes), None) is None:
            # The limit is small and all documents are larger, so none was drawn.
            samples = self._sample(plan, 1.0)

        def compute(folder: Path) -> None:
            if self.console is not None:
                self.console.print(
                    f"training a tokenizer of {config.vocab_size} ids on {size / 1e6:.1f} MB of"
                    f" training text, {estimate_training(size)}",
                    highlight=False,
                )
            with ByteProgress(self.console, "training the tokenizer", int(size)) as progress:
                train_tokenizer(config, read_sample(samples.values(), max_bytes), progress).save(folder)

        return self.cache.run_here("tokenizer", stage_key("tokenizer", options, [*samples]), compute)

    def encode(self, plan: SplitPlan, tokenizer: Path) -> list[Path]:
        """Stage 5: the folder of each partition's token files."""
        states = plan.states_by_partition() if self.config.keep_rejected else itertools.repeat(None)
        tokenizer_hash, min_length = load_tokenizer(tokenizer).hash, self.config.min_length
        tasks = [
            EncodeTask(planned, tokenizer, tokenizer_hash, min_length, own_states, self.with_texts)
            for planned, own_states in zip(plan.partitions, states, strict=False)
        ]
        keys = [task.key for task in tasks]
        folders = self.cache.run_tasks("encode", dict(zip(keys, tasks, strict=True)), "encoding")
        return [folders[key] for key in keys]

    def assemble(
        self,
        plan: SplitPlan,
        leaks: int,
        tokenizer_folder: Path,
        encoded: list[Path],
        staging: Path,
        options: dict[str, JsonValue],
        key: str,
    ) -> PreparationSummary:
        """Stage 6: write shards, metadata and summary into the staging folder.

        Raises:
            DataError: The training split is empty or shorter than one row.
        """
        with self.cache.timed("assemble"):
            tokenizer = load_tokenizer(tokenizer_folder)
            tokenizer.save(staging)
            opened = write_shards(encoded, plan.splits, tokenizer, staging, self.console)
            if self.with_texts:
                write_split_texts(encoded, plan.splits, staging, self.console)
            if self.config.keep_rejected:
                read = dict.fromkeys(planned.index.folder for planned in plan.partitions)
                concat_rejected([*read, *dict.fromkeys(encoded)], staging)
            metadata = self._metadata(plan, leaks, tokenizer, opened, encoded, staging, options, key)
            lengths = {
                split: document_lengths(tokens, _MEASURED_DOCUMENTS) for split, tokens in opened.items()
            }
            (staging / HISTOGRAM_FILE).write_text(document_length_histogram(lengths), encoding="utf-8")
        packing = format_packing_stats(
            lengths["train"], self.config.max_length, Packing.from_config(self.config)
        )
        cache = self.cache
        summary = PreparationSummary(
            Path(), metadata, False, cache.num_computed, cache.num_cached, cache.seconds, packing
        )
        summary.write(staging)
        return summary

    def _metadata(
        self,
        plan: SplitPlan,
        leaks: int,
        tokenizer: Tokenizer,
        opened: dict[str, TokenDataset],
        encoded: list[Path],
        staging: Path,
        options: dict[str, JsonValue],
        key: str,
    ) -> Metadata:
        notes = self._check_splits(opened)
        cut, dropped = sum_stats(encoded, "cut"), sum_stats(encoded, "dropped")
        kept = int((plan.states == KEPT).sum())
        rejected = self.rejected + Counter({too_short_reason(self.config.min_length): dropped})
        documents = sum(tokens.num_documents for tokens in opened.values())
        return Metadata(
            format=FORMAT,
            key=key,
            source=self.source_name,
            tokenizer=TokenizerInfo(
                kind=self.config.tokenizer_path or tokenizer.kind,
                vocab_size=tokenizer.vocab_size,
                hash=tokenizer.hash,
                eos_id=tokenizer.eos_id,
            ),
            max_length=self.config.max_length,
            split_method=plan.method,
            splits={
                split: split_info(tokens, staging / "dataset", split) for split, tokens in opened.items()
            },
            documents_in=kept + self.rejected.total(),
            documents_kept=kept - dropped,
            documents_rejected=dict(sorted(rejected.items())),
            rejected_examples=self.examples,
            documents_cut=cut,
            supervised_end_share=(documents - cut) / documents if tokenizer.eos_id is not None else 0.0,
            options=options,
            notes=notes,
            leaks=leaks,
            leak_check="exact" if self.hasher is None else "near",
        )

    @property
    def _is_character_level(self) -> bool:
        return self.existing is None and kind_to_train(self.config) == "char"

    def _sample(self, plan: SplitPlan, fraction: float) -> dict[str, Path]:
        tasks = [SampleTask(planned, fraction) for planned in plan.partitions]
        return self.cache.run_tasks(
            "sample", {task.key: task for task in tasks}, "sampling text for the tokenizer"
        )

    def _check_splits(self, opened: dict[str, TokenDataset]) -> list[str]:
        """Check that the training split can be used; returns notes about the others."""
        if not len(opened["train"]):
            raise DataError(
                f"no training text is left of {self.source_name};"
                f" lower min_length ({self.config.min_length}) or give more text"
            )
        if self.config.max_length is not None and Packing.from_config(self.config).strategy == "greedy":
            check_fits_window(
                opened["train"], self.config.max_length, source=self.source_name, setting="max_length"
            )
        return [
            f"the {split} split is empty: give more text, or a larger ratio"
            for split, tokens in opened.items()
            if not len(tokens)
        ]


def open_source(config: DataConfig, output_dir: Path) -> Source:
    """Open the documents that the settings name.

    Args:
        config: `input` or `dataset_name` names the corpus.
        output_dir: A folder that is not read, even if it is inside the input.

    Raises:
        UsageError: The settings name no corpus, or two.
    """
    if config.input is not None and config.dataset_name is not None:
        raise UsageError(
            f"input={config.input!r} and dataset_name={config.dataset_name!r} both name a corpus;"
            " give only one of them"
        )
    if config.input is not None:
        if config.input == "builtin":
            return BuiltinSource()
        return FileSource(
            Path(config.input), config.text_column, config.one_document_per_line, excluded=output_dir
        )
    if config.dataset_name is not None:
        names = (config.dataset_name, config.dataset_config, config.dataset_split, config.validation_split)
        return HubSource(*names, config.text_column, streaming=config.dataset_streaming)
    raise UsageError(
        "nothing to prepare: give --input with a text file, a folder or the word builtin,"
        " or --dataset_name with the name of a dataset on the Hugging Face hub"
    )


def _data_config(data: DataConfig | str | Path | None, settings: dict[str, Any]) -> DataConfig:
    """The settings of `prepare_dataset` as a `DataConfig`."""
    if isinstance(data, DataConfig):
        if settings:
            raise UsageError(
                f"{', '.join(settings)}: settings are given as keyword arguments and in a DataConfig;"
                " put all of them into the DataConfig"
            )
        return data
    return DataConfig(**settings) if data is None else DataConfig(input=str(data), **settings)


def _check_input_is_not_overwritten(config: DataConfig, folder: Path) -> None:
    """Raise UsageError if the texts of the splits would be written over the input."""
    if config.input is not None and Path(config.input).resolve() in {
        (folder / name).resolve() for name in OTHER_FORMAT
    }:
        raise UsageError(
            f"{config.input} would be overwritten by the texts of a split; choose another --output_dir"
        )


def _options(
    config: DataConfig,
    ratios: SplitRatios,
    existing: Tokenizer | None,
    cleaner: DocumentCleaner,
    hasher: MinHasher | None,
) -> dict[str, JsonValue]:
    """The settings that decide the result, for the key and for metadata.json; paths and workers do not."""
    return {
        **tokenizer_options(config, existing),
        "cleaning": cleaner.key,
        "deduplicate": config.deduplicate if hasher is None else hasher.key,
        "keep_rejected": config.keep_rejected,
        "max_length": config.max_length,
        "min_length": config.min_length,
        "packing": Packing.from_config(config).to_json(),
        "shares": [ratios.train, ratios.validation, ratios.test],
        "seed": config.seed,
        "versions": {**VERSIONS},
    }


def _content_hashes(partitions: Sequence[Partition], workers: int, console: Console | None) -> list[str]:
    """The content hash of each partition, in threads, since hashing releases the interpreter's lock."""
    with (
        ThreadPoolExecutor(workers) as pool,
        ByteProgress(console, "checking for changes", sum(one.size for one in partitions)) as progress,
    ):
        hashes = []
        for partition, found in zip(
            partitions, pool.map(lambda one: one.content_hash(), partitions), strict=True
        ):
            hashes.append(found)
            progress.advance(partition.size)
        return hashes


def _find_prepared(folder: Path, key: str) -> Metadata | None:
    """The metadata of the folder if it is complete and has this key."""
    if not (folder / METADATA_FILE).is_file():
        return None
    try:
        found = open_prepared_dataset(folder).metadata
    except DataError:  # damaged or of another version: it is made again
        return None
    return found if found.key == key else None


def _print_source(source: Source, console: Console) -> None:
    if isinstance(source, BuiltinSource):
        for part, size in source.sizes().items():
            console.print(f"built-in corpus: {part}, {size / 1e6:.2f} MB", highlight=False)
    if isinstance(source, FileSource):
        for note in source.link_notes():
            console.print(note, highlight=False, markup=False, soft_wrap=True)
