"""Our configuration as Hugging Face's config.json and back.

A shape is written under the family that computes the same function: `gpt2`, `llama`, `qwen2` (biases on query, key and value alone),
`qwen3` (QK-norm) or `mistral` (sliding window). What those files have no word for (initialisation, most dropouts) stands in a
section `llm_trainer` of the same file, which others ignore, so that reading back gives the configuration that was written. A shape that no
family computes is written whole under `model_type: llm_trainer`.

Reading trusts nothing it does not know: a word that changes the computation and that we do not compute is an error, never skipped.
`auto_map` names code to be run from the folder; it is not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.errors import CheckpointError, UsageError

OWN_SECTION = "llm_trainer"
FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")

_GPT2_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_new",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
}
_GPT2_NAMES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "norm_epsilon",
    "resid_pdrop": "dropout",
    "attn_pdrop": "attention_dropout",
    "embd_pdrop": "embedding_dropout",
}
_LLAMA_NAMES = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "norm_epsilon",
    "attention_dropout": "attention_dropout",
}
_SHARED_NAMES = {
    "vocab_size": "vocab_size",
    "tie_word_embeddings": "tie_word_embeddings",
    "initializer_range": "initializer_range",
}
_ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# What those classes of transformers assume where a file is silent.
_GPT2_DEFAULTS = {
    "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "activation_function": "gelu_new",
    "resid_pdrop": 0.1, "attn_pdrop": 0.1, "embd_pdrop": 0.1, "tie_word_embeddings": True,
}  # fmt: skip
_LLAMA_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
}
# Words that change what is computed, with the only values that we compute.
_GPT2_FIXED = {
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
_LLAMA_FIXED = {"hidden_act": ("silu",), "partial_rotary_factor": (None, 1.0)}


def resolved(config: ModelConfig) -> ModelConfig:
    """The same shape with every "none: as …" replaced by the value that it stands for."""
    bias = config.bias
    attention_bias = bias if config.attention_bias is None else config.attention_bias
    filled = {
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.mlp_width,
        "attention_bias": attention_bias,
        "qkv_bias": attention_bias if config.qkv_bias is None else config.qkv_bias,
        "mlp_bias": bias if config.mlp_bias is None else config.mlp_bias,
        "norm_bias": config.norm == "layernorm" and (bias if config.norm_bias is None else config.norm_bias),
        "attention_dropout": config.dropout if config.attention_dropout is None else config.attention_dropout,
        "embedding_dropout": config.dropout if config.embedding_dropout is None else config.embedding_dropout,
    }
    return ModelConfig(**{**config.model_dump(), **filled})


def family_of(config: ModelConfig) -> str | None:
    """The family of transformers that computes the same function, or None."""
    shape = resolved(config)
    if not shape.pre_norm or shape.logit_soft_cap is not None or shape.mlp_widths or shape.kv_head_counts:
        return None
    if shape.use_adapter_modules or shape.use_domain_adaptation:
        return None
    biases = (shape.qkv_bias, shape.attention_bias, shape.mlp_bias)
    even = shape.head_width * shape.num_attention_heads == shape.hidden_size
    if shape.positions == "learned":
        plain = (
            not shape.qk_norm
            and shape.sliding_window is None
            and shape.kv_heads == shape.num_attention_heads
            and even
        )
        fits = (
            plain
            and shape.norm == "layernorm"
            and all(biases)
            and shape.norm_bias
            and shape.activation in _GPT2_ACTIVATIONS
        )
        return "gpt2" if fits else None
    if (shape.positions, shape.norm, shape.activation) != ("rope", "rmsnorm", "swiglu"):
        return None
    if shape.sliding_window is not None:
        return "mistral" if not any(biases) and not shape.qk_norm else None
    if shape.qk_norm:
        return "qwen3" if not shape.mlp_bias and shape.qkv_bias == shape.attention_bias else None
    if shape.qkv_bias != shape.attention_bias:
        return "qwen2" if biases == (True, False, False) and even else None
    if even:
        return "llama"
    return "mistral" if not any(biases) else None  # Mistral's class takes heads of any width


def config_to_huggingface(config: ModelConfig) -> dict[str, Any]:
    """The content of config.json, without token ids and type."""
    family, shape = family_of(config), resolved(config)
    if family is None:
        return {"model_type": OWN_SECTION, **_own_words(shape)}
    names = {**_SHARED_NAMES, **(_GPT2_NAMES if family == "gpt2" else _LLAMA_NAMES)}
    content: dict[str, Any] = {"model_type": family, "architectures": [_ARCHITECTURES[family]]}
    content |= {theirs: getattr(shape, ours) for theirs, ours in names.items()}
    if family == "gpt2":
        content["activation_function"] = _GPT2_ACTIVATIONS[shape.activation]
    else:
        content |= {"hidden_act": "silu", **_rope_words(shape)}
    if family in ("llama", "qwen3"):
        content["attention_bias"] = shape.attention_bias
    if family == "llama":
        content["mlp_bias"] = shape.mlp_bias
    if family == "mistral":
        content["sliding_window"] = shape.sliding_window
    return content | _left_over(shape, content)


def _own_words(shape: ModelConfig) -> dict[str, Any]:
    return shape.model_dump(mode="json", exclude={"model_type"})


def _left_over(shape: ModelConfig, content: Mapping[str, Any]) -> dict[str, Any]:
    """A section with our words for all that would otherwise read back differently."""
    wanted, read = _own_words(shape), _own_words(resolved(config_from_huggingface(content)))
    different = {name: value for name, value in wanted.items() if read[name] != value}
    return {OWN_SECTION: different} if different else {}


def _rope_words(shape: ModelConfig) -> dict[str, Any]:
    """Both spellings: `rope_parameters` of transformers 5, and `rope_theta` with `rope_scaling` of version 4
    and of other readers.
    """
    scaling = shape.rope_scaling
    theta = shape.rope_theta if scaling is None or scaling.rope_theta is None else scaling.rope_theta
    if scaling is None:
        return {"rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    words: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        words["low_freq_factor"] = scaling.low_frequency_factor
        words["high_freq_factor"] = scaling.high_frequency_factor
        words["original_max_position_embeddings"] = scaling.original_context
    both = {**words, "rope_theta": theta}
    return {"rope_theta": theta, "rope_scaling": both, "rope_parameters": both}


def config_from_huggingface(content: Mapping[str, Any]) -> ModelConfig:
    """Read the content of a config.json; raises CheckpointError for a family or a word that we do not
    compute.
    """
    family = content.get("model_type")
    try:
        if family == OWN_SECTION:
            known = ModelConfig.model_fields.keys()
            return ModelConfig(
                **{name: value for name, value in content.items() if name in known and name != "model_type"}
            )
        if family not in FAMILIES:
            raise CheckpointError(
                f"config.json has model_type {family!r}; those that can be read are {', '.join(FAMILIES)} and {OWN_SECTION}"
            )
        if content.get("quantization_config"):
            raise CheckpointError(
                "the weights are quantised (config.json has quantization_config); take the model's unquantised version"
            )
        values = _from_gpt2(content) if family == "gpt2" else _from_llama(family, content)
        return ModelConfig(**{**values, **content.get(OWN_SECTION, {})})
    except (UsageError, ValidationError, TypeError, KeyError) as error:
        raise CheckpointError(f"config.json does not describe a {family} model: {error!s}") from error


def _from_gpt2(content: Mapping[str, Any]) -> dict[str, Any]:
    words = {**_GPT2_DEFAULTS, **content}
    _refuse_unknown_computation(words, _GPT2_FIXED)
    values = {
        ours: words[theirs] for theirs, ours in {**_SHARED_NAMES, **_GPT2_NAMES}.items() if theirs in words
    }
    return {"model_type": "gpt2", **values, "activation": words["activation_function"]}


def _from_llama(family: str, content: Mapping[str, Any]) -> dict[str, Any]:
    words = {**_LLAMA_DEFAULTS, **content}
    _refuse_unknown_computation(words, _LLAMA_FIXED)
    values = {
        ours: words[theirs]
        for theirs, ours in {**_SHARED_NAMES, **_LLAMA_NAMES}.items()
        if words.get(theirs) is not None
    }
    if family == "qwen3":
        values.setdefault("head_dim", 128)
    bias = bool(words.get("attention_bias", False)) if family in ("llama", "qwen3") else False
    return {
        "model_type": "llama",
        **values,
        **_from_rope_words(words),
        "attention_bias": bias,
        "qkv_bias": bias or family == "qwen2",
        "mlp_bias": bool(words.get("mlp_bias", False)) if family == "llama" else False,
        "qk_norm": family == "qwen3",
        "sliding_window": _sliding_window(family, words),
    }


def _from_rope_words(words: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` of transformers 5, or `rope_scaling` and `rope_theta` of the versions before."""
    said = words.get("rope_parameters") or words.get("rope_scaling") or {}
    kind = said.get("rope_type", said.get("type", "default"))
    theta = said.get("rope_theta", words.get("rope_theta")) or 10000.0
    if kind not in ("default", "linear", "llama3"):
        raise CheckpointError(
            f"config.json stretches positions by {kind!r}; those that can be read are default, linear and llama3"
        )
    if said.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(
            "config.json rotates only a part of each head (partial_rotary_factor), which this model does not compute"
        )
    if kind == "default":
        return {"rope_theta": theta}
    scaling: dict[str, Any] = {"kind": kind, "factor": said["factor"]}
    if kind == "llama3":
        scaling |= {
            "low_frequency_factor": said["low_freq_factor"],
            "high_frequency_factor": said["high_freq_factor"],
        }
        scaling["original_context"] = (
            said.get("original_max_position_embeddings") or words["max_position_embeddings"]
        )
    return {"rope_theta": theta, "rope_scaling": scaling}


def _sliding_window(family: str, words: Mapping[str, Any]) -> int | None:
    """One window for all layers, or none; raises CheckpointError where layers differ."""
    if family == "llama":
        return None
    if family == "mistral":
        window = words.get("sliding_window", 4096)
        return None if window is None else int(window)
    if not words.get("use_sliding_window", False) or words.get("sliding_window") is None:
        return None
    first_windowed = words.get("max_window_layers", 28)
    if words.get("layer_types") is None and first_windowed >= words["num_hidden_layers"]:
        return None
    if set(words.get("layer_types") or ()) == {"sliding_attention"} or (
        words.get("layer_types") is None and first_windowed == 0
    ):
        return int(words["sliding_window"])
    raise CheckpointError(
        "config.json gives a sliding window to some layers only (max_window_layers, layer_types), which this model does not compute"
    )


def _refuse_unknown_computation(words: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]]) -> None:
    for name, computed in fixed.items():
        if name in words and words[name] not in computed:
            raise CheckpointError(
                f"config.json has {name} = {words[name]!r}; only {computed[-1]!r} is computed here"
            )
