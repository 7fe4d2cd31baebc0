"""Packing loses and repeats no token, makes no row too long, and reports its waste correctly."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_trainer.config import DataConfig, RunConfig, UsageError
from llm_trainer.config.parse.validation import not_implemented_settings
from llm_trainer.data.sampling import packing
from llm_trainer.data.sampling.packing import (
    MAX_OPEN_ROWS,
    STRATEGIES,
    Packing,
    format_packing_stats,
    measure_packing,
    pack_segments,
    split_documents,
)

LENGTHS = st.lists(st.integers(1, 60), max_size=80)


def blocks(lengths: list[int], size: int = 7) -> list[tuple[np.ndarray, np.ndarray]]:
    """Offsets and lengths of documents, in blocks."""
    starts = np.cumsum([0, *lengths])[:-1]
    return [(starts[i : i + size], np.array(lengths[i : i + size])) for i in range(0, len(lengths), size)]


@settings(max_examples=200)
@given(
    lengths=LENGTHS,
    context=st.integers(1, 20),
    data=st.data(),
    has_eos=st.booleans(),
    strategy=st.sampled_from(["first_fit", "none"]),
)
def test_every_token_is_a_label_in_exactly_one_segment(
    lengths: list[int], context: int, data: st.DataObject, has_eos: bool, strategy: packing.Strategy
) -> None:
    stride = data.draw(st.integers(0, context - 1))
    rows = list(
        pack_segments(split_documents(blocks(lengths), context, stride, has_eos=has_eos), context, strategy)
    )
    assert all(0 < sum(piece[1] for piece in row) <= context for row in rows)
    labels = [
        token
        for row in rows
        for first, count, overlap, _ in row
        for token in range(first + overlap, first + count)
    ]
    starts = np.cumsum([0, *lengths])
    wanted = [
        token for begin, end in itertools.pairwise(starts) for token in range(begin + (not has_eos), end)
    ]
    assert sorted(labels) == wanted


@given(lengths=LENGTHS, context=st.integers(2, 20), data=st.data())
def test_neighbouring_chunks_of_a_document_overlap_by_exactly_the_stride(
    lengths: list[int], context: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(0, context - 1))
    pieces = np.concatenate(
        [
            *split_documents(blocks(lengths), context, stride, has_eos=True),
            np.empty(0, packing.SEGMENT),
        ]
    )
    for before, after in itertools.pairwise(pieces):
        if after["opens"]:
            assert after["overlap"] == 0
            continue
        assert before["count"] == context
        assert before["first"] + before["count"] - after["first"] == stride == after["overlap"]
        assert after["count"] > stride  # each chunk has something of its own


def test_a_very_long_document_has_the_same_segments_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [3, 1000, 1, 17, 400]
    whole = np.concatenate(list(split_documents(blocks(lengths), 8, 3, has_eos=False)))
    monkeypatch.setattr(packing, "_BLOCK", 7)
    parts = list(split_documents(blocks(lengths, 2), 8, 3, has_eos=False))
    assert max(map(len, parts)) == 7
    assert np.concatenate(parts).tolist() == whole.tolist()


def test_first_fit_uses_the_first_row_with_room_and_cuts_only_documents_longer_than_a_row() -> None:
    rows = list(
        pack_segments(split_documents(blocks([6, 5, 3, 4, 25, 10]), 10, 0, has_eos=True), 10, "first_fit")
    )
    sizes = [[piece[1] for piece in row] for row in rows]
    assert sizes == [
        [10],
        [10],
        [10],
        [6, 3],
        [5, 4],
        [5],
    ]  # 25 is cut into 10 + 10 + 5; full rows come at once
    assert measure_packing([6, 5, 3, 4, 25, 10], 10, Packing("first_fit")).waste == pytest.approx(7 / 60)


def test_the_number_of_open_rows_is_bounded_and_the_fullest_is_closed_first() -> None:
    lengths = [60] * (MAX_OPEN_ROWS - 1) + [
        70,
        60,
    ]  # nothing fits beside another: the last one closes the row of 70
    rows = pack_segments(split_documents(blocks(lengths), 100, 0, has_eos=True), 100, "first_fit")
    assert [piece[1] for piece in next(rows)] == [70]
    assert len(list(rows)) == MAX_OPEN_ROWS


@settings(max_examples=100)
@given(lengths=LENGTHS, context=st.integers(1, 20), strategy=st.sampled_from(STRATEGIES), data=st.data())
def test_positions_are_labels_overlaps_or_padding(
    lengths: list[int], context: int, strategy: packing.Strategy, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(0, context - 1))
    stats = measure_packing(lengths, context, Packing(strategy, stride))
    assert stats.positions == stats.rows * context
    assert stats.padding >= 0
    assert 0 <= stats.waste <= 1
    assert stats.supervised == (max(0, sum(lengths) - 1) if strategy == "greedy" else sum(lengths))


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60), context=st.integers(1, 20))
def test_packing_never_wastes_more_than_padding(lengths: list[int], context: int) -> None:
    greedy, first_fit, none = (
        measure_packing(lengths, context, Packing(strategy)).rows for strategy in STRATEGIES
    )
    assert greedy <= first_fit <= none


def test_cut_documents_are_counted_for_each_strategy() -> None:
    # As labels of the stream: document 0 is tokens 0 … 3, row 0 holds the labels 1 … 10.
    assert measure_packing([4, 4, 4, 4], 10, Packing("greedy")).cut == 1
    assert measure_packing([4, 4, 4, 4], 10, Packing("first_fit")).cut == 0
    assert measure_packing([4, 24, 4, 4], 10, Packing("none")).cut == 1


def test_the_waste_of_every_strategy_is_printed_and_marked_if_it_is_of_a_sample(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = format_packing_stats([30, 70, 20], 100, Packing("first_fit"))
    assert [line.split(":")[0].strip() for line in lines[1:]] == list(STRATEGIES)
    assert "chosen: first_fit" in lines[0]
    assert "60.0% padding" in lines[3]  # three rows of 100 for 120 tokens
    monkeypatch.setattr(packing, "_MEASURED_DOCUMENTS", 2)
    assert "first 2 documents" in format_packing_stats([30, 70, 20], 100, Packing())[0]


def test_without_a_row_length_the_waste_is_printed_for_the_default_one() -> None:
    assert format_packing_stats([30, 70], None, Packing())[0].startswith("packing into rows of 1,024 tokens")
    assert format_packing_stats([30, 70], None, Packing(stride=2000)) == []


def test_a_stride_as_long_as_a_row_is_refused() -> None:
    with pytest.raises(UsageError, match="stride=8 must be smaller than the length of a row, 8 tokens"):
        measure_packing([3, 4], 8, Packing("none", stride=8))


def test_the_settings_of_the_manuals_select_the_strategies() -> None:
    assert Packing.from_config(
        DataConfig(pack_sequences=True, packing_strategy="greedy", max_length=1024)
    ) == Packing("greedy")
    assert Packing.from_config(DataConfig(packing_strategy="first_fit", stride=64)) == Packing(
        "first_fit", 64
    )
    assert Packing.from_config(DataConfig(pack_sequences=False)).strategy == "none"
    whole = DataConfig(
        dataset_name="wikitext",
        dataset_config="wikitext-103-raw-v1",
        dataset_split="train",
        validation_split="validation",
        text_column="text",
        max_length=1024,
        min_length=10,
        pack_sequences=True,
        preprocessing_num_workers=8,
    )
    other = DataConfig(pack_sequences=False, stride=16, max_length=64)
    for config in (whole, other, DataConfig(packing_strategy="first_fit")):
        assert not_implemented_settings(RunConfig(data=config)) == []


def test_unset_settings_are_those_that_the_data_was_prepared_with() -> None:
    prepared = Packing.from_json(Packing("first_fit", 16).to_json())
    silent, said = DataConfig(), DataConfig(packing_strategy="greedy", stride=0)
    prepared.apply_to_unset(silent)
    prepared.apply_to_unset(said)
    assert Packing.from_config(silent) == Packing("first_fit", 16)
    assert Packing.from_config(said) == Packing("greedy", 0)
    alone = DataConfig()
    Packing.from_json(Packing("none").to_json()).apply_to_unset(alone)
    assert Packing.from_config(alone).strategy == "none"
    assert Packing.from_json(None) == Packing()
