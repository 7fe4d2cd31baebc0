"""Token shards are read as they were written, and damaged ones are refused by name."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_trainer.data.token_shards import HEADER_BYTES, ShardWriter, TokenDataset
from llm_trainer.errors import DataError

HASH = hashlib.sha256(b"tokenizer").hexdigest()


def write(
    folder: Path,
    documents: list[list[int]],
    *,
    vocab: int = 300,
    end: int | None = 0,
    shard_tokens: int = 2**27,
) -> TokenDataset:
    with ShardWriter(
        folder, "train", vocab_size=vocab, tokenizer_hash=HASH, eos_id=end, shard_tokens=shard_tokens
    ) as writer:
        for ids in documents:
            writer.add(ids, num_bytes=3 * len(ids))
            writer.end_document()
    return TokenDataset.open(folder, "train")


@settings(max_examples=60)
@given(
    documents=st.lists(st.lists(st.integers(1, 299), min_size=1, max_size=20), min_size=1, max_size=12),
    shard_tokens=st.sampled_from([1, 7, 30, 10_000]),
    data=st.data(),
)
def test_any_slice_of_several_shards_reads_as_one_stream(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[list[int]],
    shard_tokens: int,
    data: st.DataObject,
) -> None:
    tokens = write(tmp_path_factory.mktemp("shards"), documents, shard_tokens=shard_tokens)
    stream = [i for document in documents for i in (*document, 0)]
    starts = [0, *np.cumsum([len(document) + 1 for document in documents])][:-1]
    assert (tokens.num_tokens, tokens.num_documents, tokens.largest_id) == (
        len(stream),
        len(documents),
        max(stream),
    )
    assert tokens.num_bytes == 3 * sum(map(len, documents))
    first = data.draw(st.integers(0, len(stream)))
    count = data.draw(st.integers(0, len(stream) - first))
    ids = tokens.read(first, count)
    assert ids.dtype == np.int64
    assert ids.tolist() == stream[first : first + count]
    assert tokens.document_starts_in(first, count).tolist() == [
        s - first for s in starts if first <= s < first + count
    ]


@settings(max_examples=60)
@given(
    documents=st.lists(st.lists(st.integers(1, 299), max_size=9), max_size=12),
    shard_tokens=st.sampled_from([1, 7, 30, 10_000]),
    end=st.sampled_from([0, None]),
    cut=st.integers(0, 12),
)
def test_documents_added_in_bulk_equal_those_added_one_by_one(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[list[int]],
    shard_tokens: int,
    end: int | None,
    cut: int,
) -> None:
    one_by_one = write(tmp_path_factory.mktemp("shards"), documents, shard_tokens=shard_tokens, end=end)
    folder = tmp_path_factory.mktemp("bulk")
    with ShardWriter(
        folder, "train", vocab_size=300, tokenizer_hash=HASH, eos_id=end, shard_tokens=shard_tokens
    ) as writer:
        for part in (documents[:cut], documents[cut:]):
            writer.add_documents(
                [np.array(ids, dtype=np.int64) for ids in part], num_bytes=3 * sum(map(len, part))
            )
    in_bulk = TokenDataset.open(folder, "train")
    assert in_bulk.read(0, len(in_bulk)).tolist() == one_by_one.read(0, len(one_by_one)).tolist()
    count = len(one_by_one)
    assert in_bulk.document_starts_in(0, count).tolist() == one_by_one.document_starts_in(0, count).tolist()
    assert in_bulk.num_bytes == one_by_one.num_bytes


def test_reading_outside_the_stream_is_an_error(tmp_path: Path) -> None:
    tokens = write(tmp_path, [[1, 2, 3]])
    for start, count in ((-1, 2), (0, 5), (4, 1)):
        with pytest.raises(IndexError):
            tokens.read(start, count)


@pytest.mark.parametrize(("vocab", "item_bytes"), [(2**16, 2), (2**16 + 1, 4)])
def test_the_vocabulary_decides_the_size_of_an_id(tmp_path: Path, vocab: int, item_bytes: int) -> None:
    tokens = write(tmp_path, [[1, vocab - 1]], vocab=vocab)
    assert tokens.read(0, 2).tolist() == [1, vocab - 1]
    assert (tmp_path / "train-00000.tokens").stat().st_size == HEADER_BYTES + -(-3 * item_bytes // 8) * 8 + 8


def test_ids_outside_the_vocabulary_are_refused_and_leave_no_file(tmp_path: Path) -> None:
    for wrong in (-1, 300):
        with pytest.raises(DataError, match="vocabulary of 300"):
            write(tmp_path, [[1, wrong]])
    assert list(tmp_path.iterdir()) == []


def test_documents_without_an_end_of_text_and_documents_that_are_cut(tmp_path: Path) -> None:
    assert write(tmp_path / "a", [[1, 2], [3]], end=None).read(0, 3).tolist() == [1, 2, 3]
    with ShardWriter(tmp_path / "b", "train", vocab_size=300, tokenizer_hash=HASH, eos_id=0) as writer:
        writer.add([5, 6])
        writer.end_document(append_eos=False)
        writer.end_document()  # nothing since: no document
        writer.add([7])
        writer.end_document()
    tokens = TokenDataset.open(tmp_path / "b", "train")
    assert tokens.read(0, 4).tolist() == [5, 6, 7, 0]
    assert tokens.document_starts_in(0, 4).tolist() == [0, 2]


def test_an_empty_split_is_an_empty_stream(tmp_path: Path) -> None:
    tokens = write(tmp_path, [])
    assert (len(tokens), tokens.num_documents, tokens.num_bytes, tokens.largest_id) == (0, 0, 0, 0)


def test_every_truncation_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, [[1, 2, 3], [4, 5]])
    file = tmp_path / "train-00000.tokens"
    whole = file.read_bytes()
    for size in (*range(0, len(whole), 13), len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"train-00000\.tokens"):
            TokenDataset.open(tmp_path, "train")
    file.write_bytes(whole + b"\0")
    with pytest.raises(DataError, match="truncated or damaged"):
        TokenDataset.open(tmp_path, "train")


def test_every_flipped_bit_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, [[1, 2, 3], [4, 5]])
    file = tmp_path / "train-00000.tokens"
    whole = file.read_bytes()
    for place in [
        p for p in range(len(whole)) if not 160 <= p < HEADER_BYTES
    ]:  # but for the header's unused zeros
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(DataError, match=r"train-00000\.tokens"):
            TokenDataset.open(tmp_path, "train")


def test_missing_shards_and_splits_are_named(tmp_path: Path) -> None:
    write(tmp_path, [[1, 2, 3]] * 3, shard_tokens=1)
    (tmp_path / "train-00001.tokens").unlink()
    with pytest.raises(DataError, match="missing"):
        TokenDataset.open(tmp_path, "train")
    with pytest.raises(DataError, match="'test'"):
        TokenDataset.open(tmp_path, "test")


def test_shards_of_different_tokenizers_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1]])
    with ShardWriter(tmp_path / "b", "train", vocab_size=300, tokenizer_hash=HASH[::-1], eos_id=0) as writer:
        writer.add([1])
    (tmp_path / "b" / "train-00000.tokens").rename(tmp_path / "a" / "train-00001.tokens")
    with pytest.raises(DataError, match="different tokenizers"):
        TokenDataset.open(tmp_path / "a", "train")


def test_an_unfinished_shard_does_not_have_its_final_name(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train", vocab_size=300, tokenizer_hash=HASH, eos_id=0)
    writer.add([1, 2, 3])
    assert not list(tmp_path.glob("*.tokens"))
    writer.abort()
    assert not list(tmp_path.iterdir())


def test_the_fingerprint_depends_on_the_ids_and_not_on_the_folder(tmp_path: Path) -> None:
    first, same, other = (
        write(tmp_path / "a", [[1, 2]]),
        write(tmp_path / "b", [[1, 2]]),
        write(tmp_path / "c", [[2, 1]]),
    )
    assert first.fingerprint == same.fingerprint != other.fingerprint
    assert (
        TokenDataset.from_ids([1, 2], vocab_size=3).fingerprint
        != TokenDataset.from_ids([2, 1], vocab_size=3).fingerprint
    )
