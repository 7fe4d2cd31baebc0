"""Small models of every kind that is supported, for tests that run through all of them."""

from typing import Any

from llm_trainer.config import ModelConfig

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"model_type": "llama"},
    "grouped": {"model_type": "llama", "num_key_value_heads": 2},
    "qk_norm": {"model_type": "llama", "num_key_value_heads": 1, "qk_norm": True, "head_dim": 16},
    "window": {"model_type": "llama", "sliding_window": 5},
    "learned_window": {"sliding_window": 5, "num_key_value_heads": 2},
    "post_norm": {"pre_norm": False, "activation": "relu"},
    "post_norm_rms": {
        "pre_norm": False,
        "norm": "rmsnorm",
        "position_embedding": "rope",
        "tie_word_embeddings": False,
    },
    "squared": {
        "model_type": "llama",
        "activation": "relu2",
        "logit_soft_cap": 15.0,
        "tie_word_embeddings": True,
    },
    "no_positions": {"position_embedding": "none", "activation": "silu"},
    "stretched": {"model_type": "llama", "rope_scaling": {"kind": "linear", "factor": 4.0}},
    "llama3": {
        "model_type": "llama",
        "rope_scaling": {"kind": "llama3", "factor": 8.0, "original_context": 32},
    },
    "no_bias": {"bias": False, "activation": "gelu"},
    "some_biases": {"bias": False, "qkv_bias": True, "mlp_bias": True, "norm_bias": True},
}


def small_config(**changes: Any) -> ModelConfig:
    """Two layers, 32 wide, 4 heads, 61 tokens, context 48, unless changed."""
    small = {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 48,
    }
    return ModelConfig(**{**small, **changes})
