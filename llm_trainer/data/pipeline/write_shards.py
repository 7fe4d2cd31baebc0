"""Stage 6, `assemble`: the units' token files joined to shards, and what is to be said of the whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from llm_trainer.data.metadata import SplitFacts
from llm_trainer.data.pipeline.document_index import REJECTED_FILE
from llm_trainer.data.pipeline.stage_cache import read_facts
from llm_trainer.data.pipeline.tokenize import TEXTS_SUFFIX
from llm_trainer.data.progress import ByteProgress
from llm_trainer.data.sources.presplit_source import FILE_NAMES
from llm_trainer.data.token_shards import SUFFIX, ShardWriter, TokenDataset
from llm_trainer.data.tokenization.tokenizer import Tokenizer

_LENGTHS_AT_ONCE = 2**20


def write_shards(
    encoded: Sequence[Path],
    splits: Iterable[str],
    tokenizer: Tokenizer,
    workplace: Path,
    console: Console | None,
) -> dict[str, TokenDataset]:
    """Join the token files of each split, in the order of `encoded`, to the shards of `workplace/dataset`,
    and open them.
    """
    files = {
        split: [file for folder in encoded if (file := folder / f"{split}-00000{SUFFIX}").is_file()]
        for split in splits
    }
    with ByteProgress(
        console, "writing shards", sum(file.stat().st_size for found in files.values() for file in found)
    ) as progress:
        for split, found in files.items():
            size, end = tokenizer.vocab_size, tokenizer.eos_id
            with ShardWriter(
                workplace / "dataset", split, vocab_size=size, tokenizer_hash=tokenizer.hash, end_id=end
            ) as writer:
                for file in found:
                    writer.append(file)
                    progress.advance(file.stat().st_size)
    return {split: TokenDataset.open(workplace, split) for split in files}


def write_texts(
    encoded: Sequence[Path], splits: Iterable[str], workplace: Path, console: Console | None
) -> None:
    """Write train, val and test to `workplace`: a document a line as .txt or, where documents have line
    breaks of their own, as .jsonl.
    """
    for split in splits:
        files = [file for folder in encoded if (file := folder / f"{split}{TEXTS_SUFFIX}").is_file()]
        lines, objects = workplace / f"{FILE_NAMES[split]}.txt", workplace / f"{FILE_NAMES[split]}.jsonl"
        total = sum(file.stat().st_size for file in files)
        with ByteProgress(console, f"writing the texts of {split}", total) as progress:
            is_plain = _join_lines(files, lines, progress)
        if not is_plain:
            lines.unlink()
            with objects.open("wb") as joined:
                for file in files:
                    with file.open("rb") as opened:
                        shutil.copyfileobj(opened, joined)


def _join_lines(files: Iterable[Path], lines: Path, progress: ByteProgress) -> bool:
    """Write each text as a line; False as soon as one cannot be told from its neighbours."""
    with lines.open("w", encoding="utf-8", newline="\n") as joined:
        for file in files:
            with file.open(encoding="utf-8", newline="\n") as opened:
                for line in opened:
                    text = json.loads(line)["text"]
                    if len(text.splitlines()) > 1 or text.endswith(("\n", "\r")):
                        return False
                    joined.write(text + "\n")
                    progress.advance(len(line))
    return True


def write_rejected(results: Iterable[Path], workplace: Path) -> None:
    """Join the results' files of rejected documents; gzip files one after another are one."""
    with (workplace / REJECTED_FILE).open("wb") as joined:
        for file in (folder / REJECTED_FILE for folder in results):
            if file.is_file():
                with file.open("rb") as opened:
                    shutil.copyfileobj(opened, joined)


def total(results: Iterable[Path], name: str) -> int:
    """The sum of a count over the results' facts."""
    counts = [read_facts(folder)[name] for folder in results]
    return sum(count for count in counts if isinstance(count, int))


def facts_of(tokens: TokenDataset, folder: Path, split: str) -> SplitFacts:
    """What metadata.json says of a split."""
    files = {file.name: file.stat().st_size for file in sorted(folder.glob(f"{split}-*{SUFFIX}"))}
    return SplitFacts(
        documents=tokens.num_documents,
        tokens=len(tokens),
        bytes=tokens.num_bytes,
        fingerprint=tokens.fingerprint,
        files=files,
    )


def document_lengths(tokens: TokenDataset, most: int) -> np.ndarray:
    """Tokens of each of the first `most` documents, int64 `(documents,)`."""
    found, start = [np.empty(0, np.int64)], 0
    while start < len(tokens) and sum(map(len, found)) < most:
        count = min(_LENGTHS_AT_ONCE, len(tokens) - start)
        found.append(tokens.document_starts_in(start, count) + start)
        start += count
    starts = np.concatenate(found)
    end = (
        len(tokens)
        if start >= len(tokens) and len(starts) <= most
        else int(starts[most] if len(starts) > most else start)
    )
    return np.diff(np.append(starts[:most], end))
