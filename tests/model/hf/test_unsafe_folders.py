"""Model folders that are damaged, hostile or mislabelled give one clear error, and nothing in them is run."""

import json
import pickle
import struct

import pytest
import torch
from model_shapes import SHAPES, small_config
from safetensors.torch import load_file, save_file

from llm_trainer.config import CheckpointError
from llm_trainer.model.hf.checkpoint import config_from_huggingface, load_pretrained, save_pretrained
from llm_trainer.model.transformer import Transformer


@pytest.fixture
def folder(tmp_path):
    save_pretrained(Transformer(small_config(**SHAPES["grouped"])), tmp_path)
    return tmp_path


def change_config(folder, **keys):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


class Hostile:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (open, (str(self.canary), "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_folder_of_pickles_is_refused_unopened(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Hostile(folder / "canary")))
    with pytest.raises(CheckpointError, match=rf"{name}.*save_pretrained"):
        load_pretrained(folder)
    with pytest.raises(CheckpointError, match="not opened"):
        load_pretrained(folder / name)
    assert not (folder / "canary").exists()


def test_a_pickle_named_safetensors_is_refused_unopened(folder):
    (folder / "model.safetensors").write_bytes(pickle.dumps(Hostile(folder / "canary")))
    with pytest.raises(CheckpointError, match="damaged"):
        load_pretrained(folder)
    assert not (folder / "canary").exists()


def test_code_that_a_configuration_names_is_not_run(folder):
    canary = folder / "canary"
    (folder / "modeling_hostile.py").write_text(
        f"open({str(canary)!r}, 'w')\nclass Model: ...\nclass Config: ...\n"
    )
    change_config(
        folder,
        auto_map={"AutoConfig": "modeling_hostile.Config", "AutoModelForCausalLM": "modeling_hostile.Model"},
    )
    load_pretrained(folder)
    change_config(folder, model_type="hostile")
    with pytest.raises(CheckpointError, match=r"'hostile'.*llama"):
        load_pretrained(folder)
    assert not canary.exists()


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 200_000_000) + b"{" + b" " * 1000,
        struct.pack("<Q", 4) + b"junk",
        struct.pack("<Q", 75)
        + b'{"a":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,4000000000]}}',
        b"",
    ],
    ids=["huge", "large", "garbled", "declares more than it contains", "empty"],
)
def test_a_bad_header_is_an_error_and_allocates_nothing(folder, header):
    (folder / "model.safetensors").write_bytes(header)
    with pytest.raises(CheckpointError, match=r"damaged|cannot be read"):
        load_pretrained(folder)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.999])
def test_a_truncated_file_is_an_error(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(CheckpointError, match="damaged"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), r"missing: model\.norm\.weight"),
        (lambda tensors: tensors.update(adapter=torch.ones(1)), "unexpected: adapter"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}),
            r"model\.norm\.weight .*\(31,\).*\(32,\)",
        ),
    ],
)
def test_tensors_must_be_exactly_those_of_the_configuration(folder, change, message):
    change_tensors(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.complex64, torch.bool, torch.float8_e4m3fn])
def test_weights_that_are_not_floating_point_are_refused_by_name(folder, dtype):
    change_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32).to(dtype)}))
    with pytest.raises(
        CheckpointError, match=r"model\.norm\.weight in .* is stored as .*F64, F32, F16, BF16"
    ):
        load_pretrained(folder)


def test_a_saved_head_of_a_tied_model_must_equal_the_embedding(tmp_path):
    save_pretrained(Transformer(small_config()), tmp_path)
    change_tensors(
        tmp_path,
        lambda tensors: tensors.update({"lm_head.weight": tensors["transformer.wte.weight"].clone()}),
    )
    load_pretrained(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "", 3])
def test_an_index_cannot_point_outside_its_folder(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(CheckpointError, match="does not name the files"):
        load_pretrained(folder)


def test_a_lost_shard_is_named(folder):
    save_pretrained(
        Transformer(small_config(**SHAPES["grouped"])), folder / "sharded", max_shard_bytes=20_000
    )
    lost = sorted((folder / "sharded").glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=lost.name):
        load_pretrained(folder / "sharded")


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"model_type": "llama"}', "[" * 100_000],
    ids=["empty", "list", "cut", "bare", "deep"],
)
def test_a_bad_config_is_an_error_that_names_it(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    "keys",
    [
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0}},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        {"partial_rotary_factor": 0.25},
        {"quantization_config": {"bits": 4}},
        {"num_attention_heads": 5},
        {"hidden_size": "wide"},
        {"hidden_size": -32},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_a_key_that_changes_the_computation_is_refused_and_never_skipped(folder, keys):
    change_config(folder, **keys)
    with pytest.raises(CheckpointError):
        load_pretrained(folder)


LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"rope_parameters": LINEAR, "rope_scaling": {"type": "linear", "factor": 4.0}},
            r"rope_parameters \{.*2\.0\} and rope_scaling \{.*4\.0\}; .* Delete the one",
        ),
        (
            {"rope_parameters": LINEAR, "rope_scaling": {"rope_type": "default"}},
            "two different settings of rotary positions",
        ),
        ({"rope_parameters": {"full_attention": LINEAR}}, "one set of values for all layers"),
        ({"rope_parameters": [2.0]}, r"one set of values for all layers.*\[2\.0\]"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters .*linear without factor"),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "llama3", "factor": 8.0}},
            "without low_freq_factor",
        ),
    ],
)
def test_rotary_settings_that_readers_may_take_two_ways_are_refused(folder, keys, message):
    change_config(folder, **keys)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(folder)


def test_rotary_settings_given_twice_in_two_spellings_are_one(folder):
    change_config(folder, rope_parameters=LINEAR, rope_scaling={"type": "linear", "factor": 2.0})
    scaling = load_pretrained(folder).config.rope_scaling
    assert scaling is not None
    assert (scaling.kind, scaling.factor) == ("linear", 2.0)


def test_a_config_that_declares_a_huge_model_allocates_nothing(folder):
    change_config(folder, vocab_size=10**12)
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight .*\(61, 32\).*\(1000000000000, 32\)"):
        load_pretrained(folder)


def test_layers_with_different_windows_are_refused():
    qwen = {
        "model_type": "qwen2",
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 4,
    }
    qwen |= {
        "intermediate_size": 56,
        "max_position_embeddings": 64,
        "vocab_size": 61,
        "use_sliding_window": True,
        "sliding_window": 8,
    }
    with pytest.raises(CheckpointError, match="some layers only"):
        config_from_huggingface({**qwen, "max_window_layers": 2})
    assert config_from_huggingface({**qwen, "max_window_layers": 4}).sliding_window is None
    assert config_from_huggingface({**qwen, "max_window_layers": 0}).sliding_window == 8


def test_a_missing_folder_is_an_error_at_once(tmp_path):
    for missing in (
        tmp_path / "nowhere",
        str(tmp_path / "nowhere"),
        "no-such-model",
        "./owner/name",
        "a/b/c",
    ):
        with pytest.raises(CheckpointError, match="does not exist"):
            load_pretrained(missing)


def test_without_a_network_a_hub_name_is_an_error_with_a_way_out(tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"openai-community/gpt2-xl.*give its folder") as caught:
        load_pretrained("gpt2-xl")
    assert "\n" not in str(caught.value)


def test_a_hub_name_fetches_configuration_safetensors_and_tokenizer_only(folder, monkeypatch):
    import huggingface_hub

    asked = {}

    def fetched(name, **patterns):
        asked.update(patterns, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    assert load_pretrained("gpt2-medium").config.num_key_value_heads == 2
    assert asked["name"] == "openai-community/gpt2-medium"
    assert not any("bin" in pattern or "py" in pattern for pattern in asked["allow_patterns"])
