"""The Python API of data: `prepare_dataset` writes a folder, `load_dataset` opens one of its splits."""

from __future__ import annotations

from pathlib import Path

import pytest

import llm_trainer
from llm_trainer import DataConfig, load_dataset, prepare_dataset
from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.errors import DataError, UsageError


@pytest.fixture
def texts(tmp_path: Path, tiny_texts: list[str]) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(tiny_texts):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return folder


def test_a_folder_of_text_is_prepared_and_loaded_with_two_calls(tmp_path: Path, texts: Path) -> None:
    summary = prepare_dataset(texts, tmp_path / "out", vocab_size=300, val_ratio=0.2)
    train, validation = load_dataset(tmp_path / "out"), load_dataset(tmp_path / "out", split="validation")
    assert summary.folder == tmp_path / "out"
    assert train.num_tokens == summary.metadata.splits["train"].tokens
    assert train.tokenizer is not None
    assert validation.tokenizer is not None
    assert train.tokenizer.hash == validation.tokenizer.hash == train.tokenizer_hash
    assert train.tokenizer.vocab_size == train.vocab_size == 300
    assert train.tokenizer.decode(train.read(0, 10))


def test_the_settings_may_be_keywords_or_a_config(tmp_path: Path, texts: Path) -> None:
    config = DataConfig(input=str(texts), vocab_size=300)
    by_config = prepare_dataset(config, tmp_path / "out")
    by_keywords = prepare_dataset(input=str(texts), output_dir=tmp_path / "out", vocab_size=300)
    assert not by_config.from_cache
    assert by_keywords.from_cache
    assert by_keywords.metadata == by_config.metadata


def test_an_existing_tokenizer_is_given_as_an_object_or_by_its_folder(
    tmp_path: Path, texts: Path, tiny_tokenizer: Tokenizer
) -> None:
    tiny_tokenizer.save(tmp_path / "tokenizer")
    prepare_dataset(texts, tmp_path / "one", tokenizer=tiny_tokenizer)
    prepare_dataset(texts, tmp_path / "other", tokenizer=tmp_path / "tokenizer")
    one, other = load_dataset(tmp_path / "one"), load_dataset(tmp_path / "other")
    assert one.fingerprint == other.fingerprint
    assert one.tokenizer is not None
    assert one.tokenizer.hash == tiny_tokenizer.hash


def test_settings_that_cannot_be_used_are_refused(tmp_path: Path, texts: Path) -> None:
    with pytest.raises(UsageError, match="vocab_size: settings are given as keyword arguments and in"):
        prepare_dataset(DataConfig(input=str(texts)), tmp_path / "out", vocab_size=300)
    with pytest.raises(UsageError, match="no output_dir is set"):
        prepare_dataset(texts)
    with pytest.raises(UsageError, match="nothing to prepare"):
        prepare_dataset(output_dir=tmp_path / "out")


def test_a_split_that_does_not_exist_is_an_error(tmp_path: Path, texts: Path) -> None:
    prepare_dataset(texts, tmp_path / "out", vocab_size=300)
    with pytest.raises(DataError, match=r"no test split.*test_ratio"):
        load_dataset(tmp_path / "out", split="test")
    with pytest.raises(UsageError, match="'val'; choose train, validation, test"):
        load_dataset(tmp_path / "out", split="val")
    with pytest.raises(DataError, match="llm-trainer prepare"):
        load_dataset(tmp_path / "nowhere")


def test_the_package_exports_both() -> None:
    assert {"load_dataset", "prepare_dataset"} <= {*llm_trainer.__all__}
