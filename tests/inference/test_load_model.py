"""A model is loaded by any of its names, with its tokenizer, in the requested precision."""

import json
import pickle
from pathlib import Path

import pytest
import torch

from llm_trainer.config.schema.generation import GenerationConfig
from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.errors import CheckpointError, LLMTrainerError, UsageError
from llm_trainer.inference.load_model import load_model
from llm_trainer.model.hf.checkpoint import save_pretrained
from llm_trainer.model.hf.weight_map import TensorMapping, tensor_mappings
from llm_trainer.model.transformer import Transformer
from llm_trainer.run_dir import write_manifest

TEXT = "The quick brown fox jumps over the lazy dog. " * 8


def saved(folder: Path, seed: int = 0, **shape: object) -> Path:
    tokenizer = Tokenizer.train_bpe([TEXT], 280)
    size = {
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = ModelConfig(**{**size, "max_position_embeddings": 64, "initializer_range": 0.3, **shape})
    save_pretrained(Transformer(config, torch.Generator().manual_seed(seed)), folder)
    tokenizer.save(folder)
    write_manifest(folder)
    return folder


def nanogpt_mappings(model: Transformer) -> list[TensorMapping]:
    """nanoGPT's names, with matrices oriented as in nn.Linear."""
    mappings = tensor_mappings(dict(model.named_parameters()), "gpt2")
    return [TensorMapping(mapping.hf_name, mapping.names) for mapping in mappings]


def test_every_name_of_a_checkpoint_gives_the_same_text(tmp_path: Path) -> None:
    run = tmp_path / "run"
    saved(run / "checkpoint-10", seed=1)
    saved(run / "final_model", seed=2)
    by_final, by_step = (
        load_model(run / name)[0].generate("The", temperature=0) for name in ("final_model", "checkpoint-10")
    )
    assert by_final != by_step
    for name in (run, run / "final_model" / "model.safetensors", run / "final_model.pt"):
        assert load_model(name)[0].generate("The", temperature=0) == by_final
    for name in ("checkpoint_step_10.pt", "checkpoint-10.pt"):
        assert load_model(run / name)[0].generate("The", temperature=0) == by_step


@pytest.mark.parametrize("shape", [{"model_type": "gpt2"}, {"model_type": "llama", "num_key_value_heads": 2}])
def test_greedy_ids_equal_those_of_transformers_on_the_same_folder(
    tmp_path: Path, shape: dict[str, object]
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = saved(tmp_path / "model", **shape)
    model, tokenizer = load_model(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for prompt in ("The quick", "dog", "lazy fox jumps over"):
        inputs = their_tokenizer(prompt, return_tensors="pt")
        assert inputs.input_ids[0].tolist() == tokenizer.encode(prompt)
        expected = theirs.generate(
            **inputs, max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0]
        settings = GenerationConfig(temperature=0, max_new_tokens=30, ignore_eos=True)
        assert model.complete([prompt], settings)[0].ids == expected[inputs.input_ids.shape[1] :].tolist()


def test_weights_have_the_requested_precision(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    assert load_model(folder, device="cpu")[0].model.wte.weight.dtype == torch.float32
    model, _ = load_model(folder, precision="bf16")
    assert model.model.wte.weight.dtype == torch.bfloat16
    assert model.generate("The", temperature=0, max_tokens=5)


def test_a_model_of_the_hub_may_have_several_end_tokens(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    (folder / "manifest.json").unlink()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}), encoding="utf-8")
    model, tokenizer = load_model(folder)
    assert model.end_ids >= {3, 4, tokenizer.eos_id}


@pytest.mark.parametrize("folder", ["out", "data/mine"])
def test_nanogpts_checkpoint_uses_the_vocabulary_of_its_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = {
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 16,
        "block_size": 16,
        "vocab_size": 5,
        "bias": False,
        "dropout": 0.0,
    }
    model = Transformer(ModelConfig(model_type="gpt2", activation="gelu", **sizes))
    weights = {
        mapping.hf_name: mapping.to_hf(dict(model.named_parameters())) for mapping in nanogpt_mappings(model)
    }
    Path("out").mkdir()
    torch.save({"model_args": sizes, "model": weights, "config": {"dataset": "mine"}}, "out/ckpt.pt")
    Path(folder).mkdir(parents=True, exist_ok=True)
    characters = "abc\n "
    Path(folder, "meta.pkl").write_bytes(
        pickle.dumps({"vocab_size": 5, "itos": dict(enumerate(characters)), "stoi": {}})
    )
    loaded, tokenizer = load_model("out")
    assert tokenizer.encode("cab") == [2, 0, 1]
    ids = torch.tensor([[2, 0, 1]])
    torch.testing.assert_close(loaded.model(ids), model(ids))
    assert set(loaded.generate("cab", seed=0, max_tokens=5)) <= set(characters)


@pytest.mark.parametrize(
    ("spec", "named"),
    [("no/such/folder", "no/such/folder"), ("empty", "empty"), ("model/model.pt", "model.pt")],
)
def test_a_missing_model_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    saved(tmp_path / "model")
    with pytest.raises(CheckpointError, match=named):
        load_model(spec)


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    for name in ("manifest.json", "tokenizer.json"):
        (folder / name).unlink()
    with pytest.raises(LLMTrainerError, match="tokenizer"):
        load_model(folder)


def test_unknown_devices_and_precisions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="xpu"):
        load_model(saved(tmp_path / "model"), device="xpu")
    with pytest.raises(UsageError, match="int3"):
        load_model(saved(tmp_path / "model"), precision="int3")


def test_a_name_that_is_neither_a_folder_nor_of_the_hub_is_an_error_that_says_how_hub_models_are_named() -> (
    None
):
    with pytest.raises(CheckpointError, match=r"'nosuchmodel' is not .*OWNER/NAME, or gpt2"):
        load_model("nosuchmodel")
    with pytest.raises(CheckpointError, match="check the path"):
        load_model("runs/mine/nosuchrun")
