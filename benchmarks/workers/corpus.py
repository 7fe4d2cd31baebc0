"""Text for the data benchmarks: documents from Python and Shakespeare, shuffled and repeated up to the
requested size.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from llm_trainer.data.sources.base import TextChunk
from llm_trainer.data.sources.builtin_corpus import BuiltinSource

SHAKESPEARE = Path(__file__).resolve().parents[3] / "shared" / "data" / "shakespeare.txt"
_SPEECHES = 40  # of Shakespeare's plays per document, about 6 kB
_FILE_BYTES = 64 * 2**20
_WORD = re.compile(r"[a-z]{3,}")


def documents(shakespeare: Path) -> list[str]:
    """Return topics of the language reference, files of the standard library, and groups of speeches.

    These are about 11 MB in 1,300 documents.
    """
    found = [reading.text for reading in BuiltinSource().read_chunks() if isinstance(reading, TextChunk)]
    if shakespeare.is_file():
        speeches = shakespeare.read_text(encoding="utf-8").split("\n\n")
        found += [
            "\n\n".join(speeches[start : start + _SPEECHES]) for start in range(0, len(speeches), _SPEECHES)
        ]
    return found


def shuffled(shakespeare: Path, megabytes: float, seed: int = 0) -> Iterator[str]:
    """Yield documents in random order, all of them before any repeats, up to `megabytes` of UTF-8."""
    order, rng, left = documents(shakespeare), random.Random(seed), megabytes * 1e6
    while left > 0:
        rng.shuffle(order)
        for text in order:
            if left <= 0:
                return
            left -= len(text.encode("utf-8"))
            yield text


def made_distinct(texts: Iterator[str], seed: int = 1) -> Iterator[str]:
    """Append three letters to every tenth word, so that there are about as many distinct words as in
    text that repeats nothing.
    """
    rng = random.Random(seed)
    for text in texts:
        yield _WORD.sub(
            lambda found: (
                found[0] + "".join(rng.choices("etaoinshrdlu", k=3)) if rng.random() < 0.1 else found[0]
            ),
            text,
        )


def write_jsonl(folder: Path, texts: Iterable[str]) -> int:
    """Write files of JSON lines with a column `text`; return the number of bytes of text."""
    size, held, number = 0, _FILE_BYTES, 0
    with contextlib.ExitStack() as stack:
        for text in texts:
            if held >= _FILE_BYTES:
                stack.close()
                opened = stack.enter_context((folder / f"{number:03d}.jsonl").open("w", encoding="utf-8"))
                number, held = number + 1, 0
            held += opened.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            size += len(text.encode("utf-8"))
    return size
