"""tiktoken's encodings, by name and from vocabulary files, give tiktoken's ids."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import tiktoken
import tiktoken.registry
import tiktoken_ext.openai_public as published
from transformers import AutoTokenizer

from llm_trainer.config import DataConfig
from llm_trainer.data.tokenization import tiktoken_import
from llm_trainer.data.tokenization.factory import load_existing_tokenizer
from llm_trainer.data.tokenization.tiktoken_import import ENCODINGS, read_ranks
from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.errors import DataError, UsageError

TEXT = tiktoken_import._HARD_CASES


@pytest.fixture(scope="module")
def ranks(tiny_text: str) -> dict[bytes, int]:
    """Trained merges as tiktoken ranks, numbered without the end of text."""
    trained = Tokenizer.train("bpe", [tiny_text, TEXT * 5], 900)
    return {trained.token_bytes(i): i - 1 for i in range(1, trained.vocab_size)}


def written(file: Path, ranks: Mapping[bytes, int]) -> Path:
    file.write_text(
        "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()),
        encoding="utf-8",
    )
    return file


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network and nothing in tiktoken's cache."""
    import requests

    def refuse(*_: object, **__: object) -> None:
        raise requests.ConnectionError("no network")

    monkeypatch.setattr(requests, "get", refuse)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})


@pytest.mark.parametrize("name", ENCODINGS)
def test_the_table_of_encodings_is_tiktokens_own(
    name: str, ranks: dict[bytes, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for loader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(published, loader, lambda *_, **__: ranks)
    theirs = getattr(published, name)()
    ours = ENCODINGS[name]
    assert dict(ours.special_tokens) == theirs["special_tokens"]
    if "explicit_n_vocab" in theirs:
        assert theirs["explicit_n_vocab"] == ours.num_ranks + 1
    peer = tiktoken.Encoding(name, pat_str=theirs["pat_str"], mergeable_ranks=ranks, special_tokens={})
    assert peer.encode_ordinary(TEXT) == Tokenizer(
        tiktoken_import.bpe_from_ranks(ranks, ours.pattern, {}), {}
    ).encode(TEXT)


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
def test_an_encoding_by_name_comes_from_tiktokens_registry_with_its_ids(
    name: str, tmp_path: Path, ranks: dict[bytes, int], tiny_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    special = dict(ENCODINGS[name].special_tokens)
    peer = tiktoken.Encoding(
        name, pat_str=ENCODINGS[name].pattern, mergeable_ranks=ranks, special_tokens=special
    )
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {name: peer})
    ours = load_existing_tokenizer(DataConfig(tokenizer_type="tiktoken", tokenizer_path=name))
    assert ours is not None
    assert (ours.eos_id, ours.vocab_size) == (special["<|endoftext|>"], max(special.values()) + 1)
    assert ours.encode(tiny_text + TEXT) == peer.encode_ordinary(tiny_text + TEXT)
    assert ours.encode("a<|endoftext|>b", allow_special=True) == peer.encode(
        "a<|endoftext|>b", allowed_special="all"
    )
    ours.save(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(tiny_text)["input_ids"] == ours.encode(tiny_text)
    assert Tokenizer.load(tmp_path).hash == ours.hash


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
def test_without_a_network_the_error_explains_how_to_download_the_file(name: str) -> None:
    with pytest.raises(DataError, match=r"https://.*\.tiktoken .* use it with --tokenizer_path"):
        load_existing_tokenizer(DataConfig(tokenizer_type="tiktoken", tokenizer_path=name))


@pytest.mark.usefixtures("offline")
def test_tiktoken_without_a_name_is_gpt2(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="r50k_base"):
        load_existing_tokenizer(DataConfig(tokenizer_type="tiktoken"))


def test_a_local_vocabulary_file_gives_tiktokens_ids(
    tmp_path: Path, ranks: dict[bytes, int], tiny_text: str
) -> None:
    file = written(tmp_path / "own.tiktoken", ranks)
    peer = tiktoken.Encoding(
        "own", pat_str=tiktoken_import.LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    for config in (
        DataConfig(tokenizer_type="tiktoken", tokenizer_path=str(file)),
        DataConfig(tokenizer_path=str(file)),
    ):
        tokenizer = load_existing_tokenizer(config)
        assert tokenizer is not None
        assert tokenizer.encode(tiny_text + TEXT) == peer.encode_ordinary(tiny_text + TEXT)
        assert tokenizer.eos_id == tokenizer.vocab_size - 1 == len(ranks)


def test_a_file_with_the_number_of_ranks_of_a_known_encoding_is_that_encoding(
    tmp_path: Path, ranks: dict[bytes, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    special = {"<|endoftext|>": 2000, "<|endofprompt|>": 2010}
    known = tiktoken_import.Encoding(tiktoken_import.O200K_PATTERN, special, len(ranks))
    monkeypatch.setattr(tiktoken_import, "ENCODINGS", {"gpt2": ENCODINGS["gpt2"], "small": known})
    tokenizer = Tokenizer.load(written(tmp_path / "any.tiktoken", ranks))
    assert (tokenizer.eos_id, tokenizer.token_to_id("<|endofprompt|>"), tokenizer.vocab_size) == (
        2000,
        2010,
        2011,
    )
    assert (
        tiktoken_import.O200K_PATTERN
        in json.loads(tokenizer.to_json())["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    )


def test_gpt2s_vocab_bpe_gives_its_ranks(tmp_path: Path) -> None:
    file = tmp_path / "vocab.bpe"
    file.write_text("#version: 0.2\nĠ t\nh e\nĠt he\n", encoding="utf-8")
    ranks = read_ranks(file)
    assert (ranks[b"!"], ranks[b" t"], ranks[b"he"], ranks[b" the"]) == (
        0,
        256,
        257,
        258,
    )  # ids of GPT-2: 0 is "!", 256 is " t"
    for tokenizer in (Tokenizer.tiktoken("gpt2", file), Tokenizer.load(file)):
        assert tokenizer.encode(" the") == [258]
        assert (tokenizer.eos_id, tokenizer.vocab_size) == (259, 260)
        assert json.loads(tokenizer.to_json())["pre_tokenizer"]["type"] == "ByteLevel"


@pytest.mark.parametrize("content", ["nonsense here now\n", "IQ== 0\nIQ== 1\n", "IQ== 0\n"])
def test_a_damaged_vocabulary_file_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "bad.tiktoken"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"bad\.tiktoken"):
        Tokenizer.load(file)


def test_ranks_that_are_not_an_order_of_merges_are_refused(ranks: dict[bytes, int]) -> None:
    with pytest.raises(DataError, match="cannot be merged"):
        tiktoken_import.bpe_from_ranks({**ranks, b"qzxqzx": 5000}, tiktoken_import.LLAMA3_PATTERN, {})


def test_ids_that_differ_from_tiktokens_are_refused(
    ranks: dict[bytes, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        tiktoken_import,
        "byte_level_pre_tokenizer",
        lambda _: tiktoken_import.pre_tokenizers.ByteLevel(add_prefix_space=True),
    )
    with pytest.raises(DataError, match="encode a test text differently"):
        tiktoken_import.bpe_from_ranks(ranks, tiktoken_import.LLAMA3_PATTERN, {})


def test_the_error_for_an_unknown_encoding_lists_the_known_ones(
    tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    with pytest.raises(DataError, match="cl100k_base"):
        load_existing_tokenizer(DataConfig(tokenizer_type="tiktoken", tokenizer_path="cl200k_base"))
    tiny_tokenizer.save(tmp_path)
    with pytest.raises(UsageError, match="not a tiktoken vocabulary file"):
        load_existing_tokenizer(
            DataConfig(tokenizer_type="tiktoken", tokenizer_path=str(tmp_path / "tokenizer.json"))
        )
    with pytest.raises(UsageError, match="gpt3"):
        Tokenizer.tiktoken("gpt3")


@pytest.mark.parametrize("kind", ["wordpiece", "char"])
def test_an_existing_tokenizer_must_be_of_the_type_that_is_set(
    tmp_path: Path, tiny_tokenizer: Tokenizer, kind: str
) -> None:
    tiny_tokenizer.save(tmp_path)
    with pytest.raises(UsageError, match="of type bpe"):
        load_existing_tokenizer(DataConfig(tokenizer_type=kind, tokenizer_path=str(tmp_path)))
    assert load_existing_tokenizer(DataConfig(tokenizer_type="bpe", tokenizer_path=str(tmp_path))) is not None
