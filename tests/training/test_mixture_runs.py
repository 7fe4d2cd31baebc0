"""Training on mixtures and with other packings: bit-exact over a resume, with the achieved fractions in the
metrics.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tiny_run import CONTEXT, VOCABULARY, tiny_config, tiny_model, tokens

from llm_trainer.config import CheckpointError, DataConfig, RunConfig
from llm_trainer.config.schema.mixture import MixtureStage
from llm_trainer.data.sampling.mixture import MixtureDataset
from llm_trainer.data.token_shards import ShardWriter, TokenDataset
from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.diagnostics.verify_resume import StopAtStep, compare_checkpoints
from llm_trainer.training.logging.metrics import read_metrics
from llm_trainer.training.trainer import Trainer, TrainingResult

STAGES = [MixtureStage(weights={"a": 3, "b": 1}, until="5 steps"), MixtureStage(weights={"a": 0, "b": 1})]


def mixture(stages: list[MixtureStage] | None = None) -> MixtureDataset:
    return MixtureDataset({"a": tokens(seed=2), "b": tokens(30 * CONTEXT, seed=3)}, stages or STAGES)


def documents(folder: Path) -> TokenDataset:
    generator = np.random.default_rng(0)
    with ShardWriter(folder, "train", vocab_size=VOCABULARY, tokenizer_hash="0" * 64, eos_id=0) as writer:
        for length in generator.integers(1, 20, 60).tolist():
            writer.add((1 + np.arange(length)) % VOCABULARY)
            writer.end_document()
    return TokenDataset.open(folder, "train")


def trainer(
    folder: Path, train: TokenDataset, data: dict[str, object] | None = None, **settings: object
) -> Trainer:
    callbacks = settings.pop("callbacks", ())
    tokenizer = settings.pop("tokenizer", None)
    plain = tiny_config(folder, **settings)
    config = RunConfig(model=plain.model, training=plain.training, data=DataConfig(**(data or {})))
    return Trainer(
        tiny_model(config.model),
        config,
        train,
        tokens(65, seed=1),
        callbacks=callbacks,
        console=Console(quiet=True),
        tokenizer=tokenizer,
    )  # type: ignore[arg-type]


def run(
    folder: Path, train: TokenDataset, data: dict[str, object] | None = None, **settings: object
) -> TrainingResult:
    return trainer(folder, train, data, **settings).train()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_on_a_staged_mixture_resumes_bit_exactly_with_its_counts(
    tmp_path: Path, num_workers: int
) -> None:
    run(tmp_path / "straight", mixture(), num_workers=num_workers)
    for stop in (3, 6):  # within the first stage, and after it
        folder = tmp_path / f"cut{stop}"
        run(folder, mixture(), callbacks=[StopAtStep(stop)], num_workers=num_workers)
        run(folder, mixture(), resume_from=str(folder), num_workers=num_workers)
        assert compare_checkpoints(tmp_path / "straight" / "final_model", folder / "final_model") == []
        totals = [
            {name: value for name, value in read_metrics(where)[-2].items() if name.startswith("tokens/")}
            for where in (tmp_path / "straight", folder)
        ]
        assert totals[0] == totals[1] != {}


def test_the_achieved_fractions_are_in_the_metrics(tmp_path: Path) -> None:
    run(tmp_path, mixture())
    lines = [line for line in read_metrics(tmp_path) if "loss" in line]
    first, second = lines[:5], lines[5:]
    assert sum(line["share/a"] for line in first) / 5 == pytest.approx(0.75, abs=0.05)
    assert all(line["share/a"] == 0 and line["share/b"] == 1 for line in second)
    assert lines[-1]["tokens/a"] + lines[-1]["tokens/b"] == 10 * 8 * CONTEXT
    assert "share/a" not in (read_metrics(tmp_path)[0] if "loss" not in read_metrics(tmp_path)[0] else {})


def test_a_run_on_one_corpus_has_no_fractions_in_its_metrics(tmp_path: Path) -> None:
    run(tmp_path, tokens())
    assert not any(name.startswith("share/") for line in read_metrics(tmp_path) for name in line)


def test_other_weights_or_a_moved_stage_cannot_be_resumed_silently(tmp_path: Path) -> None:
    run(tmp_path, mixture(), callbacks=[StopAtStep(3)])
    other = [MixtureStage(weights={"a": 1, "b": 1})]
    with pytest.raises(
        CheckpointError, match=r"order 'mixture of .*from sample 40.*depends on packing, the mixture"
    ):
        run(tmp_path, mixture(other), resume_from=str(tmp_path))
    with pytest.raises(CheckpointError, match="the batch size where stages are given in steps"):
        run(tmp_path, mixture(), resume_from=str(tmp_path), batch_size=2)


@pytest.mark.parametrize(
    "data", [{"packing_strategy": "first_fit"}, {"pack_sequences": False}, {"stride": 3}]
)
def test_each_packing_trains_validates_and_resumes_bit_exactly(
    tmp_path: Path, data: dict[str, object]
) -> None:
    train = documents(tmp_path / "data")
    result = run(tmp_path / "straight", train, data)
    assert result.loss is not None
    assert result.loss < 3.0  # of ln 32 = 3.47
    run(tmp_path / "cut", train, data, callbacks=[StopAtStep(4)])
    run(tmp_path / "cut", train, data, resume_from=str(tmp_path / "cut"))
    assert compare_checkpoints(tmp_path / "straight" / "final_model", tmp_path / "cut" / "final_model") == []
    with pytest.raises(CheckpointError, match="not 'greedy'; the order depends on packing"):
        run(tmp_path / "cut", train, {}, resume_from=str(tmp_path / "cut"))


def test_validation_covers_the_same_tokens_whatever_the_packing(tmp_path: Path) -> None:
    train = documents(tmp_path / "data")
    found = {}
    for name, data in {
        "first_fit": {"packing_strategy": "first_fit"},
        "none": {"pack_sequences": False},
    }.items():
        one = trainer(tmp_path / name, train, data)
        one.run.eval_dataset = train
        found[name] = one.evaluate()
    assert found["first_fit"].tokens == found["none"].tokens == len(train)
    assert found["first_fit"].loss == pytest.approx(found["none"].loss, rel=1e-5)


def test_noise_is_in_the_training_text_alone_and_resumes_bit_exactly(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_alphabet([chr(65 + index) for index in range(VOCABULARY)])
    data: dict[str, object] = {"augment_span_drop": 0.2, "augment_case": 0.2}
    noisy = trainer(tmp_path / "a", tokens(), data, tokenizer=tokenizer)
    plain = trainer(tmp_path / "b", tokens(), tokenizer=tokenizer)
    assert noisy.run.sampler.batch(0, 8).num_supervised < plain.run.sampler.batch(0, 8).num_supervised
    assert noisy.evaluate() == plain.evaluate()
    run(tmp_path / "straight", tokens(), data, tokenizer=tokenizer)
    run(tmp_path / "cut", tokens(), data, tokenizer=tokenizer, callbacks=[StopAtStep(4)])
    run(tmp_path / "cut", tokens(), data, tokenizer=tokenizer, resume_from=str(tmp_path / "cut"))
    assert compare_checkpoints(tmp_path / "straight" / "final_model", tmp_path / "cut" / "final_model") == []


def test_each_domain_of_a_mixture_trains_its_own_adapter(tmp_path: Path) -> None:
    shape = {"use_domain_adaptation": True, "adapter_domains": ["a", "b"], "adapter_size": 4}
    config = tiny_config(tmp_path, shape, max_steps=4)
    model = tiny_model(config.model)
    stages = [MixtureStage(weights={"a": 0, "b": 1})]
    Trainer(model, config, mixture(stages), tokens(65, seed=1), console=Console(quiet=True)).train()
    trained = [bool(one.any()) for one in model.blocks[0].domain_adapter.up]
    assert trained == [False, True]
