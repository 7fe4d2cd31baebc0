"""Packed rows are the same for any slicing and storage, and a packed document gives what it gives alone."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_trainer.config import DataConfig, ModelConfig
from llm_trainer.data.pipeline.pipeline import prepare_dataset
from llm_trainer.data.prepared_dataset import open_prepared_dataset
from llm_trainer.data.sampling import packed_rows
from llm_trainer.data.sampling.batch import IGNORE_INDEX, Batch
from llm_trainer.data.sampling.packed_rows import INDEX_FOLDER, PackedRows, PackedRowSampler
from llm_trainer.data.sampling.packing import STRATEGIES, Packing, Strategy, measure_packing
from llm_trainer.data.sampling.samplers import build_sampler, validation_batches, validation_row_count
from llm_trainer.data.token_shards import ShardWriter, TokenDataset
from llm_trainer.errors import DataError, UsageError
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.engines.validation import validate
from llm_trainer.training.objectives.objective import NextToken

VOCABULARY = 5000


def documents(
    folder: Path, lengths: list[int], *, end: int | None, shard_tokens: int = 2**27
) -> TokenDataset:
    """Documents of distinct ids from 1 on; 0 ends them."""
    next_id = 1
    with ShardWriter(
        folder, "train", vocab_size=VOCABULARY, tokenizer_hash="0" * 64, eos_id=end, shard_tokens=shard_tokens
    ) as writer:
        for length in lengths:
            writer.add(range(next_id, next_id + length))
            writer.end_document()
            next_id += length
    return TokenDataset.open(folder, "train")


def supervised(batch: Batch) -> list[tuple[int, int]]:
    """(input, label) of all supervised positions."""
    chosen = batch.labels != IGNORE_INDEX
    return list(zip(batch.input_ids[chosen].tolist(), batch.labels[chosen].tolist(), strict=True))


def test_the_end_of_text_precedes_each_document_and_padding_is_not_supervised(tmp_path: Path) -> None:
    tokens = documents(tmp_path, [2, 3, 12], end=0)  # 1 2 0 | 3 4 5 0 | 6 … 17 0
    rows = PackedRows(tokens, 8, Packing("first_fit"))
    batch = rows.rows(np.arange(rows.count))
    assert batch.input_ids.tolist() == [
        [0, 6, 7, 8, 9, 10, 11, 12],
        [0, 1, 2, 0, 3, 4, 5, 0],
        [13, 14, 15, 16, 17, 0, 0, 0],
    ]
    assert batch.labels.tolist() == [
        [6, 7, 8, 9, 10, 11, 12, 13],
        [1, 2, 0, 3, 4, 5, 0, IGNORE_INDEX],
        [14, 15, 16, 17, 0, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX],
    ]
    assert batch.document_ids is not None
    assert batch.document_ids.tolist() == [[0] * 8, [0, 0, 0, 1, 1, 1, 1, 2], [0] * 5 + [1] * 3]
    assert batch.num_supervised == len(tokens) == rows.supervised


def test_without_packing_each_document_has_rows_of_its_own_and_overlaps_are_learned_once(
    tmp_path: Path,
) -> None:
    tokens = documents(tmp_path, [2, 9], end=None)  # 1 2 | 3 … 11
    batch = PackedRows(tokens, 4, Packing("none", stride=1)).rows(np.arange(4))
    assert batch.document_ids is None  # causal attention sees no padding behind it
    assert batch.input_ids.tolist() == [[1, 0, 0, 0], [3, 4, 5, 6], [6, 7, 8, 9], [9, 10, 0, 0]]
    assert batch.labels.tolist() == [
        [2, *[IGNORE_INDEX] * 3],
        [4, 5, 6, 7],
        [IGNORE_INDEX, 8, 9, 10],
        [IGNORE_INDEX, 11, IGNORE_INDEX, IGNORE_INDEX],
    ]


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=2, max_size=20),
    context=st.integers(2, 12),
    has_eos=st.booleans(),
    strategy=st.sampled_from(STRATEGIES),
    data=st.data(),
)
def test_validation_reads_every_token_once_with_each_strategy(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    context: int,
    has_eos: bool,
    strategy: Strategy,
    data: st.DataObject,
) -> None:
    packing = Packing(strategy, data.draw(st.integers(0, context - 1)))
    tokens = documents(
        tmp_path_factory.mktemp("d"),
        lengths,
        end=0 if has_eos else None,
        shard_tokens=data.draw(st.sampled_from([1, 10**6])),
    )
    batches = list(validation_batches(tokens, context, data.draw(st.integers(1, 5)), packing=packing))
    pairs = [pair for batch in batches for pair in supervised(batch)]
    ids = tokens.read(0, len(tokens)).tolist()
    starts = set(np.cumsum([0, *(length + has_eos for length in lengths)]).tolist())
    unseen = ({0} if has_eos else starts) if strategy == "greedy" else (set() if has_eos else starts)
    before = {
        place: ids[place - 1] if place and (not has_eos or place not in starts) else 0
        for place in range(len(ids))
    }
    wanted = [(before[place], ids[place]) for place in range(len(ids)) if place not in unseen]
    assert sorted(pairs) == sorted(wanted)
    assert sum(batch.num_supervised for batch in batches) == len(wanted)
    if batches:
        assert len({batch.input_ids.shape for batch in batches[1:]}) <= 1
        assert sum(len(batch) for batch in batches) >= validation_row_count(tokens, context, packing)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("stride", [0, 3])
def test_samples_are_the_same_for_any_slicing(tmp_path: Path, strategy: Strategy, stride: int) -> None:
    tokens = documents(tmp_path, [7, 30, 2, 50, 11, 5, 64] * 6, end=0)
    packing = Packing(strategy, stride)
    sampler, fresh = build_sampler(tokens, 16, 5, packing), build_sampler(tokens, 16, 5, packing)
    count = 2 * sampler.samples_per_epoch + 3
    whole = sampler.batch(0, count)
    for first, size in (
        (count - 4, 4),
        (sampler.samples_per_epoch - 2, 5),
        (0, 1),
    ):  # over an epoch's edge as well
        part = fresh.batch(first, size)
        assert torch.equal(part.input_ids, whole.input_ids[first : first + size])
        assert torch.equal(part.labels, whole.labels[first : first + size])
    other = build_sampler(tokens, 16, 6, packing).batch(0, 8)
    assert not torch.equal(other.input_ids, whole.input_ids[:8])


@pytest.mark.parametrize("strategy", ["first_fit", "none"])
def test_an_epoch_reads_every_row_once_and_the_next_one_in_another_order(
    tmp_path: Path, strategy: Strategy
) -> None:
    tokens = documents(tmp_path, [7, 30, 2, 50, 11, 5, 64] * 4, end=0)
    sampler = PackedRowSampler(tokens, 16, 3, Packing(strategy))
    size = sampler.samples_per_epoch
    epochs = [sampler.batch(epoch * size, size) for epoch in range(2)]
    assert sorted(supervised(epochs[0])) == sorted(supervised(epochs[1]))
    assert len(supervised(epochs[0])) == len(tokens)
    assert sampler.tokens_per_sample * size == pytest.approx(len(tokens))
    assert not torch.equal(epochs[0].input_ids, epochs[1].input_ids)


def test_an_epoch_with_a_stride_supervises_each_token_once(tmp_path: Path) -> None:
    tokens = documents(tmp_path, [5] * 60, end=0)
    sampler = build_sampler(tokens, 16, 1, Packing("greedy", stride=6))
    labels = [label for _, label in supervised(sampler.batch(0, sampler.samples_per_epoch)) if label]
    assert len(labels) == len(set(labels)) > 0.9 * 300


def test_a_large_table_is_memory_mapped_and_reused_and_gives_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = np.random.default_rng(0).integers(1, 40, 100).tolist()
    folder = tmp_path / "dataset"
    tokens = documents(folder, lengths, end=0)
    packing = Packing("first_fit", 3)
    small = PackedRowSampler(tokens, 16, 1, packing).batch(0, 50)
    monkeypatch.setattr(packed_rows, "MAX_IN_MEMORY_SEGMENTS", 10)
    monkeypatch.setattr(packed_rows, "_BUFFERED_SEGMENTS", 7)
    large = PackedRowSampler(TokenDataset.open(folder, "train"), 16, 1, packing).batch(0, 50)
    assert torch.equal(small.labels, large.labels)
    (made,) = (folder / INDEX_FOLDER).iterdir()
    written = (made / "pieces").stat().st_mtime_ns
    PackedRowSampler(TokenDataset.open(folder, "train"), 16, 2, packing)
    assert [(made / "pieces").stat().st_mtime_ns] == [written]
    (made / "ends").write_bytes(b"")  # torn: made anew
    again = PackedRowSampler(TokenDataset.open(folder, "train"), 16, 1, packing).batch(0, 50)
    assert torch.equal(small.input_ids, again.input_ids)
    assert (made / "ends").stat().st_size > 0
    assert list((folder / INDEX_FOLDER).iterdir()) == [made]


@pytest.mark.slow
def test_computing_a_large_table_takes_no_more_memory_for_more_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_rows, "MAX_IN_MEMORY_SEGMENTS", 10)
    monkeypatch.setattr(packed_rows, "_BUFFERED_SEGMENTS", 2**12)
    peaks = []
    for count in (40_000, 120_000):
        lengths = np.random.default_rng(0).integers(2, 60, count)
        ids = np.broadcast_to(np.uint16(5), (int(lengths.sum()),))
        starts = (np.cumsum(lengths) - lengths).astype(np.uint64)
        facts = {"vocab_size": 10, "tokenizer_hash": "0" * 64, "eos_id": 0, "largest_id": 5}
        tokens = TokenDataset([ids], [starts], source=str(tmp_path), fingerprint=str(count), **facts)
        tracemalloc.start()
        PackedRows(tokens, 64, Packing("first_fit"))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


def test_if_the_folder_is_not_writable_the_table_is_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = documents(tmp_path, [9] * 40, end=0)
    (tmp_path / INDEX_FOLDER).write_text("in the way", encoding="utf-8")
    monkeypatch.setattr(packed_rows, "MAX_IN_MEMORY_SEGMENTS", 10)
    rows = PackedRows(tokens, 10, Packing("first_fit"))
    assert len(supervised(rows.rows(np.arange(rows.count)))) == len(tokens)


def test_nothing_to_predict_and_a_stride_too_long_are_refused(tmp_path: Path) -> None:
    tokens = documents(tmp_path, [1, 1, 1], end=None)
    with pytest.raises(DataError, match="nothing to predict"):
        build_sampler(tokens, 4, 0, Packing("none"))
    with pytest.raises(UsageError, match="stride=4 must be smaller"):
        build_sampler(tokens, 4, 0, Packing("first_fit", 4))


def test_the_reported_waste_is_that_of_the_rows(tmp_path: Path) -> None:
    lengths = np.random.default_rng(1).integers(1, 60, 50).tolist()
    tokens = documents(tmp_path, [length - 1 for length in lengths if length > 1], end=0)
    stored = np.concatenate([found for _, found in tokens.documents()])
    for strategy in STRATEGIES:
        facts = measure_packing(stored, 16, Packing(strategy, 2))
        shown = list(validation_batches(tokens, 16, 1, packing=Packing(strategy, 2)))
        assert facts.rows == len(shown)
        assert facts.supervised == sum(batch.num_supervised for batch in shown)


def network(positions: str = "learned", **settings: object) -> Transformer:
    config = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        max_position_embeddings=32,
        position_embedding=positions,
        dropout=0.0,
        **settings,
    )
    model = Transformer(config)
    model.initialize(torch.Generator().manual_seed(0))
    return model.eval()


def alone(model: Transformer, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids[None])[0]


@pytest.mark.parametrize("positions", ["learned", "rope"])
@pytest.mark.parametrize("window", [None, 5])
def test_packed_logits_are_those_of_each_document_alone(
    tmp_path: Path, positions: str, window: int | None
) -> None:
    tokens = documents(tmp_path, [5, 40, 9, 3, 14, 28, 7], end=0)
    model = network(positions, sliding_window=window)
    rows = PackedRows(tokens, 32, Packing("first_fit"))
    batch = rows.rows(np.arange(rows.count))
    assert batch.document_ids is not None
    assert int(batch.document_ids.max()) > 1
    with torch.no_grad():
        packed = model(batch.input_ids, document_ids=batch.document_ids)
    compared = 0
    for row in range(rows.count):
        for document in batch.document_ids[row].unique().tolist():
            chosen = batch.document_ids[row] == document
            torch.testing.assert_close(
                packed[row, chosen], alone(model, batch.input_ids[row, chosen]), rtol=1e-4, atol=1e-5
            )
            compared += 1
    assert compared > 7


@pytest.mark.parametrize("has_eos", [True, False])
def test_the_loss_over_packed_rows_is_the_loss_over_rows_of_their_own(tmp_path: Path, has_eos: bool) -> None:
    tokens = documents(tmp_path, [5, 31, 9, 3, 14, 28, 7], end=0 if has_eos else None)
    model = network()
    packed = validate(model, tokens, 32, 2, packing=Packing("first_fit"))
    padded = validate(model, tokens, 32, 3, packing=Packing("none"))
    assert packed.tokens == padded.tokens
    assert packed.loss == pytest.approx(padded.loss, rel=1e-5)
    seen = validate(model, tokens, 32, 2, packing=Packing("first_fit", mask_documents=False))
    assert abs(seen.loss - packed.loss) > 1e-4  # the mask is what makes them equal


def test_gradients_over_packed_rows_are_those_over_padded_ones(tmp_path: Path) -> None:
    tokens = documents(tmp_path, [5, 31, 9, 3, 14, 28, 7], end=0)
    gradients = []
    for strategy in ("first_fit", "none"):
        model = network("rope")
        rows = PackedRows(tokens, 32, Packing(strategy))
        loss = NextToken("dense")(model, rows.rows(np.arange(rows.count)))
        (loss.total / loss.tokens).backward()
        gradients.append(
            torch.cat(
                [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
            )
        )
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_training_in_bf16_masks_across_documents_too(tmp_path: Path, positions: str) -> None:
    """On a CPU, attention over short rows in bf16 uses matrix products instead of the fused kernel."""
    tokens = documents(tmp_path, [5, 31, 9, 3, 14, 28, 7], end=0)
    model = network(positions).train()
    totals = []
    for strategy, masked in (("first_fit", True), ("none", True), ("first_fit", False)):
        rows = PackedRows(tokens, 32, Packing(strategy, mask_documents=masked))
        with torch.autocast("cpu", torch.bfloat16):
            totals.append(NextToken("dense")(model, rows.rows(np.arange(rows.count))).total.item())
    assert totals[0] == pytest.approx(totals[1], rel=1e-3)
    assert abs(totals[2] - totals[1]) > 2 * abs(totals[0] - totals[1])


def test_a_prepared_folder_stores_its_packing(tmp_path: Path, tiny_text: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text(tiny_text, encoding="utf-8")
    config = DataConfig(
        input=str(text), tokenizer_type="char", packing_strategy="first_fit", stride=4, max_length=32
    )
    summary = prepare_dataset(config, tmp_path / "out")
    assert open_prepared_dataset(tmp_path / "out").packing == Packing("first_fit", 4)
    assert any("first_fit" in line and "padding" in line for line in summary.lines())
