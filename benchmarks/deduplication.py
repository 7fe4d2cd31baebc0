"""Near-deduplication: speed, recall of planted duplicates, precision and memory.

Documents are 250 to 550 words drawn by their frequency in Python's language reference, so that two of them
share practically no run of 5 words. For 1,000 of them at each of several similarities there is a copy in
which single words, at least 5 apart, were replaced until the Jaccard similarity of the two sets of 5-word
runs had the desired value (computed here with Python sets, not with the code under test).

Recall is the fraction of planted pairs that end up in one cluster, next to what the scheme promises, 1 - (1
- s^8)^14. Precision is the fraction of pairs in one cluster that were planted, and the fraction that were
planted with a similarity above the threshold, (1/14)^(1/8) = 0.72.

Rates are those of one process over documents in memory: signing (text to band keys on disk), and signing
with clustering. datasketch and rensa are used as their documentation shows, with strings for runs of words,
the same bands and rows, and their own band index; datasketch with fewer documents. We hash runs with numpy,
use rensa's MinHash of these hashes, and sort keys on disk. Peak memory is that of a process that signs and
clusters this much generated text; it holds 4 bytes per document and the part being sorted, 32 MB at most.

    python benchmarks/deduplication.py [--rounds 3] [--sizes 0.1,1,10] [--quick]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from common import Figure, Target, alternate, finish, report_load, run_command

from llm_trainer.data.deduplication.clusters import near_duplicate_clusters
from llm_trainer.data.deduplication.minhash import BandKeyWriter, MinHasher

SIMILARITIES = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
RUN = 5
HASHER = MinHasher()


def main() -> int:
    """Measure, print and write the results; return 1 if the target is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", default="0.1,1,10", help="Gigabytes of text for the memory measurements.")
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    parser.add_argument("--memory", metavar="GB,LIBRARY", help="(internal) Run one measurement.")
    options = parser.parse_args()
    if options.memory is not None:
        size, library = options.memory.split(",")
        print(json.dumps(sign_and_group(float(size), library)))
        return 0
    notes = [report_load()]
    scale = 10 if options.quick else 1
    sizes = [float(size) / scale for size in options.sizes.split(",")]
    figures, targets = quality(1000 // scale)
    figures += rates(20000 // scale, 2000 // scale, options.rounds)
    memory = [_memory(size, "ours") for size in sizes]
    figures += [_memory(sizes[0], library) for library in ("datasketch", "rensa")]
    baselines = {work: "datasketch" for work in ("signing", "signing and grouping")}
    return finish(
        "deduplication", figures + memory, baselines, " ".join(["python", *sys.argv]), targets, notes
    )


def _memory(size: float, library: str) -> Figure:
    """Return the peak memory of a fresh process."""
    done = run_command([sys.executable, __file__, "--memory", f"{size},{library}"])
    measured = json.loads(done.output.splitlines()[-1])
    rate = size * 1000 / measured["seconds"]
    note = f"{measured['documents']:,} documents, {rate:.0f} MB/s including the generation of the text"
    return Figure(f"peak memory, {size:g} GB of text", library, "MB", [measured["megabytes"]], note)


class Texts:
    """Documents of words drawn by frequency, deterministic for a seed."""

    def __init__(self, seed: int) -> None:
        from pydoc_data.topics import topics

        words, counts = np.unique(re.findall(r"\w+", " ".join(topics.values()).lower()), return_counts=True)
        self.words = words.astype(object)
        self._edges = np.cumsum(counts / counts.sum())
        self._random = np.random.default_rng(seed)

    def draw(self, count: int) -> list[str]:
        """Draw this many words."""
        places = np.searchsorted(self._edges, self._random.random(count)).clip(max=len(self.words) - 1)
        return list(self.words[places])

    def document(self) -> list[str]:
        """Return a document of 250 to 550 words."""
        return self.draw(int(self._random.integers(250, 551)))

    def copy(self, words: list[str], similarity: float) -> list[str]:
        """Return a copy with about this Jaccard similarity: each replaced word breaks RUN runs of both."""
        replaced = round(len(words) * (1 - similarity) / (RUN * (1 + similarity)))
        gap = len(words) // max(1, replaced)
        copied = list(words)
        for index in range(replaced):
            copied[
                min(len(words) - 1, index * gap + int(self._random.integers(0, max(1, gap - RUN + 1))))
            ] = "replaced"
        return copied


def jaccard(left: list[str], right: list[str]) -> float:
    """Return the Jaccard similarity of the sets of word runs, computed directly."""
    first, second = (
        {tuple(words[place : place + RUN]) for place in range(len(words) - RUN + 1)}
        for words in (left, right)
    )
    return len(first & second) / len(first | second)


def quality(pairs: int) -> tuple[list[Figure], list[Target]]:
    """Return recall at each similarity and overall precision, on one corpus with all planted pairs."""
    texts = Texts(seed=1)
    documents, planted = [], {}
    for wanted in SIMILARITIES:
        for _ in range(pairs):
            original = texts.document()
            copied = texts.copy(original, wanted)
            planted[len(documents)] = (wanted, jaccard(original, copied))
            documents += [" ".join(original), " ".join(copied)]
    documents += [" ".join(texts.document()) for _ in range(4 * pairs)]
    labels = _groups(documents)
    figures = []
    for wanted in SIMILARITIES:
        own = {first: similarity for first, (group, similarity) in planted.items() if group == wanted}
        found = np.mean([labels[first] == labels[first + 1] for first in own])
        mean, expected = (
            np.mean(list(own.values())),
            np.mean([HASHER.expected_recall(similarity) for similarity in own.values()]),
        )
        note = f"expected {expected:.4f}; mean similarity {mean:.4f}, {pairs} pairs"
        figures.append(Figure(f"recall at similarity {wanted:g}", "ours", "", [float(found)], note))
    pairs_found = sum(size * (size - 1) // 2 for size in np.unique(labels, return_counts=True)[1])
    right = [similarity for first, (_, similarity) in planted.items() if labels[first] == labels[first + 1]]
    precise = sum(similarity >= HASHER.threshold for similarity in right) / pairs_found
    figures.append(
        Figure(
            "precision, planted at any similarity",
            "ours",
            "",
            [len(right) / pairs_found],
            f"{pairs_found} pairs found",
        )
    )
    figures.append(
        Figure(
            "precision, planted above the threshold",
            "ours",
            "",
            [precise],
            "as many planted at each similarity",
        )
    )
    recall = next(figure.median for figure in figures if figure.work == "recall at similarity 0.8")
    return figures, [Target("recall at similarity 0.8", recall, 0.90, unit="")]


def _groups(documents: Iterable[str]) -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "all.bands"
        with BandKeyWriter(file, HASHER) as writer:
            for document in documents:
                writer.add(document)
        return near_duplicate_clusters([file], HASHER.bands)


def rates(count: int, fewer: int, rounds: int) -> list[Figure]:
    """Measure each contestant's MB/s of text and documents/s."""
    texts = Texts(seed=2)
    documents = [" ".join(texts.document()) for _ in range(count)]
    runs: dict[tuple[str, str], tuple[Callable[[Iterable[str]], object], list[str]]] = {
        ("signing", "datasketch"): (lambda some: list(map(_datasketch_signature, some)), documents[:fewer]),
        ("signing", "rensa"): (lambda some: list(map(_rensa_signature, some)), documents),
        ("signing", "ours"): (_sign, documents),
        ("signing and grouping", "datasketch"): (_datasketch, documents[:fewer]),
        ("signing and grouping", "rensa"): (_rensa, documents),
        ("signing and grouping", "ours"): (_groups, documents),
    }
    for run, some in runs.values():  # imports, tables and caches are not measured
        run(some[:50])
    measured = alternate({" | ".join(name): _timed(*run) for name, run in runs.items()}, rounds)
    figures = []
    for (work, contestant), (_, some) in runs.items():
        seconds = measured[f"{work} | {contestant}"]
        size = sum(map(len, some)) / 1e6
        figure = Figure(work, contestant, "MB/s", [size / one for one in seconds])
        figure.note = f"{len(some) / np.median(seconds):,.0f} documents/s"
        figures.append(figure)
    return figures


def _timed(run: Callable[[Iterable[str]], object], documents: list[str]) -> Callable[[], float]:
    def once() -> float:
        begun = time.perf_counter()
        run(documents)
        return time.perf_counter() - begun

    return once


def _sign(documents: Iterable[str]) -> None:
    with tempfile.TemporaryDirectory() as folder, BandKeyWriter(Path(folder) / "all.bands", HASHER) as writer:
        for document in documents:
            writer.add(document)


def _runs(document: str) -> list[str]:
    words = document.split()
    return [" ".join(words[place : place + RUN]) for place in range(len(words) - RUN + 1)]


def _datasketch_signature(document: str) -> object:
    from datasketch import MinHash

    signature = MinHash(num_perm=HASHER.bands * HASHER.rows, seed=1)
    signature.update_batch([run.encode() for run in _runs(document)])
    return signature


def _datasketch(documents: Iterable[str]) -> None:
    from datasketch import MinHashLSH

    index = MinHashLSH(num_perm=HASHER.bands * HASHER.rows, params=(HASHER.bands, HASHER.rows))
    for number, document in enumerate(documents):
        signature = _datasketch_signature(document)
        index.query(signature)
        index.insert(number, signature)


def _rensa_signature(document: str) -> object:
    from rensa import RMinHash

    signature = RMinHash(num_perm=HASHER.bands * HASHER.rows, seed=1)
    signature.update(_runs(document))
    return signature


def _rensa(documents: Iterable[str]) -> None:
    from rensa import RMinHashLSH

    index = RMinHashLSH(
        threshold=HASHER.threshold, num_perm=HASHER.bands * HASHER.rows, num_bands=HASHER.bands
    )
    for number, document in enumerate(documents):
        signature = _rensa_signature(document)
        index.query(signature)
        index.insert(number, signature)


def sign_and_group(gigabytes: float, library: str) -> dict[str, float]:
    """Sign and cluster this much generated text; return peak megabytes, seconds and documents."""
    begun, count = time.perf_counter(), 0

    def counted() -> Iterator[str]:
        nonlocal count
        for document in _stream(gigabytes * 1e9):
            count += 1
            yield document

    {"ours": _groups, "datasketch": _datasketch, "rensa": _rensa}[library](counted())
    status = Path("/proc/self/status").read_text(
        encoding="ascii"
    )  # not getrusage, whose high-water mark starts at that of the parent process
    peak = int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024
    return {"megabytes": round(peak, 1), "seconds": time.perf_counter() - begun, "documents": count}


def _stream(size: float) -> Iterator[str]:
    """Yield documents of about 5 kB, the size of a web page in FineWeb; one in ten is a repetition."""
    texts, kept = Texts(seed=3), ""
    made = 0
    while made < size:
        for number in range(10):
            kept = kept if number == 9 else " ".join(texts.draw(800))
            made += len(kept)
            yield kept


if __name__ == "__main__":
    sys.exit(main())
