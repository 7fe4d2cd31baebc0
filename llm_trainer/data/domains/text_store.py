"""Texts gathered by domain on disk, and their way into splits: a cap and the held-out shares, both by hashes."""

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
from llm_trainer.data.pipeline.document_index import SPLITS
from llm_trainer.data.pipeline.splits import SplitRatios, hash_fraction
from llm_trainer.data.sources.presplit_source import SPLIT_FILE_NAMES


class TextStore:
    """The texts of each domain in a file of their own, each text once; a context that closes the files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: set[bytes] = set()
        self._files: dict[str, IO[str]] = {}
        self._draws: dict[str, array[float]] = {}
        self._stack = ExitStack()
        self.repeated = 0

    def __enter__(self) -> TextStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def add(self, example: DomainText) -> bool:
        """Keep a text; False where the same one, but for white space around it, is there already."""
        digest = hashlib.blake2b(example.text.strip().encode("utf-8"), digest_size=16).digest()
        if digest in self._seen:
            self.repeated += 1
            return False
        self._seen.add(digest)
        if example.domain not in self._files:
            opened = self._path(example.domain).open("w", encoding="utf-8", newline="\n")
            self._files[example.domain] = self._stack.enter_context(opened)
            self._draws[example.domain] = array("d")
        record = {"text": example.text, "domain": example.domain, "source": example.loader}
        self._files[example.domain].write(json.dumps(record, ensure_ascii=False) + "\n")
        self._draws[example.domain].append(hash_fraction(example.text, "cap"))
        return True

    def domains(self) -> list[str]:
        """Those that have texts, in the order in which their first ones came."""
        return list(self._files)

    def chosen(self, domain: str, most: int | None, seed: int) -> np.ndarray:
        """Which texts of a domain a cap leaves, bool `(texts,)`: those of the smallest hashes, shifted by the
        seed.
        """
        draws = (np.array(self._draws[domain]) + hash_fraction(str(seed), "cap")) % 1.0
        if most is None or len(draws) <= most:
            return np.ones(len(draws), dtype=bool)
        threshold = float(np.partition(draws, most - 1)[most - 1])
        return np.asarray(draws <= threshold)

    def lines(self, domain: str) -> IO[str]:
        """The domain's records, a line each, as they were added."""
        self._files[domain].flush()
        return self._path(domain).open(encoding="utf-8", newline="\n")

    def _path(self, domain: str) -> Path:
        return self._folder / f"{domain}.jsonl"


def write_splits(
    gathered: TextStore, domain: str, folder: Path, bridge: DomainBridge
) -> tuple[dict[str, int], dict[str, int]]:
    """Write a domain's train, val and test as JSON lines into `folder`; (examples by split, examples by
    source).

    A text's split is decided by its hash and the seed, as in `preparation/splits.py`; where there are too few
    texts for that to come out in about the wanted shares, by the rank of its hash among them.
    """
    shares = SplitRatios(bridge.train_ratio, bridge.val_ratio, bridge.test_ratio)
    chosen = gathered.chosen(domain, bridge.cap(domain), bridge.seed)
    splits = _splits(gathered, domain, chosen, shares, bridge.seed)
    folder.mkdir(parents=True, exist_ok=True)
    counts, sources = Counter({split: 0 for split in SPLITS}), Counter[str]()
    with ExitStack() as stack:
        partial = {split: folder / f".{SPLIT_FILE_NAMES[split]}.partial" for split in SPLITS}
        writers = {
            split: stack.enter_context(path.open("w", encoding="utf-8", newline="\n"))
            for split, path in partial.items()
        }
        for line, split in zip(_chosen_lines(gathered, domain, chosen), splits, strict=True):
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


def _chosen_lines(gathered: TextStore, domain: str, chosen: np.ndarray) -> Iterator[str]:
    with gathered.lines(domain) as lines:
        yield from (line for line, keeps in zip(lines, chosen, strict=True) if keeps)


def _splits(
    gathered: TextStore, domain: str, chosen: np.ndarray, shares: SplitRatios, seed: int
) -> list[str]:
    """The split of each chosen text, in order."""
    salt = f"split {seed}"
    places = [
        hash_fraction(json.loads(line)["text"], salt) for line in _chosen_lines(gathered, domain, chosen)
    ]
    count = len(places)
    if shares.can_split_by_hash(count):
        ends = (shares.validation, shares.validation + shares.test)
        return [
            "validation" if place < ends[0] else "test" if place < ends[1] else "train" for place in places
        ]
    order = sorted(range(count), key=places.__getitem__)
    validation, test = _held_out(count, shares.validation), _held_out(count, shares.test)
    found = ["train"] * count
    for place, index in enumerate(order[: validation + test]):
        found[index] = "validation" if place < validation else "test"
    return found


def _held_out(count: int, share: float) -> int:
    """How many of a few texts a share is: one at least where there are enough to leave most for training."""
    return max(round(count * share), 1 if share > 0 and count >= 4 else 0)
