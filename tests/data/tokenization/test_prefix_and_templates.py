"""The tokens that begin every text, and chat templates, survive from the hub to what is saved here."""

from __future__ import annotations

from pathlib import Path

import pytest
from hf_folder import BOS, BOS_ID, TEMPLATE, save_tokenizer
from transformers import AutoTokenizer

from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.errors import DataError


def test_a_text_begins_with_the_token_once_and_as_in_transformers(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.prefix_ids == (BOS_ID,)
    expected = theirs("ab c")["input_ids"]
    assert expected[0] == BOS_ID
    assert ours.encode("ab c", begins=True) == expected
    assert ours.encode(f"{BOS}ab c", begins=True) == expected
    assert ours.encode(f"{BOS}ab c", begins=True, allow_special=True) == expected
    assert ours.encode("ab c") == expected[1:]
    arrays = ours.encode_to_arrays(["ab c", "ab c", f"{BOS}ab c"], [True, False, True])
    assert [ids.tolist() for ids in arrays] == [expected, expected[1:], expected]


def test_a_tokenizer_that_adds_nothing_is_left_alone(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    save_tokenizer(tmp_path / "with")
    save_tokenizer(tmp_path / "without", adds_bos=False)
    plain = Tokenizer.load(tmp_path / "without")
    assert plain.prefix_ids == tiny_tokenizer.prefix_ids == ()
    assert plain.encode(f"{BOS}a", begins=True) == plain.encode(f"{BOS}a")
    assert plain.hash != Tokenizer.load(tmp_path / "with").hash  # their shards differ


def test_prefix_and_chat_templates_are_saved_again(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "a")
    (tmp_path / "a" / "additional_chat_templates").mkdir()
    (tmp_path / "a" / "additional_chat_templates" / "rag.jinja").write_bytes(b"{{ rag }}\r\n")
    Tokenizer.load(tmp_path / "a").with_special_tokens(["<|new|>"]).save(tmp_path / "b")
    again = Tokenizer.load(tmp_path / "b")
    assert again.prefix_ids == (BOS_ID,)
    assert again.has_chat_template
    assert (tmp_path / "b" / "chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE
    assert (tmp_path / "b" / "additional_chat_templates" / "rag.jinja").read_bytes() == b"{{ rag }}\r\n"
    theirs = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert theirs.chat_template == {"default": TEMPLATE, "rag": "{{ rag }}\n"}
    assert theirs("x")["input_ids"] == again.encode("x", begins=True)


def test_a_template_is_never_executed(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "a")
    hostile = "{% for i in range(10**12) %}{{ ''.__class__.__mro__ }}{% endfor %}{% broken"
    (tmp_path / "a" / "chat_template.jinja").write_text(hostile, encoding="utf-8")
    Tokenizer.load(tmp_path / "a").save(tmp_path / "b")
    assert (tmp_path / "b" / "chat_template.jinja").read_text(encoding="utf-8") == hostile
    (tmp_path / "a" / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(DataError, match="cannot be read as a chat template"):
        Tokenizer.load(tmp_path / "a")
