"""transformers opens what we save, we open what it saves, and both compute the same logits."""

import json

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from model_shapes import SHAPES, small_config

from llm_trainer.config import CheckpointError, ModelConfig
from llm_trainer.model.hf.checkpoint import (
    config_from_huggingface,
    config_to_huggingface,
    load_pretrained,
    load_weights,
    save_pretrained,
)
from llm_trainer.model.hf.config import hf_family, with_explicit_values
from llm_trainer.model.transformer import Transformer

WITH_COUNTERPART = {
    "gpt2": "gpt2",
    "llama": "llama",
    "grouped": "llama",
    "qk_norm": "qwen3",
    "window": "mistral",
    "stretched": "llama",
    "llama3": "llama",
}


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """Random numbers in every parameter, biases and norms too, so that no mistake hides behind a zero or a
    one.

    Matrices keep the size of what passes through them, for 1e-5 to mean the same at every width.
    """
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        scale = 0.2 if parameter.dim() < 2 else 0.7 * max(parameter.shape) ** -0.5
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def ids_for(model: torch.nn.Module, length: int = 20) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(2))


def opened_by_transformers(folder) -> torch.nn.Module:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shape", WITH_COUNTERPART)
def test_transformers_computes_our_logits_from_our_folder(shape, tied, tmp_path):
    ours = randomized(Transformer(small_config(**SHAPES[shape], tie_word_embeddings=tied)))
    save_pretrained(ours, tmp_path, eos_id=3)
    theirs = opened_by_transformers(tmp_path)
    assert theirs.config.model_type == WITH_COUNTERPART[shape]
    assert theirs.config.eos_token_id == 3
    ids = ids_for(ours)
    torch.testing.assert_close(theirs(ids).logits, ours(ids), atol=1e-5, rtol=1e-5)


def sized(configuration: type, **more) -> transformers.PretrainedConfig:
    """A small configuration of a Llama-like family."""
    small = {
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return configuration(**{**small, "vocab_size": 61, "max_position_embeddings": 64, **more})


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48, "vocab_size": 61}
THEIRS = {
    "gpt2": transformers.GPT2Config(**GPT2, n_inner=40),
    "gpt2_untied": transformers.GPT2Config(**GPT2, activation_function="relu", tie_word_embeddings=False),
    "llama": sized(transformers.LlamaConfig),
    "llama_biases": sized(
        transformers.LlamaConfig, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "llama3": sized(transformers.LlamaConfig, rope_parameters=LLAMA3),
    "llama_linear": sized(
        transformers.LlamaConfig,
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    ),
    "mistral": sized(transformers.MistralConfig, sliding_window=6),
    "mistral_without_window": sized(transformers.MistralConfig, sliding_window=None, head_dim=12),
    "qwen2": sized(transformers.Qwen2Config),
    "qwen2_window": sized(
        transformers.Qwen2Config, use_sliding_window=True, sliding_window=6, max_window_layers=0
    ),
    "qwen3": sized(transformers.Qwen3Config, head_dim=12),
    "qwen3_tied": sized(transformers.Qwen3Config, tie_word_embeddings=True, attention_bias=True),
}


@pytest.mark.parametrize("name", THEIRS)
def test_we_compute_the_logits_of_transformers_from_its_folder(name, tmp_path):
    theirs = randomized(transformers.AutoModelForCausalLM.from_config(THEIRS[name]))
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    ids = ids_for(theirs)
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)


@settings(max_examples=12, derandomize=True)
@given(
    heads=st.integers(1, 4),
    groups=st.integers(1, 3),
    half_width=st.integers(2, 9),
    layers=st.integers(1, 3),
    inner=st.integers(1, 70),
    vocabulary=st.integers(2, 90),
    family=st.sampled_from(["gpt2", "llama"]),
)
def test_logits_agree_on_random_shapes(
    heads, groups, half_width, layers, inner, vocabulary, family, tmp_path_factory
):
    torch.manual_seed(0)
    query_heads = heads * groups
    ours = randomized(
        Transformer(
            ModelConfig(
                model_type=family,
                hidden_size=2 * half_width * query_heads,
                num_attention_heads=query_heads,
                num_key_value_heads=heads if family == "llama" else None,
                num_hidden_layers=layers,
                intermediate_size=inner,
                vocab_size=vocabulary,
                max_position_embeddings=24,
            )
        )
    )
    folder, ids = tmp_path_factory.mktemp("model"), ids_for(ours)
    save_pretrained(ours, folder)
    theirs = opened_by_transformers(folder)
    torch.testing.assert_close(theirs(ids).logits, ours(ids), atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(folder / "back")
    torch.testing.assert_close(load_pretrained(folder / "back")(ids), ours(ids), atol=1e-5, rtol=1e-5)


def test_greedy_decoding_in_transformers_continues_as_we_would(tmp_path):
    ours = randomized(Transformer(small_config(**SHAPES["grouped"])))
    save_pretrained(ours, tmp_path)
    ids = ids_for(ours, 5)[:1]
    theirs = opened_by_transformers(tmp_path).generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    for _ in range(8):
        ids = torch.cat((ids, ours(ids)[:, -1:].argmax(-1)), dim=1)
    assert theirs.tolist() == ids.tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_saved_model_of_any_shape_is_loaded_bit_exactly(shape, tmp_path):
    config = small_config(**SHAPES[shape], dropout=0.1, zero_init_outputs=True, initializer_range=0.03)
    model = randomized(Transformer(config))
    save_pretrained(model, tmp_path)
    back = load_pretrained(tmp_path)
    own_names = {
        name: value
        for name, value in with_explicit_values(config).model_dump().items()
        if name != "model_type"
    }
    assert {
        name: value
        for name, value in with_explicit_values(back.config).model_dump().items()
        if name != "model_type"
    } == own_names
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, back.get_parameter(name)), name
    assert torch.equal(model(ids_for(model)), back(ids_for(model)))


def test_a_shape_without_a_family_is_saved_under_our_own_names(tmp_path):
    config = small_config(**SHAPES["squared"])
    assert hf_family(config) is None
    save_pretrained(Transformer(config), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llm_trainer"


def test_sharded_weights_are_loaded_here_and_in_transformers(tmp_path):
    ours = randomized(Transformer(small_config(**SHAPES["grouped"])))
    save_pretrained(ours, tmp_path, max_shard_bytes=20_000)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    ids = ids_for(ours)
    assert torch.equal(load_pretrained(tmp_path)(ids), ours(ids))
    torch.testing.assert_close(opened_by_transformers(tmp_path)(ids).logits, ours(ids), atol=1e-5, rtol=1e-5)


def test_shards_written_by_transformers_are_loaded(tmp_path):
    theirs = randomized(transformers.AutoModelForCausalLM.from_config(THEIRS["llama"]))
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    ids = ids_for(theirs)
    torch.testing.assert_close(load_pretrained(tmp_path)(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_gpt2_file_without_prefix_and_with_mask_buffers_is_read_as_the_hubs_is(tmp_path):
    from safetensors.torch import load_file, save_file

    ours = randomized(Transformer(small_config()))
    save_pretrained(ours, tmp_path)
    tensors = {
        name.removeprefix("transformer."): tensor
        for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 48, 48)
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(load_pretrained(tmp_path)(ids_for(ours)), ours(ids_for(ours)))


def test_rope_settings_of_older_files_are_read():
    old = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "max_position_embeddings": 64,
        "vocab_size": 9,
    }
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    read = config_from_huggingface({**old, "rope_theta": 500000.0, "rope_scaling": scaling})
    assert read.rope_theta == 500000.0
    assert read.rope_scaling is not None
    assert (read.rope_scaling.kind, read.rope_scaling.factor, read.rope_scaling.original_context) == (
        "llama3",
        8.0,
        32,
    )
    older = config_from_huggingface({**old, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert older.rope_scaling is not None
    assert (older.rope_scaling.kind, older.rope_theta) == ("linear", 10000.0)


def test_the_dtype_is_kept_on_disk_and_chosen_on_loading(tmp_path):
    model = Transformer(small_config()).to(torch.bfloat16)
    save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_pretrained(tmp_path).wte.weight.dtype == torch.float32
    assert load_pretrained(tmp_path, dtype=torch.bfloat16).wte.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "wrap",
    [torch.compile, torch.nn.Module.compile, lambda model: model],
    ids=["compiled", "compiled in place", "plain"],
)
@pytest.mark.parametrize(
    "wrap_target", [torch.compile, lambda model: model], ids=["into compiled", "into plain"]
)
def test_wrappers_leave_no_trace_in_the_file(wrap, wrap_target, tmp_path):
    model, target = randomized(Transformer(small_config())), Transformer(small_config())
    wrapped = wrap(model)
    save_pretrained(model if wrapped is None else wrapped, tmp_path)
    load_weights(wrap_target(target), tmp_path)
    assert all(
        torch.equal(target.get_parameter(name), parameter) for name, parameter in model.named_parameters()
    )


def test_loading_into_a_model_of_another_shape_changes_nothing(tmp_path):
    save_pretrained(Transformer(small_config(intermediate_size=40)), tmp_path)
    target = Transformer(small_config())
    before = target.wte.weight.clone()
    with pytest.raises(CheckpointError, match=r"c_fc\.weight .*\(32, 40\).*\(32, 128\)"):
        load_weights(target, tmp_path)
    assert torch.equal(before, target.wte.weight)


def test_every_shape_with_a_counterpart_names_it():
    for shape, family in WITH_COUNTERPART.items():
        assert config_to_huggingface(small_config(**SHAPES[shape]))["model_type"] == family


def test_rotary_tables_are_not_saved(tmp_path):
    save_pretrained(Transformer(small_config(model_type="llama")), tmp_path)
    assert not any("rotary" in name for name in load_pretrained(tmp_path).state_dict())


def test_a_folder_with_our_tokenizer_is_complete_for_transformers(tmp_path):
    from llm_trainer.data.tokenization.tokenizer import Tokenizer

    tokenizer = Tokenizer.train_bpe(["the quick brown fox jumps over the lazy dog\n"] * 20, vocab_size=300)
    model = randomized(Transformer(small_config(**SHAPES["grouped"], vocab_size=tokenizer.vocab_size)))
    save_pretrained(
        model, tmp_path, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id
    )
    tokenizer.save(tmp_path)
    text = "the lazy fox: naïve 🦊\n"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)(text, return_tensors="pt")["input_ids"]
    assert theirs[0].tolist() == tokenizer.encode(text)
    torch.testing.assert_close(
        opened_by_transformers(tmp_path)(theirs).logits, model(theirs), atol=1e-5, rtol=1e-5
    )


def test_the_section_of_own_settings_is_read_under_its_earlier_names():
    config = small_config(activation_checkpoint_every=2, activation_checkpoint_policy=["attention", "matmul"])
    content = config_to_huggingface(config)
    assert content["model_type"] == "gpt2"
    own = dict(content["llm_trainer"])
    own["checkpoint_every"] = own.pop("activation_checkpoint_every")
    own["checkpoint_keep"] = ["attention", "products"]
    del own["activation_checkpoint_policy"]
    read = config_from_huggingface({**content, "llm_trainer": own})
    assert with_explicit_values(read) == with_explicit_values(config)
