"""Stores the texts of each domain on disk, and writes them into splits, both decided by hashes of texts."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

from llm_trainer.config.schema.domains import DomainBridge
from llm_trainer.data.domains.loaders import DomainText
from llm_trainer.data.hashing import hash_fraction
from llm_trainer.data.pipeline.document_index import SPLITS
from llm_trainer.data.pipeline.splits import SplitRatios
from llm_trainer.data.sources.presplit_source import SPLIT_FILE_NAMES


class TextStore:
    """The texts of each domain in a file of their own, each text once; closes its files as a context manager.

    Args:
        folder: An existing folder for the files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: set[bytes] = set()
        self._files: dict[str, IO[str]] = {}
        self._draws: dict[str, array[float]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> TextStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def add(self, text: DomainText) -> bool:
        """Store a text; return False if the same one, up to whitespace at its ends, is already stored."""
        digest = hashlib.blake2b(text.text.strip().encode("utf-8"), digest_size=16).digest()
        if digest in self._seen:
            return False
        self._seen.add(digest)
        if text.domain not in self._files:
            opened = self._path(text.domain).open("w", encoding="utf-8", newline="\n")
            self._files[text.domain] = self._stack.enter_context(opened)
            self._draws[text.domain] = array("d")
        record = {"text": text.text, "domain": text.domain, "source": text.loader}
        self._files[text.domain].write(json.dumps(record, ensure_ascii=False) + "\n")
        self._draws[text.domain].append(hash_fraction(text.text, "cap"))
        return True

    def domains(self) -> list[str]:
        """Return the domains that have texts, in the order in which they first occurred."""
        return list(self._files)

    def select(self, domain: str, max_texts: int | None, seed: int) -> np.ndarray:
        """Draw texts of a domain: those with the smallest hashes, shifted by the seed.

        Args:
            domain: The domain.
            max_texts: About how many texts to select; None selects all.
            seed: The seed of the draw.

        Returns:
            Whether each text is selected, bool of shape (texts,).
        """
        draws = (np.array(self._draws[domain]) + hash_fraction(str(seed), "cap")) % 1.0
        if max_texts is None or len(draws) <= max_texts:
            return np.ones(len(draws), dtype=bool)
        threshold = float(np.partition(draws, max_texts - 1)[max_texts - 1])
        return np.asarray(draws <= threshold)

    def open_lines(self, domain: str) -> IO[str]:
        """Open the domain's records, one JSON object per line, in the order in which they were added."""
        self._files[domain].flush()
        return self._path(domain).open(encoding="utf-8", newline="\n")

    def _path(self, domain: str) -> Path:
        return self._folder / f"{domain}.jsonl"


def write_splits(
    store: TextStore, domain: str, folder: Path, bridge: DomainBridge
) -> tuple[dict[str, int], dict[str, int]]:
    """Write a domain's train, val and test splits as JSON lines.

    A text's split is determined by its hash and the seed, as in `pipeline/splits.py`. If there are too few
    texts for the fractions to come out about right, it is determined by the rank of its hash among them.

    Args:
        store: The texts.
        domain: The domain to write.
        folder: The folder of the files, which is created.
        bridge: The fractions, the cap and the seed.

    Returns:
        The number of texts by split, and by loader.
    """
    ratios = SplitRatios(bridge.train_ratio, bridge.val_ratio, bridge.test_ratio)
    selected = store.select(domain, bridge.cap(domain), bridge.seed)
    splits = _assign_splits(store, domain, selected, ratios, bridge.seed)
    folder.mkdir(parents=True, exist_ok=True)
    counts, sources = Counter({split: 0 for split in SPLITS}), Counter[str]()
    with ExitStack() as stack:
        partial = {split: folder / f".{SPLIT_FILE_NAMES[split]}.partial" for split in SPLITS}
        writers = {
            split: stack.enter_context(path.open("w", encoding="utf-8", newline="\n"))
            for split, path in partial.items()
        }
        for line, split in zip(_selected_lines(store, domain, selected), splits, strict=True):
            writers[split].write(line)
            counts[split] += 1
            sources[json.loads(line)["source"]] += 1
    for split, path in partial.items():
        target = folder / f"{SPLIT_FILE_NAMES[split]}.jsonl"
        if counts[split]:
            path.replace(target)
        else:
            path.unlink()
            target.unlink(missing_ok=True)
    return {split: count for split, count in counts.items() if count}, dict(sources)


def _selected_lines(store: TextStore, domain: str, selected: np.ndarray) -> Iterator[str]:
    with store.open_lines(domain) as lines:
        yield from (line for line, is_selected in zip(lines, selected, strict=True) if is_selected)


def _assign_splits(
    store: TextStore, domain: str, selected: np.ndarray, ratios: SplitRatios, seed: int
) -> list[str]:
    """The split of each selected text, in order."""
    draws = [
        hash_fraction(json.loads(line)["text"], f"split {seed}")
        for line in _selected_lines(store, domain, selected)
    ]
    count = len(draws)
    if ratios.can_split_by_hash(count):
        ends = (ratios.validation, ratios.validation + ratios.test)
        return ["validation" if draw < ends[0] else "test" if draw < ends[1] else "train" for draw in draws]
    order = sorted(range(count), key=draws.__getitem__)
    validation, test = _held_out_count(count, ratios.validation), _held_out_count(count, ratios.test)
    splits = ["train"] * count
    for rank, index in enumerate(order[: validation + test]):
        splits[index] = "validation" if rank < validation else "test"
    return splits


def _held_out_count(count: int, ratio: float) -> int:
    """How many of a few texts to hold out: at least one, if most are left for training."""
    return max(round(count * ratio), 1 if ratio > 0 and count >= 4 else 0)
