"""A folder with mixture.json opens like any other prepared folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_trainer.config import DataConfig
from llm_trainer.config.schema.mixture import MixtureStage
from llm_trainer.data.mixture_dataset import MIXTURE_FILE, with_mixture_weights, write_mixture
from llm_trainer.data.pipeline.pipeline import prepare_dataset
from llm_trainer.data.prepared_dataset import open_prepared_dataset
from llm_trainer.data.sampling.mixture import MixtureDataset
from llm_trainer.data.sampling.packing import Packing
from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.errors import DataError, UsageError


@pytest.fixture(scope="module")
def members(
    tmp_path_factory: pytest.TempPathFactory, tiny_texts: list[str], tiny_tokenizer: Tokenizer
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("members")
    found = {}
    for name, texts in (("first", tiny_texts[:20]), ("second", tiny_texts[20:])):
        source = folder / f"{name}.jsonl"
        source.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
        config = DataConfig(input=str(source), val_ratio=0.1, packing_strategy="first_fit", max_length=64)
        found[name] = prepare_dataset(config, folder / name, tokenizer=tiny_tokenizer).folder
    return found


def test_a_written_mixture_opens_with_its_members_and_their_held_out_splits(
    tmp_path: Path, members: dict[str, Path]
) -> None:
    write_mixture(tmp_path / "mix", members, weights={"first": 1, "second": 3})
    found = open_prepared_dataset(tmp_path / "mix")
    parts = {name: open_prepared_dataset(folder) for name, folder in members.items()}
    assert isinstance(found.train, MixtureDataset)
    assert {name: member.fingerprint for name, member in found.train.members.items()} == {
        name: part.train.fingerprint for name, part in parts.items()
    }
    assert found.validation is not None
    assert len(found.validation) == sum(len(part.validation or ()) for part in parts.values())
    assert found.train.stages[0].weights == {"first": 1, "second": 3}
    assert found.metadata.documents_in == sum(part.metadata.documents_in for part in parts.values())
    assert found.metadata.max_length == 64
    assert found.packing == Packing("first_fit")
    assert found.tokenizer is not None
    assert found.metadata.splits["train"].tokens == len(found.train)


def test_a_mixture_moves_with_its_members(tmp_path: Path, members: dict[str, Path]) -> None:
    import shutil

    for name, folder in members.items():
        shutil.copytree(folder, tmp_path / "a" / name)
    write_mixture(
        tmp_path / "a", {name: tmp_path / "a" / name for name in members}, weights={"first": 1, "second": 1}
    )
    before = open_prepared_dataset(tmp_path / "a").train.fingerprint
    (tmp_path / "a").rename(tmp_path / "b")
    assert open_prepared_dataset(tmp_path / "b").train.fingerprint == before


def test_without_weights_members_are_weighted_by_their_tokens(
    tmp_path: Path, members: dict[str, Path]
) -> None:
    write_mixture(tmp_path, members)
    train = open_prepared_dataset(tmp_path).train
    assert isinstance(train, MixtureDataset)
    assert train.stages[0].weights == {name: float(len(member)) for name, member in train.members.items()}


def test_stages_are_written_and_read_unchanged(tmp_path: Path, members: dict[str, Path]) -> None:
    stages = [
        MixtureStage(weights={"first": 1, "second": 0}, until="10M tokens"),
        MixtureStage(weights={"first": 1, "second": 2}),
    ]
    write_mixture(tmp_path, members, stages=stages)
    train = open_prepared_dataset(tmp_path).train
    assert isinstance(train, MixtureDataset)
    assert train.stages == stages


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "is not a mixture"),
        ('{"members": {}}', "has no members"),
        ('{"members": {"a": "a"}, "weight": {"a": 1}}', "weight"),
        ('{"members": {"a": "nowhere"}, "weights": {"a": 1}}', "nowhere does not exist"),
        ('{"members": {"a": "a"}, "weights": {"a": -1}}', "0 or more"),
        ('{"members": {"a": "a"}, "weights": {"a": 1}, "stages": []}', "weights and stages"),
        ('{"format": 2, "members": {"a": "a"}}', "format 2"),
    ],
)
def test_a_mixture_file_that_cannot_be_used_is_refused_by_name(
    tmp_path: Path, content: str, complaint: str
) -> None:
    (tmp_path / MIXTURE_FILE).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=complaint):
        open_prepared_dataset(tmp_path)


def test_the_error_for_weights_of_unknown_members_names_the_file(
    tmp_path: Path, members: dict[str, Path]
) -> None:
    write_mixture(tmp_path, members, weights={"first": 1, "third": 1})
    with pytest.raises(DataError, match=r"mixture.json.*name third"):
        open_prepared_dataset(tmp_path)


def test_a_mixture_of_mixtures_is_refused(tmp_path: Path, members: dict[str, Path]) -> None:
    write_mixture(tmp_path / "inner", members)
    write_mixture(tmp_path / "outer", {"inner": tmp_path / "inner"})
    with pytest.raises(DataError, match="is a mixture itself"):
        open_prepared_dataset(tmp_path / "outer")


def test_the_settings_override_the_weights(tmp_path: Path, members: dict[str, Path]) -> None:
    write_mixture(tmp_path, members)
    prepared = open_prepared_dataset(tmp_path)
    train = with_mixture_weights(prepared, DataConfig(mixture_weights={"first": 2, "second": 5})).train
    assert isinstance(train, MixtureDataset)
    assert train.stages[0].weights == {"first": 2, "second": 5}
    assert with_mixture_weights(prepared, DataConfig()) is prepared
    staged = DataConfig(
        mixture_stages=[
            {"until": "5 steps", "weights": {"first": 1, "second": 0}},
            {"weights": {"first": 1, "second": 1}},
        ]
    )
    train = with_mixture_weights(prepared, staged).train
    assert isinstance(train, MixtureDataset)
    assert len(train.stages) == 2
    with pytest.raises(UsageError, match="a single corpus"):
        with_mixture_weights(
            open_prepared_dataset(members["first"]), DataConfig(mixture_weights={"first": 1})
        )
    with pytest.raises(UsageError, match="give only one"):
        with_mixture_weights(
            prepared,
            DataConfig(mixture_weights={"first": 1, "second": 1}, mixture_stages=staged.mixture_stages),
        )
