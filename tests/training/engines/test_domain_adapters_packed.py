"""Domain adapters in training: the loss does not depend on how documents are packed, and validation uses each
document's own adapter.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny_run import VOCABULARY, tiny_config, tiny_model

from llm_trainer.config import DataConfig, RunConfig
from llm_trainer.config.resolve.parallelism import ParallelPlan
from llm_trainer.config.schema.mixture import MixtureStage
from llm_trainer.data.sampling.concat import concat_datasets
from llm_trainer.data.sampling.mixture import MixtureDataset
from llm_trainer.data.sampling.packing import Packing
from llm_trainer.data.sampling.samplers import build_sampler, validation_batches
from llm_trainer.data.token_shards import ShardWriter, TokenDataset
from llm_trainer.distributed.context_parallel import shard_batch
from llm_trainer.distributed.process_group import ProcessGroup
from llm_trainer.model.adapters.lora import is_adapter_parameter
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.engines.validation import validate
from llm_trainer.training.objectives.objective import ModelWithObjective, NextToken
from llm_trainer.training.trainer import Trainer

NAMES = ["math", "law", "code"]
CONTEXT = 16
SHAPE = {
    "use_domain_adaptation": True,
    "adapter_domains": NAMES,
    "adapter_size": 4,
    "max_position_embeddings": CONTEXT,
    "dropout": 0.0,
}
PACKINGS = {"greedy": Packing("greedy"), "first_fit": Packing("first_fit"), "none": Packing("none")}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenDataset]:
    """Documents shorter than a row, of three domains; the residue of an id determines the domain."""
    parts = {}
    for number, name in enumerate(NAMES):
        folder, generator = tmp_path_factory.mktemp(name), np.random.default_rng(number)
        with ShardWriter(folder, "train", vocab_size=VOCABULARY, tokenizer_hash="0" * 64, eos_id=0) as writer:
            for length in generator.integers(2, 9, 12 + number).tolist():
                writer.add(1 + number + 3 * generator.integers(0, 10, length))
                writer.end_document()
        parts[name] = TokenDataset.open(folder, "train")
    return parts


def trained_adapters() -> Transformer:
    model = tiny_model(tiny_config(Path("unused"), SHAPE).model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter_parameter(name):
                parameter.copy_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.5
                )
    return model.eval()


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_position_of_concatenated_corpora_knows_its_corpus(
    corpora: dict[str, TokenDataset], packing: str
) -> None:
    for batch in validation_batches(concat_datasets(corpora, "all"), CONTEXT, 4, packing=PACKINGS[packing]):
        assert batch.sources is not None
        assert batch.sources.names == tuple(NAMES)
        is_text = batch.labels > 0  # not an end of text, which all have
        assert is_text.any()
        assert torch.equal(batch.sources.numbers[is_text], (batch.labels[is_text] - 1) % 3)


@pytest.mark.parametrize("packing", PACKINGS)
def test_validation_over_all_corpora_is_that_of_each_with_its_own_adapter(
    corpora: dict[str, TokenDataset], packing: str
) -> None:
    model = trained_adapters()
    alone = {}
    for name in NAMES:
        model.set_domain(name)
        alone[name] = validate(model, corpora[name], CONTEXT, 4, packing=Packing("none"))
    model.set_domain(None)
    found = validate(model, concat_datasets(corpora, "all"), CONTEXT, 4, packing=PACKINGS[packing])
    wanted = sum(one.loss * one.tokens for one in alone.values()) / sum(one.tokens for one in alone.values())
    if (
        packing == "greedy"
    ):  # split at a row's end, documents lose what came before, and the stream its first token
        assert found.loss == pytest.approx(wanted, rel=0.05)
        return
    assert found.tokens == sum(one.tokens for one in alone.values())
    assert found.loss == pytest.approx(wanted, rel=1e-5)
    model.set_domain("code")
    assert validate(model, corpora["law"], CONTEXT, 4, packing=Packing("none")).loss != pytest.approx(
        alone["law"].loss, rel=1e-4
    )


@pytest.mark.parametrize("packing", PACKINGS)
def test_context_parallel_ranks_know_the_corpus_of_each_of_their_positions(
    corpora: dict[str, TokenDataset], packing: str
) -> None:
    for rank in (0, 1):
        process_group = ProcessGroup(rank, 2, plan=ParallelPlan(context_parallel=2))
        for batch in validation_batches(
            concat_datasets(corpora, "all"), CONTEXT, 4, packing=PACKINGS[packing]
        ):
            part = shard_batch(batch, process_group)
            assert part.sources is not None
            is_text = part.labels > 0
            assert torch.equal(part.sources.numbers[is_text], (part.labels[is_text] - 1) % 3)


def test_gradients_of_packed_documents_equal_those_of_documents_alone(
    corpora: dict[str, TokenDataset],
) -> None:
    """A full pass over each corpus: the same documents, packed or each in a row of its own."""
    gradients = []
    for packing in ("first_fit", "none"):
        model = trained_adapters()
        step = ModelWithObjective(model, NextToken())
        for name, tokens in corpora.items():
            alone = MixtureDataset({name: tokens}, [MixtureStage(weights={name: 1})])
            sampler = build_sampler(alone, CONTEXT, 0, PACKINGS[packing])
            batch = sampler.batch(0, sampler.samples_per_epoch)
            assert batch.num_supervised == tokens.num_tokens
            step(batch).total.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_a_run_is_validated_with_the_adapters_that_it_trains(
    corpora: dict[str, TokenDataset], tmp_path: Path
) -> None:
    plain = tiny_config(tmp_path, SHAPE, max_steps=4, warmup_steps=0)
    data = DataConfig(packing_strategy="first_fit")
    mixture = MixtureDataset(corpora, [MixtureStage(weights=dict.fromkeys(NAMES, 1.0))])
    held_out = concat_datasets(corpora, "all")
    config = RunConfig(model=plain.model, training=plain.training, data=data)
    trainer = Trainer(tiny_model(config.model), config, mixture, held_out, console=Console(quiet=True))
    result = trainer.train()
    assert result.validation is not None
    assert all(bool(one.any()) for one in trainer.model.blocks[0].domain_adapter.up)
    total, count = 0.0, 0
    for name in NAMES:
        trainer.model.set_domain(name)
        one = validate(trainer.model, corpora[name], CONTEXT, 4, packing=Packing("none"))
        total, count = total + one.loss * one.tokens, count + one.tokens
    assert result.validation.loss == pytest.approx(total / count, rel=1e-5)
