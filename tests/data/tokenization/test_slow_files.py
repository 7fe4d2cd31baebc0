"""Folders without a tokenizer.json: the tokenizer is built from the files there are, or what is missing is
named.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hf_folder import save_gpt2_files
from transformers import AutoTokenizer

from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.errors import DataError

HARD = "  Don't you'LL caf\u00e9 e\u0301 1234567 \u65e5\u672c\u8a9e \U0001f642\n\n\n  indented\ttab  "


@pytest.mark.parametrize("tokenizer_class", ["GPT2Tokenizer", "Qwen2Tokenizer", None])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"add_bos_token": True},
        {"add_prefix_space": True},
        {"pad_token": "<pad>", "eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]},
    ],
)
def test_vocab_and_merges_give_the_ids_that_transformers_gives(
    tmp_path: Path, tiny_texts: list[str], tokenizer_class: str | None, config: dict[str, object]
) -> None:
    named = {} if tokenizer_class is None else {"tokenizer_class": tokenizer_class}
    save_gpt2_files(tmp_path, tiny_texts, **named, **config)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}), encoding="utf-8")
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in (HARD, *tiny_texts[:5]):
        assert ours.encode(text, begins=True) == theirs(text)["input_ids"]
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert (ours.eos_id, ours.pad_id) == (theirs.eos_token_id, theirs.pad_token_id)
    ours.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert again.hash == ours.hash
    reopened = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert reopened(HARD)["input_ids"] == ours.encode(HARD, begins=True)


def test_added_tokens_keep_the_ids_of_their_file(tmp_path: Path, tiny_texts: list[str]) -> None:
    table = {
        "400": {"content": "<|im_start|>", "special": True},
        "401": {"content": "<tool>", "special": False},
    }
    save_gpt2_files(tmp_path, tiny_texts, 400, tokenizer_class="Qwen2Tokenizer", added_tokens_decoder=table)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    first = len(vocabulary)
    if first == 400:
        assert (ours.token_to_id("<|im_start|>"), ours.token_to_id("<tool>")) == (400, 401)
    text = "a<|im_start|>b<tool>c"
    assert ours.encode(text, allow_special=True) == theirs(text)["input_ids"]
    table["410"] = {"content": "<|far|>", "special": True}
    save_gpt2_files(tmp_path, tiny_texts, 400, tokenizer_class="Qwen2Tokenizer", added_tokens_decoder=table)
    with pytest.raises(
        DataError, match=r"'<\|far\|>' .* has id 410 in its file, but vocab.json leaves id 402"
    ):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("present", "why"),
    [
        ({"vocab.json": "{}"}, "lacks merges.txt"),
        ({"merges.txt": ""}, "lacks vocab.json"),
        ({"tokenizer.model": "\n"}, "only tokenizer.model, which is not read here; save a tokenizer.json"),
        ({"config.json": "{}"}, "has no tokenizer.json"),
        ({"vocab.json": "{}", "merges.txt": ""}, "how model_type None splits words is not known"),
        (
            {
                "vocab.json": "{}",
                "merges.txt": "",
                "tokenizer_config.json": '{"tokenizer_class": "XTokenizer"}',
            },
            "how tokenizer_class 'XTokenizer' splits words is not known",
        ),
        (
            {"vocab.json": "[", "merges.txt": "", "config.json": '{"model_type": "gpt2"}'},
            "are not a vocabulary that the tokenizers library can read",
        ),
        ({"vocab.json": "{}", "merges.txt": "", "config.json": "["}, "config.json is not JSON"),
    ],
)
def test_files_that_are_not_enough_are_refused_by_name(
    tmp_path: Path, present: dict[str, str], why: str
) -> None:
    for name, text in present.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=why):
        Tokenizer.load(tmp_path)
