"""From a Hugging Face folder to a fine-tuned one: tokenizer, beginning of text, ends of text and chat
template are those of the base, or the command refuses.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hf_folder import BOS, BOS_ID, EOS_ID, EOT_ID, TEMPLATE, save_chat_model, save_gpt2_files
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from llm_trainer.cli.main import main
from llm_trainer.data.prepared_dataset import open_prepared_dataset
from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.evaluation.perplexity import evaluate_text
from llm_trainer.inference.load_model import load_model

TEXTS = [f"The number {number} comes before {number + 1}." for number in range(300)]
QUICK = ["--max_steps=2", "--batch_size=2", "--precision=fp32", "--compile=off"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_chat_model(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "t.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return file


def gpt2_folder(folder: Path, **config: object) -> None:
    """A GPT-2 of random weights whose tokenizer is vocab.json and merges.txt alone."""
    save_gpt2_files(folder, TEXTS, **config)
    size = len(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
    shape = GPT2Config(
        vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    GPT2LMHeadModel(shape).save_pretrained(folder)


def carried(folder: Path, base: Path) -> None:
    """Checks that what is said about generation and chats came along."""
    assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE
    assert (folder / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["eos_token_id"] == [
        EOS_ID,
        EOT_ID,
    ]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("a")["input_ids"][0] == BOS_ID
    message = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "user: hi<|eot|>"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generation_config.eos_token_id == [EOS_ID, EOT_ID]
    assert model.generation_config.max_new_tokens == 77


def test_a_fine_tuned_folder_keeps_what_the_base_says(base: Path, rows: Path) -> None:
    train = ["train", f"--input={rows}", f"--init_from={base}", "--output_dir=ft", *QUICK]
    assert main([*train, "--save_interval=1", "--eval_interval=1"]) == 0
    folders = sorted(path.parent for path in Path("ft").glob("*/config.json"))
    assert {folder.name for folder in folders} >= {"checkpoint-1", "final_model", "best_model"}
    for folder in folders:
        carried(folder, base)
    assert main(["train", "--resume=ft", "--max_steps=3", "--horizon=extend", "--compile=off"]) == 0
    carried(Path("ft/final_model"), base)


def test_data_prepared_before_carries_the_base_too(base: Path, rows: Path) -> None:
    prepare = ["prepare", f"--input={rows}", "--output_dir=data", f"--tokenizer_path={base}"]
    assert main(prepare) == 0
    assert Path("data/chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE
    Path("data/chat_template.jinja").unlink()  # as data that was prepared elsewhere
    assert main(["train", "--data_dir=data", f"--init_from={base}", "--output_dir=ft", *QUICK]) == 0
    carried(Path("ft/final_model"), base)


def test_a_merged_model_keeps_what_the_base_says(base: Path, rows: Path) -> None:
    train = [
        "train",
        f"--input={rows}",
        f"--init_from={base}",
        "--output_dir=ft",
        "--attn_lora_rank=2",
        *QUICK,
    ]
    assert main(train) == 0
    assert main(["export-adapter", "ft", "--merged_output=merged"]) == 0
    carried(Path("merged"), base)


def test_every_document_in_the_shards_begins_with_the_token(base: Path, rows: Path) -> None:
    assert main(["prepare", f"--input={rows}", "--output_dir=data", f"--tokenizer_path={base}"]) == 0
    data = open_prepared_dataset("data")
    assert data.validation is not None
    for tokens in (data.train, data.validation):
        ids = tokens.read(0, tokens.num_tokens)
        assert np.count_nonzero(ids == BOS_ID) == tokens.num_documents
        assert ids[0] == BOS_ID
        assert set(ids[1:][ids[:-1] == EOS_ID].tolist()) == {BOS_ID}


def test_greedy_text_and_losses_are_those_of_transformers(base: Path) -> None:
    model, tokenizer = load_model(base)
    theirs = AutoModelForCausalLM.from_pretrained(base)
    their_tokenizer = AutoTokenizer.from_pretrained(base)
    for prompt in ("The number 7", "", "a"):
        inputs = their_tokenizer(prompt, return_tensors="pt")
        assert model.encode_prompt(prompt) == inputs["input_ids"][0].tolist()
        expected = theirs.generate(**inputs, do_sample=False, max_new_tokens=20, pad_token_id=0)[0]
        made = model.generate(prompt, max_tokens=20, temperature=0.0)
        new = expected[inputs["input_ids"].shape[1] :].tolist()
        assert made == their_tokenizer.decode(new, skip_special_tokens=True)
    assert model.encode_prompt(f"{BOS}a") == model.encode_prompt("a") == [BOS_ID, *tokenizer.encode("a")]
    ids = torch.tensor([their_tokenizer(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        loss = float(theirs(input_ids=ids, labels=ids).loss)
    assert evaluate_text(model, TEXTS[0]).loss == pytest.approx(loss, abs=1e-5)
    assert evaluate_text(model, BOS + TEXTS[0]).loss == pytest.approx(loss, abs=1e-5)


def test_either_end_token_ends_a_text(base: Path) -> None:
    assert load_model(base)[0].end_ids == {EOS_ID, EOT_ID}


@pytest.mark.parametrize("config", [{}, {"add_bos_token": True}])
def test_vocab_and_merges_are_the_tokenizer_of_a_run(rows: Path, config: dict[str, object]) -> None:
    gpt2_folder(Path("m"), **config)
    train = ["train", f"--input={rows}", "--data.max_length=32", "--init_from=m", "--output_dir=ft", *QUICK]
    assert main(train) == 0
    ours, theirs = Tokenizer.load("ft/final_model"), AutoTokenizer.from_pretrained("m")
    assert ours.encode(TEXTS[5], begins=True) == theirs(TEXTS[5])["input_ids"]
    assert (
        AutoTokenizer.from_pretrained("ft/final_model")(TEXTS[5])["input_ids"]
        == theirs(TEXTS[5])["input_ids"]
    )


def test_no_vocabulary_is_trained_under_pretrained_weights(rows: Path, fails: Callable[..., str]) -> None:
    gpt2_folder(Path("m"))
    train = ["train", f"--input={rows}", "--init_from=m", "--output_dir=ft", *QUICK]
    for kind in ("bpe", "char", "wordpiece"):
        said = fails(*train, f"--tokenizer_type={kind}", status=2)
        assert f"tokenizer_type {kind} would train a new vocabulary" in said
    Path("m/merges.txt").unlink()
    said = fails(*train, status=1)
    assert "the tokenizer of m is needed" in said
    assert "lacks merges.txt" in said
    Path("m/vocab.json").unlink()
    assert "has no tokenizer.json (and no vocab.json with merges.txt)" in fails(*train, status=1)
    assert not Path("ft").exists()


def test_prepared_data_of_another_tokenizer_is_refused(rows: Path, fails: Callable[..., str]) -> None:
    gpt2_folder(Path("m"))
    prepare = ["prepare", f"--input={rows}", "--output_dir=data", "--vocab_size=300"]
    assert main(prepare) == 0
    train = ["train", "--data_dir=data", "--init_from=m", "--output_dir=ft", "--max_length=32", *QUICK]
    assert "the data was prepared with another tokenizer than that of m: id 0 is" in fails(*train, status=1)
    for name in ("vocab.json", "merges.txt"):
        Path("m", name).unlink()
    said = fails(*train, status=1)
    assert "cannot be compared with those that m was trained on: m has no tokenizer.json" in said
    assert not Path("ft").exists()


def test_data_without_the_token_that_begins_texts_is_refused(
    base: Path, rows: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    save_chat_model(tmp_path / "plain", adds_bos=False)
    assert main(["prepare", f"--input={rows}", "--output_dir=data", "--tokenizer_path=plain"]) == 0
    said = fails("train", "--data_dir=data", f"--init_from={base}", "--output_dir=ft", *QUICK, status=1)
    assert f"begins with the ids [{BOS_ID}], and those of the data with []" in said


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("value", ['"a"', "[1, null]", "1.5", "true"])
def test_end_ids_that_are_not_ids_are_refused(
    base: Path, rows: Path, fails: Callable[..., str], name: str, value: str
) -> None:
    save_chat_model(Path("m"))
    content = json.loads(Path("m", name).read_text(encoding="utf-8"))
    Path("m", name).write_text(json.dumps({**content, "eos_token_id": json.loads(value)}), encoding="utf-8")
    train = ["train", f"--input={rows}", "--init_from=m", "--output_dir=ft", *QUICK]
    for command in (train, ["generate", "--model=m", "--prompt=a"]):
        assert "must be an id or a list of ids" in fails(*command, status=1)


def test_added_tokens_past_the_embedding_are_an_error_only_where_one_is_used(
    rows: Path, fails: Callable[..., str]
) -> None:
    save_chat_model(Path("m"))
    content = json.loads(Path("m/tokenizer.json").read_text(encoding="utf-8"))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    content["added_tokens"] += [{"id": 259 + n, "content": f"<tool{n}>", **flags} for n in range(8)]
    Path("m/tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    train = ["train", "--init_from=m", *QUICK]
    assert main([*train, f"--input={rows}", "--output_dir=ft"]) == 0
    assert main(["generate", "ft", "--prompt=a<tool0>", "--max_tokens=2"]) == 0  # the last that has a row
    said = fails("generate", "ft", "--prompt=a<tool1>", "--max_tokens=2", status=2)
    assert "token id 260 ('<tool1>') is outside the model's vocabulary of 260" in said
    Path("plain.txt").write_text("The number 7", encoding="utf-8")
    Path("used.txt").write_text("The number <tool5>", encoding="utf-8")
    assert main(["evaluate", "ft", "plain.txt"]) == 0
    assert "the text has the token '<tool5>' (id 264)" in fails("evaluate", "ft", "used.txt", status=1)
    used = "".join(json.dumps({"text": f"{text}<tool5>"}) + "\n" for text in TEXTS)
    Path("used.jsonl").write_text(used, encoding="utf-8")
    said = fails(*train, "--input=used.jsonl", "--output_dir=other", status=1)
    assert "has the id 264" in said
    assert not Path("other").exists()
