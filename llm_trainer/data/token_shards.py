"""Token shards: the form that training reads. One split is one or more files `<split>-00000.tokens` that read
as one stream of ids.

A shard is a header, the ids (uint16 where the vocabulary allows, else uint32), and where each document
begins:

    offset   size  what (little-endian)
         0      8  magic b"LLMTOKEN"
         8      4  format version
        12      4  bytes an id: 2 or 4
        16      8  ids
        24      8  documents
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
share the pages. A shard is written beside its final name and renamed when it is whole, so a file under the
final name is never half-written. The header proves itself, the size is checked on opening, and contents up to
`VERIFY_UP_TO` bytes are hashed as well.
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

from llm_trainer.errors import DataError

SUFFIX = ".tokens"
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
    """What a shard says about itself; hashes are hexadecimal."""

    item_bytes: int
    num_tokens: int
    num_documents: int
    largest_id: int
    vocab_size: int
    num_bytes: int | None
    end_id: int | None
    tokenizer_hash: str
    content_hash: str

    @property
    def starts_offset(self) -> int:
        """Where in the file the document starts begin, in bytes."""
        return HEADER_BYTES + -(-self.num_tokens * self.item_bytes // 8) * 8

    @property
    def file_bytes(self) -> int:
        """Size of the whole file."""
        return self.starts_offset + 8 * self.num_documents

    def pack(self) -> bytes:
        """The header's 256 bytes."""
        fields = _FIELDS.pack(
            _MAGIC, VERSION, self.item_bytes, self.num_tokens, self.num_documents, self.largest_id, self.vocab_size,
            _NONE if self.num_bytes is None else self.num_bytes, _NONE if self.end_id is None else self.end_id,
            bytes.fromhex(self.tokenizer_hash), bytes.fromhex(self.content_hash),
        )  # fmt: skip
        return (fields + hashlib.sha256(fields).digest()).ljust(HEADER_BYTES, b"\0")

    @classmethod
    def unpack(cls, raw: bytes, file: Path) -> ShardHeader:
        """Read a header; raises DataError naming `file` where it is none, damaged, or of another version."""
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
                f"{file} has the form of version {version}; this program reads version {VERSION}: prepare the data again"
            )
        return cls(
            item, tokens, documents, largest, vocab, None if num_bytes == _NONE else num_bytes, None if end == _NONE else end,
            tokenizer.hex(), content.hex(),
        )  # fmt: skip


class ShardWriter:
    """Writes one split as shards of about `shard_tokens` ids; a document is never split over two.

    `add` ids, then `end_document`; `close` finishes the last file and returns the files written. As a context manager an exception
    removes what was not finished. Memory: the starts of one shard's documents, 8 bytes each.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        vocab_size: int,
        tokenizer_hash: str,
        end_id: int | None,
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._split = folder, split
        self._vocab_size, self._tokenizer_hash, self._end_id = vocab_size, tokenizer_hash, end_id
        self._shard_tokens = shard_tokens
        self._dtype = np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")
        self.files: list[Path] = []
        self._tokens = self._bytes = self._largest = self._document_start = 0  # of the shard at hand
        self._starts: array[int] = array("Q")
        self._begin()

    def add(self, ids: np.ndarray | Sequence[int], num_bytes: int = 0) -> None:
        """Append ids to the document at hand; `num_bytes`: their text in utf-8. Raises DataError for ids
        outside the vocabulary.
        """
        values = np.asarray(ids, dtype=np.int64)
        if len(values):
            if int(values.min()) < 0 or int(values.max()) >= self._vocab_size:
                raise DataError(
                    f"ids {int(values.min())} to {int(values.max())} do not fit the vocabulary of {self._vocab_size}"
                )
            self._largest = max(self._largest, int(values.max()))
            self._write(values.astype(self._dtype).tobytes())
            self._tokens += len(values)
        self._bytes += num_bytes

    def end_document(self, *, append_end: bool = True) -> None:
        """Close the document at hand; with `append_end` the end of text follows, where there is one. An empty
        document leaves no trace.
        """
        if self._tokens == self._document_start:
            return
        if append_end and self._end_id is not None:
            self.add([self._end_id])
        self._starts.append(self._document_start)
        self._document_start = self._tokens
        if self._tokens >= self._shard_tokens:
            self._finish()
            self._begin()

    def add_documents(self, documents: Sequence[np.ndarray], num_bytes: int = 0) -> None:
        """Append whole documents: the same as `add` and `end_document` of each, and much faster where they
        are short.
        """
        assert self._tokens == self._document_start
        ends = [] if self._end_id is None else [np.array([self._end_id])]
        lengths = np.array([len(ids) + len(ends) for ids in documents if len(ids)], dtype=np.int64)
        if self._tokens + int(lengths.sum()) >= self._shard_tokens:
            self._bytes += (
                num_bytes  # counted for the shard at hand, though some documents may go to the next
            )
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

    def append(self, file: Path) -> None:
        """Add all documents of a shard that was made with the same tokenizer. Raises DataError where it is
        damaged.
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
        """Finish the last shard; returns all files. An empty split has one empty shard."""
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
        self._final = self._folder / f"{self._split}-{len(self.files):05d}{SUFFIX}"
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
            self._dtype.itemsize, self._tokens, len(self._starts), self._largest, self._vocab_size, self._bytes, self._end_id,
            self._tokenizer_hash, self._digest.hexdigest(),
        )  # fmt: skip
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
                f"{file} is truncated or garbled: {size} bytes, its header says {header.file_bytes}; prepare the data again"
            )
        # Plain arrays over the maps: slicing np.memmap itself costs a microsecond more each time.
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
                f"{self.file} is garbled: its contents do not have the hash in its header; prepare the data again"
            )


def _mapped(file: Path, dtype: str, offset: int, count: int) -> np.ndarray:
    if not count:
        return np.empty(0, dtype=dtype)
    return np.memmap(file, dtype=dtype, mode="r", offset=offset, shape=(count,)).view(np.ndarray)


class TokenDataset:
    """The ids of one split as one stream, whatever files hold it.

    `num_bytes` is the size of the text in utf-8, None where it is unknown; `end_id` is the id that ends each document, None where there is
    none; `fingerprint` changes with every change of the ids, their order, or the tokenizer; `corpora` are those that the stream was joined
    from, in order, with their tokens.
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
        end_id: int | None = None,
        largest_id: int | None = None,
        source: str = "memory",
        corpora: Sequence[tuple[str, int]] = (),
    ) -> None:
        self.id_arrays, self.start_arrays = list(ids), list(starts)
        self._first_token = np.cumsum([0, *map(len, ids)], dtype=np.int64)  # of each array in the stream
        self.num_tokens = int(self._first_token[-1])
        self.num_documents = sum(map(len, starts))
        self.num_bytes = num_bytes
        self.vocab_size = vocab_size
        self.tokenizer_hash = tokenizer_hash
        self.fingerprint = fingerprint
        self.end_id = end_id
        self.source = source
        self.corpora = tuple(name for name, _ in corpora)
        self._corpus_ends = np.cumsum([tokens for _, tokens in corpora], dtype=np.int64)
        self._known_largest = largest_id
        self.packed: dict[
            tuple[int, str, int], tuple[np.ndarray, np.ndarray]
        ] = {}  # tables of rows by (context, strategy, stride)

    def corpus_of(self, places: np.ndarray) -> np.ndarray:
        """Which of `corpora` the token at each of these places of the stream is from, int64 of the same
        shape.
        """
        found: np.ndarray = np.searchsorted(self._corpus_ends, places, side="right")
        return found

    @classmethod
    def open(cls, folder: str | Path, split: str) -> TokenDataset:
        """Open the shards of `split` in `folder` or its `dataset/`. Raises DataError where they are missing
        or damaged.
        """
        place = Path(folder)
        place = place / "dataset" if (place / "dataset").is_dir() else place
        files = sorted(place.glob(f"{split}-*{SUFFIX}"))
        if not files:
            raise DataError(
                f"no token shards of the split {split!r} in {place}; prepare the data with `llm-trainer prepare`"
            )
        if [file.name for file in files] != [f"{split}-{index:05d}{SUFFIX}" for index in range(len(files))]:
            raise DataError(
                f"shards of the split {split!r} in {place} are missing: there are {', '.join(file.name for file in files)}"
            )
        shards = [_Shard.open(file) for file in files]
        first = shards[0].header
        for shard in shards:
            if (shard.header.tokenizer_hash, shard.header.vocab_size) != (
                first.tokenizer_hash,
                first.vocab_size,
            ):
                raise DataError(
                    f"{shard.file} and {files[0].name} were made with different tokenizers; prepare the data again"
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
            end_id=first.end_id,
            largest_id=max(shard.header.largest_id for shard in shards),
            source=str(place),
        )

    @classmethod
    def from_ids(
        cls, ids: Sequence[int] | np.ndarray, *, vocab_size: int, tokenizer_hash: str = "0" * 64
    ) -> TokenDataset:
        """A stream in memory, as one document; for tests and small experiments."""
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
        """The largest id in the stream; where no header knows it, all ids are read once."""
        if self._known_largest is not None:
            return self._known_largest
        pieces = (ids[start : start + 2**24] for ids in self.id_arrays for start in range(0, len(ids), 2**24))
        return max((int(piece.max()) for piece in pieces), default=0)

    def read(self, start: int, count: int) -> np.ndarray:
        """Ids `start … start + count - 1` of the stream as int64 `(count,)`. Raises IndexError outside the
        stream.
        """
        out = np.empty(count, dtype=np.int64)
        self.read_into(start, out)
        return out

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fill `out` `(count,)` with ids from `start` on. Raises IndexError outside the stream."""
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
            piece = ids[inside : inside + len(out) - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
            index += 1

    @property
    def item_bytes(self) -> int:
        """Bytes of an id as it is stored."""
        return self.id_arrays[0].itemsize if self.id_arrays else 0

    def documents(self, block: int = 2**14) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Where documents begin and how long they are, in order, in blocks of at most `block`: int64
        `(documents,)` each.
        """
        for index, starts in enumerate(self.start_arrays):
            base = int(self._first_token[index])
            end = int(self._first_token[index + 1]) - base
            for first in range(0, len(starts), block):
                chosen = starts[first : first + block + 1].astype(np.int64)
                bounds = chosen if len(chosen) > block else np.append(chosen, end)
                yield bounds[:-1] + base, np.diff(bounds)

    def document_starts_in(self, start: int, count: int) -> np.ndarray:
        """Where documents begin within the slice, relative to `start`, ascending, int64 `(documents,)`."""
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
            bounds = np.array(
                [max(start - base, 0), start + count - base], dtype=starts.dtype
            )  # of one type, or all starts are converted
            low, high = np.searchsorted(starts, bounds)
            found.append(starts[low:high].astype(np.int64) + (base - start))
        return np.concatenate(found) if found else np.empty(0, np.int64)
