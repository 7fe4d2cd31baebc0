"""The Framework manual's `data_prep_tool.py` with each of its kinds of tokenizer, from the command line to
ids.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path

import pytest
import tiktoken
from transformers import AutoTokenizer

from llm_trainer.cli.commands import prepare as prepare_command
from llm_trainer.cli.main import main
from llm_trainer.data.prepared_dataset import open_prepared_dataset
from llm_trainer.data.tokenization.fast.pretokenizer import LLAMA3_PATTERN
from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.errors import DataError

TEXT = "".join(
    f"line {number}: the quick brown fox jumps over {number * 7} lazy dogs.\n" for number in range(300)
)


@pytest.fixture(autouse=True)
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("raw").mkdir()
    Path("raw/a.txt").write_text(TEXT, encoding="utf-8")


def tool(*more: str) -> int:
    """`data_prep_tool.py` with the manual's flags."""
    fixed = [
        "--input_dir",
        "raw",
        "--output_dir",
        "out",
        "--max_length",
        "32",
        "--stride",
        "4",
        "--num_workers",
        "1",
    ]
    return prepare_command.framework([*fixed, *more])


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_a_trained_kind_is_prepared_and_opens_elsewhere(kind: str) -> None:
    assert tool("--tokenizer_type", kind, "--vocab_size", "300", "--special_tokens", "<|user|>,<|bot|>") == 0
    prepared = open_prepared_dataset(Path("out"))
    tokenizer = prepared.tokenizer
    assert tokenizer is not None
    assert (tokenizer.kind, tokenizer.vocab_size, prepared.metadata.tokenizer.kind) == (kind, 300, kind)
    assert None not in (tokenizer.eos_id, tokenizer.token_to_id("<|user|>"), tokenizer.token_to_id("<|bot|>"))
    assert AutoTokenizer.from_pretrained("out")(TEXT)["input_ids"] == tokenizer.encode(TEXT)


def test_a_local_file_of_ranks_is_prepared_with_tiktokens_ids(tiny_tokenizer: Tokenizer) -> None:
    ranks = {tiny_tokenizer.token_bytes(i): i - 1 for i in range(1, tiny_tokenizer.vocab_size)}
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    Path("own.tiktoken").write_text("".join(lines), encoding="utf-8")
    assert tool("--tokenizer_type", "tiktoken", "--tokenizer_path", "own.tiktoken") == 0
    prepared = open_prepared_dataset(Path("out"))
    assert prepared.tokenizer is not None
    theirs = tiktoken.Encoding("own", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})
    assert prepared.tokenizer.encode(TEXT) == theirs.encode_ordinary(TEXT)
    assert prepared.metadata.splits["train"].tokens + prepared.metadata.splits["validation"].tokens >= len(
        theirs.encode_ordinary(TEXT)
    )


def test_tiktoken_by_name_without_a_network_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    import requests
    import tiktoken.registry

    def refuse(*_: object, **__: object) -> None:
        raise requests.ConnectionError("no network")

    monkeypatch.setattr(requests, "get", refuse)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(Path("cache").absolute()))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    with pytest.raises(DataError, match="--tokenizer_path r50k_base"):
        tool("--tokenizer_type", "tiktoken", "--vocab_size", "300")
    said = fails(
        "prepare",
        "--input",
        "raw",
        "--output_dir",
        "out",
        "--tokenizer_type",
        "tiktoken",
        "--tokenizer_path",
        "o200k_base",
        status=1,
    )
    assert "--tokenizer_path o200k_base.tiktoken" in said
    assert not Path("out/metadata.json").exists()


def test_the_estimate_comes_before_the_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "--input", "raw", "--output_dir", "out", "--vocab_size", "300"]) == 0
    said = capsys.readouterr().out
    assert "training a tokenizer of 300 ids on 0.0 MB of training text, about 2 s and" in said
    assert said.index("MB of memory") < said.index("tokenizer: bpe")
