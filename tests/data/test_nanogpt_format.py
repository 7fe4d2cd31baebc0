"""nanoGPT's folders are read without executing pickles; its prepare scripts run without installation."""

from __future__ import annotations

import base64
import os
import pickle
import urllib.request
from pathlib import Path

import fork_server
import numpy as np
import pytest
from paths import ROOT

from llm_trainer.data import nanogpt_format as nanogpt
from llm_trainer.data.catalog import http_download as downloads
from llm_trainer.data.catalog import nanogpt_datasets as classic
from llm_trainer.data.prepared_dataset import open_prepared_dataset
from llm_trainer.data.sampling.window_sampler import WindowSampler
from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.errors import DataError


def nanogpt_folder(folder: Path, text: str) -> Path:
    """Write what nanoGPT's shakespeare_char/prepare.py writes."""
    characters = sorted(set(text))
    stoi = {character: i for i, character in enumerate(characters)}
    ids = np.array([stoi[character] for character in text], dtype=np.uint16)
    cut = int(len(ids) * 0.9)
    ids[:cut].tofile(folder / "train.bin")
    ids[cut:].tofile(folder / "val.bin")
    meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters)), "stoi": stoi}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


def test_a_character_folder_opens_with_its_own_ids(tmp_path: Path, tiny_text: str) -> None:
    data = open_prepared_dataset(nanogpt_folder(tmp_path, tiny_text))
    assert data.tokenizer is not None
    assert data.validation is not None
    assert data.test is None
    ids = [*data.train.read(0, len(data.train)), *data.validation.read(0, len(data.validation))]
    assert data.tokenizer.decode(ids) == tiny_text
    assert (data.train.num_bytes, data.train.num_documents, data.vocab_size) == (None, 1, len(set(tiny_text)))
    assert data.train.largest_id == max(ids[: len(data.train)])
    assert WindowSampler(data.train, 16, 0).batch(0, 2).document_ids is None


def test_without_meta_the_ids_are_gpt2s_and_a_note_explains_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(name: str, ranks: Path | None = None) -> Tokenizer:
        raise DataError("no network")

    monkeypatch.setattr(Tokenizer, "tiktoken", offline)
    np.array([1, 2, 50256], dtype=np.uint16).tofile(tmp_path / "train.bin")
    data = open_prepared_dataset(tmp_path)
    assert (data.tokenizer, data.validation, data.vocab_size, data.train.largest_id) == (
        None,
        None,
        50257,
        50256,
    )
    assert any("GPT-2" in note for note in data.metadata.notes)


class Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, (f"touch {self.canary}",))


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_with_code_in_it_is_refused_and_not_executed(
    tmp_path: Path, tiny_text: str, protocol: int
) -> None:
    nanogpt_folder(tmp_path, tiny_text)
    canary = tmp_path / "canary"
    (tmp_path / "meta.pkl").write_bytes(
        pickle.dumps({"itos": {0: "a"}, "more": Evil(canary)}, protocol=protocol)
    )
    with pytest.raises(DataError, match=r"meta\.pkl.*system"):
        open_prepared_dataset(tmp_path)
    assert not canary.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_of_plain_containers_is_read(tmp_path: Path, protocol: int) -> None:
    meta = {"itos": {0: "a", 1: "b"}, "sets": {1, 2}, "tuple": (1, 2.5, None, b"x")}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta, protocol=protocol))
    if protocol < 3:  # bytes are written as a call of _codecs.encode there
        meta.pop("tuple")
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta, protocol=protocol))
    assert nanogpt.read_meta(tmp_path / "meta.pkl") == meta


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        b"\x80\x04.",
        pickle.dumps([1]),
        pickle.dumps({"itos": {0: "ab"}}),
        pickle.dumps({"itos": {1: "a"}}),
        pickle.dumps({}),
    ],
)
def test_a_damaged_meta_is_named(tmp_path: Path, content: bytes) -> None:
    np.zeros(9, dtype=np.uint16).tofile(tmp_path / "train.bin")
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(DataError, match=r"meta\.pkl"):
        open_prepared_dataset(tmp_path)


@pytest.mark.parametrize("content", [b"", b"odd"])
def test_a_damaged_bin_is_named(tmp_path: Path, tiny_text: str, content: bytes) -> None:
    nanogpt_folder(tmp_path, tiny_text)
    (tmp_path / "val.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"val\.bin"):
        open_prepared_dataset(tmp_path)


def ranks_file(folder: Path, tokenizer: Tokenizer) -> Path:
    lines = [
        f"{base64.b64encode(tokenizer.token_bytes(i)).decode()} {i - 1}\n"
        for i in range(1, tokenizer.vocab_size)
    ]
    (folder / "gpt2.tiktoken").write_text("".join(lines), encoding="utf-8")
    return folder / "gpt2.tiktoken"


@pytest.mark.parametrize("name", ["shakespeare_char", "shakespeare", "openwebtext"])
def test_the_scripts_run_from_any_folder_without_an_installation(
    tmp_path: Path, tiny_text: str, tiny_texts: list[str], tiny_tokenizer: Tokenizer, name: str
) -> None:
    source = tmp_path / "input.txt"
    source.write_text(tiny_text, encoding="utf-8")
    command = [
        str(ROOT / "data" / name / "prepare.py"),
        "--input",
        str(source),
        f"--output-dir={tmp_path / 'out'}",
    ]
    if name != "shakespeare_char":
        command += ["--ranks", str(ranks_file(tmp_path, tiny_tokenizer))]
    done = fork_server.run(command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    data = open_prepared_dataset(tmp_path / "out")
    assert data.tokenizer is not None
    assert data.validation is not None
    ids = [*data.train.read(0, len(data.train)), *data.validation.read(0, len(data.validation))]
    assert data.tokenizer.decode(ids) == tiny_text
    assert data.tokenizer.is_character_level == (name == "shakespeare_char")
    assert "prepared" in done.stdout


def test_a_script_with_invalid_arguments_exits_with_one_message(tmp_path: Path) -> None:
    command = [
        str(ROOT / "data" / "shakespeare_char" / "prepare.py"),
        "--input",
        "nowhere.txt",
        "--output_dir",
        str(tmp_path),
    ]
    done = fork_server.run(command)
    assert done.returncode == 1
    assert "nowhere.txt does not exist" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_network_the_error_explains_how_to_supply_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    monkeypatch.setattr(downloads, "_FIRST_PAUSE_SECONDS", 0)
    with pytest.raises(
        DataError, match=r"tinyshakespeare/input\.txt could not be downloaded.*Download it elsewhere"
    ):
        classic.download_shakespeare(tmp_path)
    assert not list(tmp_path.iterdir())
