"""Our model configuration as Hugging Face's config.json, and back.

A shape is written under the family of transformers that computes the same function: `gpt2`, `llama`, `qwen2`
(biases on query, key and value alone), `qwen3` (QK-norm) or `mistral` (sliding window). Settings that those
files have no key for (initialization, most dropouts) are in a section `llm_trainer` of the same file, which
others ignore, so that reading gives back the configuration that was written. A shape that no family computes
is written entirely under `model_type: llm_trainer`.

Unknown content is never skipped: a key that changes the computation in a way that is not implemented here is
an error. The one exception is `auto_map`, which names code to be run from the folder; it is not looked at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from llm_trainer.config.saved_run import with_current_names
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

# What those classes of transformers assume where a key is missing.
_GPT2_DEFAULTS = {
    "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024,
    "activation_function": "gelu_new", "resid_pdrop": 0.1, "attn_pdrop": 0.1, "embd_pdrop": 0.1,
    "tie_word_embeddings": True,
}  # fmt: skip
_LLAMA_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
}
# Keys that change what is computed, with the only values that are computed here.
_GPT2_FIXED = {
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
_LLAMA_FIXED = {"hidden_act": ("silu",), "partial_rotary_factor": (None, 1.0)}


def with_explicit_values(config: ModelConfig) -> ModelConfig:
    """The same shape, with the value of every setting that follows another one filled in.

    Two configurations of one shape are then equal, and a saved one does not depend on today's defaults.
    """
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


def hf_family(config: ModelConfig) -> str | None:
    """The family of transformers that computes the same function as this shape, or None."""
    shape = with_explicit_values(config)
    has_own_parts = shape.use_adapter_modules or shape.use_domain_adaptation
    is_uneven = shape.mlp_hidden_sizes or shape.kv_heads_per_layer
    if not shape.pre_norm or shape.logit_soft_cap is not None or is_uneven or has_own_parts:
        return None
    if shape.position_embedding == "learned":
        return "gpt2" if _is_gpt2(shape) else None
    if (shape.position_embedding, shape.norm, shape.activation) != ("rope", "rmsnorm", "swiglu"):
        return None
    return _llama_family(shape)


def _is_gpt2(shape: ModelConfig) -> bool:
    return (
        not shape.qk_norm
        and shape.sliding_window is None
        and shape.kv_heads == shape.num_attention_heads
        and _heads_fill_width(shape)
        and shape.norm == "layernorm"
        and all((shape.qkv_bias, shape.attention_bias, shape.mlp_bias, shape.norm_bias))
        and shape.activation in _GPT2_ACTIVATIONS
    )


def _llama_family(shape: ModelConfig) -> str | None:
    biases = (shape.qkv_bias, shape.attention_bias, shape.mlp_bias)
    if shape.sliding_window is not None:
        return "mistral" if not any(biases) and not shape.qk_norm else None
    if shape.qk_norm:
        return "qwen3" if not shape.mlp_bias and shape.qkv_bias == shape.attention_bias else None
    if shape.qkv_bias != shape.attention_bias:
        return "qwen2" if biases == (True, False, False) and _heads_fill_width(shape) else None
    if _heads_fill_width(shape):
        return "llama"
    return "mistral" if not any(biases) else None  # Mistral's class takes heads of any width


def _heads_fill_width(shape: ModelConfig) -> bool:
    return shape.head_width * shape.num_attention_heads == shape.hidden_size


def config_to_huggingface(config: ModelConfig) -> dict[str, Any]:
    """The content of config.json, without token ids and dtype.

    Args:
        config: The model's shape.

    Returns:
        Keys and values for JSON.
    """
    family, shape = hf_family(config), with_explicit_values(config)
    if family is None:
        return {"model_type": OWN_SECTION, **_own_settings(shape)}
    names = {**_SHARED_NAMES, **(_GPT2_NAMES if family == "gpt2" else _LLAMA_NAMES)}
    content: dict[str, Any] = {"model_type": family, "architectures": [_ARCHITECTURES[family]]}
    content |= {key: getattr(shape, field) for key, field in names.items()}
    if family == "gpt2":
        content["activation_function"] = _GPT2_ACTIVATIONS[shape.activation]
    else:
        content |= {"hidden_act": "silu", **_rope_settings(shape)}
    if family in ("llama", "qwen3"):
        content["attention_bias"] = shape.attention_bias
    if family == "llama":
        content["mlp_bias"] = shape.mlp_bias
    if family == "mistral":
        content["sliding_window"] = shape.sliding_window
    return content | _remaining_settings(shape, content)


def _own_settings(shape: ModelConfig) -> dict[str, Any]:
    return shape.model_dump(mode="json", exclude={"model_type"})


def _remaining_settings(shape: ModelConfig, content: Mapping[str, Any]) -> dict[str, Any]:
    """Our own section, with every setting that would otherwise be read back differently."""
    wanted, read = _own_settings(shape), _own_settings(with_explicit_values(config_from_huggingface(content)))
    different = {name: value for name, value in wanted.items() if read[name] != value}
    return {OWN_SECTION: different} if different else {}


def _rope_settings(shape: ModelConfig) -> dict[str, Any]:
    """Both spellings: `rope_parameters` of transformers 5, and `rope_theta` with `rope_scaling` of version 4
    and of other readers.
    """
    scaling = shape.rope_scaling
    theta = shape.rope_theta if scaling is None or scaling.rope_theta is None else scaling.rope_theta
    if scaling is None:
        return {"rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    parameters: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        parameters["low_freq_factor"] = scaling.low_frequency_factor
        parameters["high_freq_factor"] = scaling.high_frequency_factor
        parameters["original_max_position_embeddings"] = scaling.original_context
    parameters["rope_theta"] = theta
    return {"rope_theta": theta, "rope_scaling": parameters, "rope_parameters": parameters}


def config_from_huggingface(content: Mapping[str, Any]) -> ModelConfig:
    """Read the content of a config.json.

    Args:
        content: The parsed JSON object.

    Returns:
        The model's shape.

    Raises:
        CheckpointError: The family is unknown, a value is invalid, or a key asks for something that is not
            implemented here.
    """
    family = content.get("model_type")
    try:
        if family == OWN_SECTION:
            known = ModelConfig.model_fields.keys()
            settings: dict[str, Any] = with_current_names("model", content)
            return ModelConfig(
                **{name: value for name, value in settings.items() if name in known and name != "model_type"}
            )
        if family not in FAMILIES:
            raise CheckpointError(
                f"model_type {family!r} in config.json is not supported; supported are {', '.join(FAMILIES)} "
                f"and {OWN_SECTION}"
            )
        if content.get("quantization_config"):
            raise CheckpointError(
                "the weights are quantized (config.json has quantization_config), which is not supported; "
                "take the model's version without quantization"
            )
        values = _from_gpt2(content) if family == "gpt2" else _from_llama(family, content)
        return ModelConfig(**{**values, **with_current_names("model", content.get(OWN_SECTION, {}))})
    except (UsageError, ValidationError, TypeError, KeyError) as error:
        raise CheckpointError(f"config.json does not describe a {family} model: {error!s}") from error


def _from_gpt2(content: Mapping[str, Any]) -> dict[str, Any]:
    given = {**_GPT2_DEFAULTS, **content}
    _check_computation(given, _GPT2_FIXED)
    names = {**_SHARED_NAMES, **_GPT2_NAMES}
    values = {field: given[key] for key, field in names.items() if key in given}
    return {"model_type": "gpt2", **values, "activation": given["activation_function"]}


def _from_llama(family: str, content: Mapping[str, Any]) -> dict[str, Any]:
    given = {**_LLAMA_DEFAULTS, **content}
    _check_computation(given, _LLAMA_FIXED)
    names = {**_SHARED_NAMES, **_LLAMA_NAMES}
    values = {field: given[key] for key, field in names.items() if given.get(key) is not None}
    if family == "qwen3":
        values.setdefault("head_dim", 128)
    bias = bool(given.get("attention_bias", False)) if family in ("llama", "qwen3") else False
    return {
        "model_type": "llama",
        **values,
        **_from_rope_settings(given),
        "attention_bias": bias,
        "qkv_bias": bias or family == "qwen2",
        "mlp_bias": bool(given.get("mlp_bias", False)) if family == "llama" else False,
        "qk_norm": family == "qwen3",
        "sliding_window": _sliding_window(family, given),
    }


def _from_rope_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` of transformers 5, or `rope_scaling` and `rope_theta` of earlier versions."""
    stored = {name: content[name] for name in ("rope_parameters", "rope_scaling") if content.get(name)}
    found = [_plain_rope_settings(name, value, content) for name, value in stored.items()]
    if len(found) == 2 and found[0] != found[1]:
        raise CheckpointError(
            "config.json has two different settings of rotary positions: rope_parameters "
            f"{json.dumps(stored['rope_parameters'])} and rope_scaling {json.dumps(stored['rope_scaling'])}; "
            "programs differ in which they use. Delete the one that the model was not trained with"
        )
    given = found[0] if found else _plain_rope_settings("rope_parameters", {}, content)
    kind = given["rope_type"]
    if kind not in ("default", "linear", "llama3"):
        raise CheckpointError(
            f"rope_type {kind!r} in config.json is not supported; supported are default, linear and llama3"
        )
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(
            "partial_rotary_factor in config.json is not supported: every feature of a head is rotated here"
        )
    if kind == "default":
        return {"rope_theta": given["rope_theta"]}
    required = ["factor", *(["low_freq_factor", "high_freq_factor"] if kind == "llama3" else [])]
    if missing := [name for name in required if name not in given]:
        raise CheckpointError(
            f"{next(iter(stored))} in config.json has rope_type {kind} without {missing[0]}"
        )
    scaling: dict[str, Any] = {"kind": kind, "factor": given["factor"]}
    if kind == "llama3":
        scaling["low_frequency_factor"] = given["low_freq_factor"]
        scaling["high_frequency_factor"] = given["high_freq_factor"]
        original = given.get("original_max_position_embeddings")
        scaling["original_context"] = original or content["max_position_embeddings"]
    return {"rope_theta": given["rope_theta"], "rope_scaling": scaling}


def _plain_rope_settings(name: str, given: object, content: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings under the names of transformers 5, without those that are null."""
    if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
        raise CheckpointError(
            f"{name} in config.json must be one set of values for all layers, such as "
            f'{{"rope_type": "default"}}; it is {json.dumps(given)[:200]}'
        )
    plain = {key: value for key, value in given.items() if value is not None and key != "type"}
    plain.setdefault("rope_type", given.get("type") or "default")
    plain["rope_theta"] = plain.get("rope_theta", content.get("rope_theta")) or 10000.0
    return plain


def _sliding_window(family: str, content: Mapping[str, Any]) -> int | None:
    """The window of all layers, or None; raises CheckpointError where layers differ."""
    if family == "llama":
        return None
    if family == "mistral":
        window = content.get("sliding_window", 4096)
        return None if window is None else int(window)
    if not content.get("use_sliding_window", False) or content.get("sliding_window") is None:
        return None
    first_windowed = content.get("max_window_layers", 28)
    layer_types = content.get("layer_types")
    if layer_types is None and first_windowed >= content["num_hidden_layers"]:
        return None
    if set(layer_types or ()) == {"sliding_attention"} or (layer_types is None and first_windowed == 0):
        return int(content["sliding_window"])
    raise CheckpointError(
        "config.json gives a sliding window to some layers only (max_window_layers, layer_types), "
        "which is not supported"
    )


def _check_computation(content: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]]) -> None:
    for key, supported in fixed.items():
        if key in content and content[key] not in supported:
            raise CheckpointError(
                f"{key} = {content[key]!r} in config.json is not supported; only {supported[-1]!r} is"
            )
