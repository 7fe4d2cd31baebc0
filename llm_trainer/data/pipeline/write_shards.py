"""Stage 6, `assemble`: concatenates the partitions' token files to shards, and collects their numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from llm_trainer.data.metadata import SplitInfo
from llm_trainer.data.pipeline.document_index import REJECTED_FILE
from llm_trainer.data.pipeline.stage_cache import read_stats
from llm_trainer.data.pipeline.tokenize import TEXTS_SUFFIX
from llm_trainer.data.progress import ByteProgress
from llm_trainer.data.sources.presplit_source import SPLIT_FILE_NAMES
from llm_trainer.data.token_shards import SHARD_SUFFIX, ShardWriter, TokenDataset
from llm_trainer.data.tokenization.tokenizer import Tokenizer

_LENGTHS_AT_ONCE = 2**20


def write_shards(
    encoded: Sequence[Path],
    splits: Iterable[str],
    tokenizer: Tokenizer,
    output: Path,
    console: Console | None,
) -> dict[str, TokenDataset]:
    """Write the shards of all splits into `output/dataset`.

    Args:
        encoded: The results of the encode tasks, in order.
        splits: The splits to write.
        tokenizer: The tokenizer of the ids.
        output: The staging folder.
        console: Shows progress.

    Returns:
        Split → its tokens.
    """
    files = {
        split: [file for folder in encoded if (file := folder / f"{split}-00000{SHARD_SUFFIX}").is_file()]
        for split in splits
    }
    with ByteProgress(
        console, "writing shards", sum(file.stat().st_size for found in files.values() for file in found)
    ) as progress:
        for split, found in files.items():
            with ShardWriter(
                output / "dataset",
                split,
                vocab_size=tokenizer.vocab_size,
                tokenizer_hash=tokenizer.hash,
                eos_id=tokenizer.eos_id,
            ) as writer:
                for file in found:
                    writer.append_shard(file)
                    progress.advance(file.stat().st_size)
    return {split: TokenDataset.open(output, split) for split in files}


def write_split_texts(
    encoded: Sequence[Path], splits: Iterable[str], output: Path, console: Console | None
) -> None:
    """Write the texts of the splits as train, val and test.

    They are .txt with one document per line or, if documents contain line breaks, .jsonl.

    Args:
        encoded: The results of the encode tasks, in order.
        splits: The splits to write.
        output: The staging folder.
        console: Shows progress.
    """
    for split in splits:
        files = [file for folder in encoded if (file := folder / f"{split}{TEXTS_SUFFIX}").is_file()]
        text_file = output / f"{SPLIT_FILE_NAMES[split]}.txt"
        json_file = output / f"{SPLIT_FILE_NAMES[split]}.jsonl"
        total = sum(file.stat().st_size for file in files)
        with ByteProgress(console, f"writing the texts of {split}", total) as progress:
            is_complete = _write_lines(files, text_file, progress)
        if not is_complete:
            text_file.unlink()
            _concatenate(files, json_file)


def _write_lines(files: Iterable[Path], target: Path, progress: ByteProgress) -> bool:
    """Write each text as a line; returns False at the first text that is not a single line."""
    with target.open("w", encoding="utf-8", newline="\n") as opened_target:
        for file in files:
            with file.open(encoding="utf-8", newline="\n") as opened:
                for line in opened:
                    text = json.loads(line)["text"]
                    if len(text.splitlines()) > 1 or text.endswith(("\n", "\r")):
                        return False
                    opened_target.write(text + "\n")
                    progress.advance(len(line))
    return True


def _concatenate(files: Iterable[Path], target: Path) -> None:
    with target.open("wb") as opened_target:
        for file in files:
            with file.open("rb") as opened:
                shutil.copyfileobj(opened, opened_target)


def concat_rejected(results: Iterable[Path], output: Path) -> None:
    """Concatenate the results' files of rejected documents; several gzip files in a row are a gzip file."""
    files = [file for folder in results if (file := folder / REJECTED_FILE).is_file()]
    _concatenate(files, output / REJECTED_FILE)


def sum_stats(results: Iterable[Path], name: str) -> int:
    """The sum of a count over the stats of several results."""
    counts = [read_stats(folder)[name] for folder in results]
    return sum(count for count in counts if isinstance(count, int))


def split_info(tokens: TokenDataset, folder: Path, split: str) -> SplitInfo:
    """The entry of a split in metadata.json; `folder` is the folder of its shards."""
    files = {file.name: file.stat().st_size for file in sorted(folder.glob(f"{split}-*{SHARD_SUFFIX}"))}
    return SplitInfo(
        documents=tokens.num_documents,
        tokens=len(tokens),
        bytes=tokens.num_bytes,
        fingerprint=tokens.fingerprint,
        files=files,
    )


def document_lengths(tokens: TokenDataset, max_documents: int) -> np.ndarray:
    """Tokens of each of the first `max_documents` documents, int64 `(documents,)`."""
    found, start = [np.empty(0, np.int64)], 0
    while start < len(tokens) and sum(map(len, found)) < max_documents:
        count = min(_LENGTHS_AT_ONCE, len(tokens) - start)
        found.append(tokens.document_starts_in(start, count) + start)
        start += count
    starts = np.concatenate(found)
    if start >= len(tokens) and len(starts) <= max_documents:
        end = len(tokens)
    else:
        end = int(starts[max_documents] if len(starts) > max_documents else start)
    return np.diff(np.append(starts[:max_documents], end))
