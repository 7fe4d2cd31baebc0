"""Encoding and decoding, for every type of tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, GPT2Config, LlamaConfig

from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.errors import DataError

AWKWARD = [
    "",
    " ",
    "\n\n\t",
    "naïve café — “quotes”",
    "日本語とEmoji 🙂👍🏽",
    "a<|endoftext|>b",
    "x = 12345  # don't\r\n\r\n",
    "\ufeffBOM",
    "a\0b",
]


@pytest.mark.parametrize("text", AWKWARD)
def test_bpe_decodes_to_the_same_text(tiny_tokenizer: Tokenizer, text: str) -> None:
    assert tiny_tokenizer.decode(tiny_tokenizer.encode(text)) == text


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_bpe_decodes_any_text_and_its_bytes_are_those_of_its_tokens(
    tiny_tokenizer: Tokenizer, text: str
) -> None:
    ids = tiny_tokenizer.encode(text)
    assert tiny_tokenizer.decode(ids) == text
    assert b"".join(map(tiny_tokenizer.token_bytes, ids)) == text.encode("utf-8")


def test_names_of_special_tokens_are_ordinary_text_unless_allowed(tiny_tokenizer: Tokenizer) -> None:
    plain, parsed = (
        tiny_tokenizer.encode("a<|endoftext|>b"),
        tiny_tokenizer.encode("a<|endoftext|>b", allow_special=True),
    )
    assert tiny_tokenizer.eos_id not in plain
    assert parsed == [*tiny_tokenizer.encode("a"), tiny_tokenizer.eos_id, *tiny_tokenizer.encode("b")]
    assert tiny_tokenizer.encode("a<|endoftext|>b") == plain  # parsing once leaves no trace
    assert tiny_tokenizer.token_bytes(tiny_tokenizer.eos_id or 0) == b""


def test_a_batch_is_encoded_as_each_text_alone(tiny_tokenizer: Tokenizer) -> None:
    assert tiny_tokenizer.encode_batch(AWKWARD) == [tiny_tokenizer.encode(text) for text in AWKWARD]


def test_the_error_for_a_lone_surrogate_has_its_position(tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="character 2"):
        tiny_tokenizer.encode("ab\ud800")


def test_an_id_outside_the_vocabulary_is_an_error(tiny_tokenizer: Tokenizer) -> None:
    for wrong in (-1, tiny_tokenizer.vocab_size):
        with pytest.raises(DataError, match="outside"):
            tiny_tokenizer.decode([wrong])
        with pytest.raises(DataError, match="outside"):
            tiny_tokenizer.token_bytes(wrong)


@pytest.mark.parametrize("kind", ["bpe", "char"])
@pytest.mark.parametrize("config", [None, GPT2Config(), LlamaConfig()])
def test_transformers_opens_a_saved_tokenizer_with_equal_ids(
    tmp_path: Path,
    tiny_tokenizer: Tokenizer,
    tiny_text: str,
    kind: str,
    config: GPT2Config | LlamaConfig | None,
) -> None:
    ours = tiny_tokenizer if kind == "bpe" else Tokenizer.from_characters([tiny_text])
    ours.save(tmp_path)
    if config is not None:
        config.save_pretrained(tmp_path)  # a model's folder: its type must not bring another tokenizer along
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = tiny_text[:5000] + ("  Ünïcode 🙂 don't 12345\n\n" if kind == "bpe" else "")
    assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == ours.eos_id
    special = "a<|endoftext|>b" if kind == "bpe" else "ab"
    assert theirs(special, split_special_tokens=True)["input_ids"] == ours.encode(special)


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_a_saved_tokenizer_is_loaded_unchanged(
    tmp_path: Path, tiny_tokenizer: Tokenizer, tiny_text: str, kind: str
) -> None:
    ours = tiny_tokenizer if kind == "bpe" else Tokenizer.from_characters([tiny_text])
    ours.save(tmp_path)
    for source in (tmp_path, str(tmp_path), tmp_path / "tokenizer.json"):
        again = Tokenizer.load(source)
        assert (again.hash, again.vocab_size, again.eos_id, again.bos_id, again.pad_id) == (
            ours.hash, ours.vocab_size, ours.eos_id, ours.bos_id, ours.pad_id,
        )  # fmt: skip
        assert again.encode(tiny_text) == ours.encode(tiny_text)
        assert again.is_character_level == (kind == "char")


def test_different_tokenizers_have_different_hashes(tiny_texts: list[str], tiny_tokenizer: Tokenizer) -> None:
    others = [
        Tokenizer.train_bpe(tiny_texts, 301),
        Tokenizer.train_bpe(tiny_texts[:20], 300),
        Tokenizer.from_characters(tiny_texts),
    ]
    assert len({tiny_tokenizer.hash, *(other.hash for other in others)}) == 4
    assert Tokenizer.train_bpe(tiny_texts, 300).hash == tiny_tokenizer.hash


def test_the_configuration_of_a_loaded_tokenizer_is_kept(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    tiny_tokenizer.save(tmp_path / "a")
    file = tmp_path / "a" / "tokenizer_config.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "chat_template": "{{ messages }}"}), encoding="utf-8"
    )
    Tokenizer.load(tmp_path / "a").save(tmp_path / "b")
    assert (
        json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())["chat_template"]
        == "{{ messages }}"
    )


def test_characters_are_numbered_by_code_point_and_decode_to_the_text() -> None:
    tokenizer = Tokenizer.from_characters(["hello\n", "wörld🙂"])
    assert [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)] == sorted(set("hello\nwörld🙂"))
    assert tokenizer.decode(tokenizer.encode("wörld\nhello🙂")) == "wörld\nhello🙂"
    assert (tokenizer.eos_id, tokenizer.bos_id) == (None, None)
    assert tokenizer.token_bytes(tokenizer.encode("🙂")[0]) == "🙂".encode()


@given(text=st.text(alphabet="ab \n\té🙂'", max_size=60))
def test_character_ids_are_those_of_the_tokenizers_library(text: str) -> None:
    tokenizer = Tokenizer.from_alphabet(sorted("ab \n\té🙂'"))
    assert tokenizer.encode(text) == tokenizer._backend.encode(text).ids


def test_characters_without_an_id_are_named() -> None:
    tokenizer = Tokenizer.from_characters(["abc"])
    for text, named in (("axb", "'x'"), ("a\tb", r"'\\t'"), ("🙂", r"U\+1F642")):
        with pytest.raises(DataError, match=named):
            tokenizer.encode(text)


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"model": {"type": "Nonsense"}}'])
def test_a_damaged_tokenizer_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "none.json", "./nowhere", "a/b/c"):
        with pytest.raises(DataError, match="tokenizer"):
            Tokenizer.load(source)


def test_a_hub_name_is_downloaded_and_fails_with_an_error_without_a_network(
    tmp_path: Path, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    tiny_tokenizer.save(tmp_path)
    asked: list[str] = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path)
    )
    assert Tokenizer.load("someone/something").hash == tiny_tokenizer.hash
    assert asked == ["someone/something"]

    def offline(name: str, **_: object) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(DataError, match="someone/something"):
        Tokenizer.load("someone/something")


def test_arrays_are_int64(tiny_tokenizer: Tokenizer) -> None:
    assert all(ids.dtype == np.int64 for ids in tiny_tokenizer.encode_to_arrays(["text", ""]))
