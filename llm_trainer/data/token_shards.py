"""Token shards, the file format that training reads.

One split is one or more files `<split>-00000.tokens` that are read as one stream of ids. A shard is a header,
the ids (uint16 if the vocabulary is small enough, else uint32), and the offset of each document:

    offset   size  what (little-endian)
         0      8  magic b"LLMTOKEN"
         8      4  format version
        12      4  bytes per id: 2 or 4
        16      8  number of ids
        24      8  number of documents
        32      8  largest id
        40      8  size of the vocabulary
        48      8  utf-8 bytes of the text (all ones: unknown)
        56      8  id that ends each document (all ones: none)
        64     32  the tokenizer's hash (sha256)
        96     32  sha256 of everything after the header
       128     32  sha256 of the 128 bytes above
       160     96  zeros
       256      …  ids; zeros up to a multiple of 8; document starts as uint64

The files are memory-mapped: opening costs the same for a megabyte and a terabyte, and ranks on one machine
use the same memory pages. A shard is written under a temporary name and renamed when it is complete, so a
file under its final name is never half-written. The header contains a hash of itself, the size is checked
when a shard is opened, and the contents of files up to `VERIFY_UP_TO` bytes are hashed as well.
"""

from __future__ import annotations

import hashlib
import os
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.errors import DataError

SHARD_SUFFIX = ".tokens"
VERSION = 1
HEADER_BYTES = 256
VERIFY_UP_TO = 64 * 2**20
SHARD_TOKENS = 2**27
_BLOCK_TOKENS = 2**21
_MAGIC = b"LLMTOKEN"
_FIELDS = struct.Struct("<8sII6Q32s32s")
_NONE = 2**64 - 1


@dataclass(frozen=True)
class ShardHeader:
    """The header of a shard; hashes are hexadecimal."""

    item_bytes: int
    num_tokens: int
    num_documents: int
    largest_id: int
    vocab_size: int
    num_bytes: int | None
    eos_id: int | None
    tokenizer_hash: str
    content_hash: str

    @property
    def starts_offset(self) -> int:
        """Offset in the file, in bytes, of the document starts."""
        return HEADER_BYTES + -(-self.num_tokens * self.item_bytes // 8) * 8

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return self.starts_offset + 8 * self.num_documents

    def pack(self) -> bytes:
        """The header's 256 bytes."""
        fields = _FIELDS.pack(
            _MAGIC,
            VERSION,
            self.item_bytes,
            self.num_tokens,
            self.num_documents,
            self.largest_id,
            self.vocab_size,
            _NONE if self.num_bytes is None else self.num_bytes,
            _NONE if self.eos_id is None else self.eos_id,
            bytes.fromhex(self.tokenizer_hash),
            bytes.fromhex(self.content_hash),
        )
        return (fields + hashlib.sha256(fields).digest()).ljust(HEADER_BYTES, b"\0")

    @classmethod
    def unpack(cls, raw: bytes, file: Path) -> ShardHeader:
        """Parse a header.

        Args:
            raw: The first 256 bytes of the file.
            file: The file that errors name.

        Raises:
            DataError: It is not a header, it is damaged, or it has another format version.
        """
        if len(raw) < HEADER_BYTES or raw[:8] != _MAGIC:
            raise DataError(f"{file} is not a token shard; prepare the data again with `llm-trainer prepare`")
        fields = raw[: _FIELDS.size]
        if hashlib.sha256(fields).digest() != raw[_FIELDS.size : _FIELDS.size + 32]:
            raise DataError(
                f"the header of {file} is damaged; prepare the data again with `llm-trainer prepare`"
            )
        _, version, item, tokens, documents, largest, vocab, num_bytes, end, tokenizer, content = (
            _FIELDS.unpack(fields)
        )
        if version != VERSION or item not in (2, 4):
            raise DataError(
                f"{file} has format version {version}, and this program reads version {VERSION};"
                " prepare the data again"
            )
        return cls(
            item,
            tokens,
            documents,
            largest,
            vocab,
            None if num_bytes == _NONE else num_bytes,
            None if end == _NONE else end,
            tokenizer.hex(),
            content.hex(),
        )


class ShardWriter:
    """Writes one split as shards; a document is never split over two of them.

    Call `add` with the ids of a document, then `end_document`; `close` finishes the last file. As a context
    manager it closes at the end, or removes the unfinished file after an exception. It keeps the document
    starts of one shard in memory, 8 bytes each.

    Attributes:
        files: The finished shards.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        vocab_size: int,
        tokenizer_hash: str,
        eos_id: int | None,
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        """Create `folder` and begin the first shard.

        Args:
            folder: Where the files are written.
            split: The first part of the files' names.
            vocab_size: All ids must be below it; it decides between uint16 and uint32.
            tokenizer_hash: Stored in the header, so that data and tokenizer can be matched.
            eos_id: The id that ends each document; None if there is none.
            shard_tokens: A shard ends with the document that reaches this number of ids.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._split = folder, split
        self._vocab_size, self._tokenizer_hash, self._end_id = vocab_size, tokenizer_hash, eos_id
        self._shard_tokens = shard_tokens
        self._dtype = np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")
        self.files: list[Path] = []
        self._tokens = self._bytes = self._largest = self._document_start = 0  # of the current shard
        self._starts: array[int] = array("Q")
        self._begin()

    def add(self, ids: np.ndarray | Sequence[int], num_bytes: int = 0) -> None:
        """Append ids to the current document.

        Args:
            ids: `(tokens,)`.
            num_bytes: Bytes of their text in UTF-8.

        Raises:
            DataError: An id is outside the vocabulary.
        """
        values = np.asarray(ids, dtype=np.int64)
        if len(values):
            if int(values.min()) < 0 or int(values.max()) >= self._vocab_size:
                raise DataError(
                    f"ids from {int(values.min())} to {int(values.max())} do not fit the vocabulary of"
                    f" {self._vocab_size} ids; encode the text with the tokenizer of this data"
                )
            self._largest = max(self._largest, int(values.max()))
            self._write(values.astype(self._dtype).tobytes())
            self._tokens += len(values)
        self._bytes += num_bytes

    def end_document(self, *, append_eos: bool = True) -> None:
        """End the current document; an empty one is not written.

        Args:
            append_eos: Append the end-of-text id, if there is one.
        """
        if self._tokens == self._document_start:
            return
        if append_eos and self._end_id is not None:
            self.add([self._end_id])
        self._starts.append(self._document_start)
        self._document_start = self._tokens
        if self._tokens >= self._shard_tokens:
            self._finish()
            self._begin()

    def add_documents(self, documents: Sequence[np.ndarray], num_bytes: int = 0) -> None:
        """Append complete documents, which is much faster than `add` and `end_document` for short ones.

        Args:
            documents: Ids of each document, `(tokens,)`.
            num_bytes: Bytes of their text in UTF-8.
        """
        assert self._tokens == self._document_start
        ends = [] if self._end_id is None else [np.array([self._end_id])]
        lengths = np.array([len(ids) + len(ends) for ids in documents if len(ids)], dtype=np.int64)
        if self._tokens + int(lengths.sum()) >= self._shard_tokens:
            # All bytes are counted for the current shard, though some documents may go to the next one.
            self._bytes += num_bytes
            for ids in documents:
                self.add(ids)
                self.end_document()
        elif len(lengths):
            starts = self._tokens + np.cumsum(lengths) - lengths
            self._starts.frombytes(starts.astype("<u8").tobytes())
            self.add(
                np.concatenate([array for ids in documents if len(ids) for array in (ids, *ends)]), num_bytes
            )
            self._document_start = self._tokens

    def append_shard(self, file: Path) -> None:
        """Append all documents of a shard that was made with the same tokenizer.

        Raises:
            DataError: The shard is damaged.
        """
        shard = _Shard.open(file)
        assert shard.header.tokenizer_hash == self._tokenizer_hash
        assert self._tokens == self._document_start
        self._starts.frombytes((shard.starts + np.uint64(self._tokens)).astype("<u8").tobytes())
        for start in range(0, len(shard.ids), _BLOCK_TOKENS):
            self._write(shard.ids[start : start + _BLOCK_TOKENS].tobytes())
        self._tokens += shard.header.num_tokens
        self._bytes += shard.header.num_bytes or 0
        self._largest = max(self._largest, shard.header.largest_id)
        self._document_start = self._tokens
        if self._tokens >= self._shard_tokens:
            self._finish()
            self._begin()

    def close(self) -> list[Path]:
        """Finish the last shard and return all files; an empty split has one empty shard."""
        self.end_document()
        if self._tokens or not self.files:
            self._finish()
        else:
            self.abort()
        return self.files

    def abort(self) -> None:
        """Remove the unfinished file."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _begin(self) -> None:
        self._final = self._folder / f"{self._split}-{len(self.files):05d}{SHARD_SUFFIX}"
        self._temporary = self._final.with_suffix(".partial")
        self._file = self._temporary.open("wb")
        self._file.write(b"\0" * HEADER_BYTES)
        self._digest = hashlib.sha256()
        self._tokens = self._bytes = self._largest = self._document_start = 0
        self._starts = array("Q")

    def _write(self, raw: bytes) -> None:
        self._file.write(raw)
        self._digest.update(raw)

    def _finish(self) -> None:
        self._write(b"\0" * (-self._tokens * self._dtype.itemsize % 8))
        self._write(np.asarray(self._starts, dtype="<u8").tobytes())
        header = ShardHeader(
            self._dtype.itemsize,
            self._tokens,
            len(self._starts),
            self._largest,
            self._vocab_size,
            self._bytes,
            self._end_id,
            self._tokenizer_hash,
            self._digest.hexdigest(),
        )
        self._file.seek(0)
        self._file.write(header.pack())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self._final)
        self.files.append(self._final)


@dataclass(frozen=True)
class _Shard:
    file: Path
    header: ShardHeader
    ids: np.ndarray  # (tokens,) uint16 or uint32
    starts: np.ndarray  # (documents,) uint64

    @classmethod
    def open(cls, file: Path) -> _Shard:
        try:
            with file.open("rb") as opened:
                header = ShardHeader.unpack(opened.read(HEADER_BYTES), file)
                size = opened.seek(0, os.SEEK_END)
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror or error}") from None
        if size != header.file_bytes:
            raise DataError(
                f"{file} is truncated or damaged: it has {size} bytes and its header gives"
                f" {header.file_bytes}; prepare the data again"
            )
        # Plain arrays over the maps: slicing an np.memmap takes a microsecond longer.
        ids = _mapped(file, f"<u{header.item_bytes}", HEADER_BYTES, header.num_tokens)
        shard = cls(file, header, ids, _mapped(file, "<u8", header.starts_offset, header.num_documents))
        if size <= VERIFY_UP_TO:
            shard.verify()
        return shard

    def verify(self) -> None:
        digest = hashlib.sha256()
        with self.file.open("rb") as opened:
            opened.seek(HEADER_BYTES)
            while block := opened.read(2**22):
                digest.update(block)
        if digest.hexdigest() != self.header.content_hash:
            raise DataError(
                f"{self.file} is damaged: its contents do not match the hash in its header;"
                " prepare the data again"
            )


def _mapped(file: Path, dtype: str, offset: int, count: int) -> np.ndarray:
    if not count:
        return np.empty(0, dtype=dtype)
    return np.memmap(file, dtype=dtype, mode="r", offset=offset, shape=(count,)).view(np.ndarray)


class TokenDataset:
    """The ids of one split as one stream, in however many files they are.

    Attributes:
        num_tokens: Number of ids.
        num_documents: Number of documents.
        num_bytes: Size of the text in UTF-8; None if unknown.
        vocab_size: Number of ids of the tokenizer.
        tokenizer: The tokenizer of the ids; None if it was not loaded with them.
        tokenizer_hash: `Tokenizer.hash` of that tokenizer.
        fingerprint: Changes with every change of the ids, their order, or the tokenizer.
        eos_id: The id that ends each document; None if there is none.
        source: Where the ids come from, for messages.
        corpora: Names of the corpora that were concatenated; empty for a single one.
        row_tables: Cache of the tables of `sampling/packed_rows.py`.
    """

    def __init__(
        self,
        ids: Sequence[np.ndarray],
        starts: Sequence[np.ndarray],
        *,
        vocab_size: int,
        tokenizer_hash: str,
        fingerprint: str,
        num_bytes: int | None = None,
        eos_id: int | None = None,
        largest_id: int | None = None,
        source: str = "memory",
        corpora: Sequence[tuple[str, int]] = (),
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """Make a stream of arrays; `open` and `from_ids` are the usual ways.

        Args:
            ids: The ids, one array per file, `(tokens,)`.
            starts: The offsets of the documents in each array, `(documents,)`.
            vocab_size: Number of ids of the tokenizer.
            tokenizer_hash: `Tokenizer.hash` of the tokenizer.
            fingerprint: Identifies the contents.
            num_bytes: Size of the text in UTF-8.
            eos_id: The id that ends each document.
            largest_id: The largest id, if known.
            source: Where the ids come from, for messages.
            corpora: Name and number of tokens of each corpus that was concatenated.
            tokenizer: The tokenizer of the ids.
        """
        self.id_arrays, self.start_arrays = list(ids), list(starts)
        self._first_token = np.cumsum([0, *map(len, ids)], dtype=np.int64)  # of each array in the stream
        self.num_tokens = int(self._first_token[-1])
        self.num_documents = sum(map(len, starts))
        self.num_bytes = num_bytes
        self.vocab_size = vocab_size
        self.tokenizer = tokenizer
        self.tokenizer_hash = tokenizer_hash
        self.fingerprint = fingerprint
        self.eos_id = eos_id
        self.source = source
        self.corpora = tuple(name for name, _ in corpora)
        self._corpus_ends = np.cumsum([tokens for _, tokens in corpora], dtype=np.int64)
        self._known_largest = largest_id
        # By (context, strategy, stride).
        self.row_tables: dict[tuple[int, str, int], tuple[np.ndarray, np.ndarray]] = {}

    def corpus_indices(self, offsets: np.ndarray) -> np.ndarray:
        """The index in `corpora` of the token at each of these offsets, int64 of the same shape."""
        found: np.ndarray = np.searchsorted(self._corpus_ends, offsets, side="right")
        return found

    @classmethod
    def open(cls, folder: str | Path, split: str) -> TokenDataset:
        """Open the shards of a split.

        Args:
            folder: The folder of the shards, or the prepared folder whose `dataset/` holds them.
            split: train, validation or test.

        Raises:
            DataError: Shards are missing or damaged.
        """
        shards_folder = Path(folder)
        if (shards_folder / "dataset").is_dir():
            shards_folder = shards_folder / "dataset"
        files = sorted(shards_folder.glob(f"{split}-*{SHARD_SUFFIX}"))
        if not files:
            raise DataError(
                f"no token shards of the split {split!r} in {shards_folder};"
                " prepare the data with `llm-trainer prepare`"
            )
        if [file.name for file in files] != [
            f"{split}-{index:05d}{SHARD_SUFFIX}" for index in range(len(files))
        ]:
            raise DataError(
                f"shards of the split {split!r} in {shards_folder} are missing: there are only"
                f" {', '.join(file.name for file in files)}; prepare the data again"
            )
        shards = [_Shard.open(file) for file in files]
        first = shards[0].header
        for shard in shards:
            if (shard.header.tokenizer_hash, shard.header.vocab_size) != (
                first.tokenizer_hash,
                first.vocab_size,
            ):
                raise DataError(
                    f"{shard.file} and {files[0].name} were made with different tokenizers;"
                    " prepare the data again"
                )
        sizes = [shard.header.num_bytes for shard in shards]
        known = [size for size in sizes if size is not None]
        digest = hashlib.sha256(
            "".join(shard.header.content_hash for shard in shards).encode() + first.tokenizer_hash.encode()
        )
        return cls(
            [shard.ids for shard in shards],
            [shard.starts for shard in shards],
            vocab_size=first.vocab_size,
            tokenizer_hash=first.tokenizer_hash,
            fingerprint=digest.hexdigest(),
            num_bytes=sum(known) if len(known) == len(sizes) else None,
            eos_id=first.eos_id,
            largest_id=max(shard.header.largest_id for shard in shards),
            source=str(shards_folder),
        )

    @classmethod
    def from_ids(
        cls, ids: Sequence[int] | np.ndarray, *, vocab_size: int, tokenizer_hash: str = "0" * 64
    ) -> TokenDataset:
        """Make a stream in memory, as one document; for tests and small experiments."""
        values = np.asarray(ids, dtype=np.int64)
        fingerprint = hashlib.sha256(values.tobytes() + tokenizer_hash.encode()).hexdigest()
        starts = np.zeros(min(1, len(values)), dtype=np.int64)
        return cls(
            [values], [starts], vocab_size=vocab_size, tokenizer_hash=tokenizer_hash, fingerprint=fingerprint
        )

    def __len__(self) -> int:
        return self.num_tokens

    @cached_property
    def largest_id(self) -> int:
        """The largest id in the stream; if no header contains it, all ids are read once."""
        if self._known_largest is not None:
            return self._known_largest
        blocks = (ids[start : start + 2**24] for ids in self.id_arrays for start in range(0, len(ids), 2**24))
        return max((int(block.max()) for block in blocks), default=0)

    def read(self, start: int, count: int) -> np.ndarray:
        """Read ids `start … start + count - 1` of the stream as int64 `(count,)`.

        Raises:
            IndexError: The range is outside the stream.
        """
        out = np.empty(count, dtype=np.int64)
        self.read_into(start, out)
        return out

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fill `out` `(count,)` with the ids from `start` on.

        Raises:
            IndexError: The range is outside the stream.
        """
        if start < 0 or start + len(out) > self.num_tokens:
            raise IndexError(f"ids {start} to {start + len(out)} of a stream of {self.num_tokens}")
        index = (
            0
            if len(self.id_arrays) == 1
            else int(np.searchsorted(self._first_token, start, side="right")) - 1
        )
        done = 0
        while done < len(out):
            ids, inside = self.id_arrays[index], start + done - int(self._first_token[index])
            block = ids[inside : inside + len(out) - done]
            out[done : done + len(block)] = block
            done += len(block)
            index += 1

    @property
    def item_bytes(self) -> int:
        """Bytes per stored id."""
        return self.id_arrays[0].itemsize if self.id_arrays else 0

    def documents(self, block: int = 2**14) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Iterate over all documents in order.

        Args:
            block: Most documents that are yielded at once.

        Yields:
            Offsets in the stream and lengths in tokens, both int64 `(documents,)`.
        """
        for index, starts in enumerate(self.start_arrays):
            base = int(self._first_token[index])
            end = int(self._first_token[index + 1]) - base
            for first in range(0, len(starts), block):
                chosen = starts[first : first + block + 1].astype(np.int64)
                bounds = chosen if len(chosen) > block else np.append(chosen, end)
                yield bounds[:-1] + base, np.diff(bounds)

    def document_starts_in(self, start: int, count: int) -> np.ndarray:
        """Offsets of the documents that begin in a slice of the stream, relative to its `start`, ascending.

        Args:
            start: First token of the slice.
            count: Tokens in the slice.

        Returns:
            int64 `(documents,)`.
        """
        first = (
            0
            if len(self.id_arrays) == 1
            else max(0, int(np.searchsorted(self._first_token, start, side="right")) - 1)
        )
        found = []
        for index in range(first, len(self.id_arrays)):
            base = int(self._first_token[index])
            if base >= start + count:
                break
            starts = self.start_arrays[index]
            # With another dtype, searchsorted would convert all starts.
            bounds = np.array([max(start - base, 0), start + count - base], dtype=starts.dtype)
            low, high = np.searchsorted(starts, bounds)
            found.append(starts[low:high].astype(np.int64) + (base - start))
        return np.concatenate(found) if found else np.empty(0, np.int64)
