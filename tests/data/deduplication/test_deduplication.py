"""Deduplication: signatures with the expected recall, clusters that depend on keys alone, and leakage."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_trainer.config.schema.data import DataConfig
from llm_trainer.data.deduplication import shingles
from llm_trainer.data.deduplication.clusters import (
    EXCLUDED,
    Keys,
    KeyTable,
    count_leaked_documents,
    exact_duplicate_clusters,
    find_clusters,
    near_duplicate_clusters,
)
from llm_trainer.data.deduplication.minhash import BandKeyWriter, MinHasher, StreamingSignature
from llm_trainer.data.sources import base
from llm_trainer.errors import DataError

HASHER = MinHasher()
WORDS = [f"word{number}" for number in range(3000)]


def document(seed: int, length: int = 300) -> list[str]:
    return random.Random(seed).choices(WORDS, k=length)


def changed(words: list[str], count: int) -> list[str]:
    """A copy with `count` words, far apart, replaced."""
    copied = list(words)
    for index in range(2, 2 + 6 * count, 6):
        copied[index] = "other"
    return copied


def jaccard(left: list[str], right: list[str]) -> float:
    first, second = (
        {tuple(words[index : index + 5]) for index in range(len(words) - 4)} for words in (left, right)
    )
    return len(first & second) / len(first | second)


def write(folder: Path, texts: list[str], name: str = "all.bands", hasher: MinHasher = HASHER) -> Path:
    with BandKeyWriter(folder / name, hasher) as writer:
        for text in texts:
            writer.add(text)
    return folder / name


def table(keys: Keys, width: int = 1, rows: int = 7) -> KeyTable:
    def blocks() -> Iterator[Keys]:
        for begin in range(0, len(keys), rows):
            yield keys[begin : begin + rows]

    return KeyTable(blocks, len(keys), keys.shape[1] // width, width)


def plain_clusters(keys: Keys, width: int) -> list[int]:
    """Labels by the definition: the least number reachable over equal keys of one column."""
    labels = list(range(len(keys)))
    while True:
        before = list(labels)
        for column in range(0, keys.shape[1], width):
            least: dict[bytes, int] = {}
            for number, row in enumerate(keys):
                key = row[column : column + width].tobytes()
                least[key] = min(least.get(key, number), labels[number])
            labels = [
                min(label, least[row[column : column + width].tobytes()])
                for label, row in zip(labels, keys, strict=True)
            ]
        if labels == before:
            return labels


def test_the_threshold_and_the_expected_recall_are_those_of_the_formula() -> None:
    assert round(HASHER.threshold, 4) == round((1 / 14) ** (1 / 8), 4) == 0.719
    assert round(HASHER.expected_recall(0.8), 4) == 0.9235
    assert [round(HASHER.expected_recall(similarity), 4) for similarity in (0.6, 0.7, 0.9)] == [
        0.2111,
        0.5645,
        0.9996,
    ]


def test_a_signature_has_a_value_for_each_row_and_is_the_same_in_a_batch_and_alone() -> None:
    texts = [" ".join(document(seed, length)) for seed, length in enumerate((1, 4, 5, 30, 300))] + [
        "",
        "?!",
        "\u65e5\u672c\u8a9e\u306e\u30c6",
    ]
    together = HASHER.signatures(texts)
    assert together.shape == (len(texts), 112)
    assert together.dtype == np.uint32
    for text, row in zip(texts, together, strict=True):
        assert HASHER.signature(text).tolist() == row.tolist()


def test_case_and_punctuation_make_no_difference_and_word_order_does() -> None:
    text = "The cat sat on the mat, and the dog (who knew?) did not."
    assert HASHER.signature(text).tolist() == HASHER.signature(text.upper().replace(",", " --")).tolist()
    assert (HASHER.signature(text) == HASHER.signature(" ".join(reversed(text.split())))).mean() < 0.1


def test_rows_agree_as_often_as_the_sets_of_ngrams_overlap() -> None:
    for count in (1, 4, 10, 25):
        pairs = [(document(seed), changed(document(seed), count)) for seed in range(40)]
        left, right = (HASHER.signatures([" ".join(pair[side]) for pair in pairs]) for side in (0, 1))
        assert (left == right).mean() == pytest.approx(np.mean([jaccard(*pair) for pair in pairs]), abs=0.02)


def test_recall_of_planted_duplicates_is_the_expected_recall(tmp_path: Path) -> None:
    pairs = [(document(seed), changed(document(seed), 7)) for seed in range(400)]
    similarity = np.mean([jaccard(*pair) for pair in pairs])
    assert similarity == pytest.approx(0.8, abs=0.005)
    file = write(tmp_path, [" ".join(words) for pair in pairs for words in pair])
    labels = near_duplicate_clusters([file], HASHER.bands)
    found = np.mean(labels[0::2] == labels[1::2])
    assert found >= 0.90
    assert found == pytest.approx(HASHER.expected_recall(float(similarity)), abs=0.05)
    assert len(np.unique(labels)) == 400 + round(400 * (1 - found)), "and no other documents are clustered"


def test_a_document_in_chunks_has_the_signature_of_the_complete_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(shingles, "BLOCK_BYTES", 700)
    text = " ".join(document(1, 2000))
    chunks = list(base.rechunk(iter([text])))
    assert len(chunks) > 10
    signature = StreamingSignature(HASHER)
    for chunk in chunks:
        signature.add(chunk.text)
    expected = HASHER.signatures([text])[0]
    assert signature.end().tolist() == expected.tolist()
    with BandKeyWriter(tmp_path / "chunks", HASHER) as writer:
        writer.add("before it")
        for chunk in chunks:
            writer.add(chunk.text, chunk.is_last)
        writer.add("after it")
    assert (tmp_path / "chunks").read_bytes() == write(tmp_path, ["before it", text, "after it"]).read_bytes()


def test_a_file_of_band_keys_is_the_same_however_documents_were_batched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [" ".join(document(seed, seed % 40)) for seed in range(300)]
    complete = write(tmp_path, texts).read_bytes()
    assert len(complete) == 300 * 14 * 8
    monkeypatch.setattr("llm_trainer.data.deduplication.minhash._MAX_BUFFERED_DOCUMENTS", 7)
    assert write(tmp_path, texts, "small").read_bytes() == complete
    assert complete == HASHER.band_keys(HASHER.signatures(texts)).tobytes()


def test_settings_change_the_signature_and_its_key() -> None:
    config = DataConfig(near_duplicate_bands=4, near_duplicate_rows=3, near_duplicate_ngram=2)
    hasher = MinHasher.from_config(config)
    assert (hasher.bands, hasher.rows, hasher.ngram) == (4, 3, 2)
    assert hasher.signature("a b c").shape == (12,)
    assert hasher.band_keys(hasher.signatures(["a b c", "a b d"])).shape == (2, 4)
    assert MinHasher.from_config(DataConfig()) == HASHER
    assert hasher.key != HASHER.key


keys_of_documents = st.integers(1, 4).flatmap(
    lambda columns: st.lists(
        st.lists(st.integers(0, 12), min_size=columns, max_size=columns), min_size=1, max_size=60
    )
)


@settings(max_examples=200)
@given(keys_of_documents, st.booleans(), st.sampled_from([1, 300, 2000, 2**28]))
def test_clusters_are_the_connected_components_in_any_amount_of_memory(
    rows: list[list[int]], has_one_column: bool, sort_bytes: int
) -> None:
    keys = np.array(rows, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    width = keys.shape[1] if has_one_column else 1
    assert find_clusters(table(keys, width), "clustering", sort_bytes=sort_bytes).tolist() == plain_clusters(
        keys, width
    )


def test_exact_clusters_have_equal_hashes_of_sixteen_bytes() -> None:
    hashes = np.array([[1, 2], [1, 3], [2, 2], [1, 2], [2, 1], [1, 3], [1, 2]], np.uint64)
    assert exact_duplicate_clusters(lambda: iter([hashes[:3], hashes[3:]]), 7).tolist() == [
        0,
        1,
        2,
        0,
        4,
        1,
        0,
    ]
    assert exact_duplicate_clusters(lambda: iter([]), 0).tolist() == []


def test_a_chain_of_similar_documents_is_one_cluster_labelled_by_its_first() -> None:
    chain = np.array([[number // 2 * 2 + 1000, (number + 1) // 2 * 2] for number in range(5000)], np.uint64)
    order = np.random.default_rng(0).permutation(5000)
    assert set(find_clusters(table(chain[order]), "clustering").tolist()) == {0}


def test_neither_the_order_of_files_nor_of_documents_changes_the_clusters(tmp_path: Path) -> None:
    texts = [" ".join(changed(document(seed // 3), seed % 3)) for seed in range(90)]
    split = [write(tmp_path, texts[begin : begin + 13], f"{begin}.bands") for begin in range(0, 90, 13)]
    labels = near_duplicate_clusters(split, HASHER.bands)
    assert labels.tolist() == near_duplicate_clusters([write(tmp_path, texts)], HASHER.bands).tolist()
    order = random.Random(5).sample(range(90), 90)
    shuffled = near_duplicate_clusters([write(tmp_path, [texts[index] for index in order])], HASHER.bands)

    def together(labels: np.ndarray, names: list[int]) -> set[frozenset[int]]:
        return {
            frozenset(name for name, label in zip(names, labels, strict=True) if label == one)
            for one in set(labels.tolist())
        }

    assert together(labels, list(range(90))) == together(shuffled, order)
    assert len(set(labels.tolist())) == 30


@settings(max_examples=100)
@given(keys_of_documents, st.randoms(use_true_random=False), st.sampled_from([1, 300, 2**28]))
def test_leaks_are_held_out_documents_with_a_key_of_another_split(
    rows: list[list[int]], chance: random.Random, sort_bytes: int
) -> None:
    keys = np.array(rows, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    splits = np.array([chance.choice([0, 0, 1, 2, EXCLUDED]) for _ in rows], np.uint8)
    expected = 0
    for number, row in enumerate(rows):
        others = [other for other in range(len(rows)) if splits[other] not in (splits[number], EXCLUDED)]
        is_held_out = splits[number] not in (0, EXCLUDED)
        expected += is_held_out and any(
            mine == theirs for other in others for mine, theirs in zip(row, rows[other], strict=True)
        )
    assert count_leaked_documents(table(keys), splits, sort_bytes=sort_bytes) == expected


def test_splits_by_cluster_leak_nothing_and_leaks_of_others_are_counted(tmp_path: Path) -> None:
    texts = [" ".join(changed(document(seed // 2), seed % 2)) for seed in range(60)]
    file = write(tmp_path, texts)
    keys = KeyTable.from_files([file], HASHER.bands)
    labels = near_duplicate_clusters([file], HASHER.bands)
    assert count_leaked_documents(keys, (labels % 6 == 0).astype(np.uint8)) == 0
    splits = (np.arange(60) % 2).astype(np.uint8)
    assert count_leaked_documents(keys, splits) == 30
    splits[splits == 0] = EXCLUDED
    assert count_leaked_documents(keys, splits) == 0


def test_memory_stays_within_the_limit_and_some_bytes_per_document() -> None:
    document_count = 200_000

    def blocks() -> Iterator[Keys]:
        for begin in range(0, document_count, 10_000):
            keys = np.random.default_rng(begin).integers(0, 2**64, (10_000, 14), dtype=np.uint64)
            keys[::7] = keys[0]
            yield keys

    tracemalloc.start()
    labels = find_clusters(KeyTable(blocks, document_count, 14), "clustering", sort_bytes=4 * 2**20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(labels)) == document_count - 20 * (len(range(0, 10_000, 7)) - 1)
    assert peak < 4 * 2**20 + 16 * document_count + 3 * 10_000 * 14 * 8


def test_a_truncated_file_is_refused_by_name(tmp_path: Path) -> None:
    file = write(tmp_path, ["one text", "another text"])
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"all\.bands is truncated"):
        near_duplicate_clusters([file], HASHER.bands)
