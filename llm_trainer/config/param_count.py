"""Parameter counts of a model shape, by module and without torch: for presets, reports and memory estimates,
before anything is allocated.
"""

from __future__ import annotations

from llm_trainer.config.schema.model import ModelConfig


def _first_set(*choices: bool | None) -> bool:
    return next(choice for choice in choices if choice is not None)


def params_per_module(config: ModelConfig) -> dict[str, int]:
    """Parameters of each module, in the model's order and under its names (`wte`, `wpe`, `ln_1.0`, `attn.0`,
    …, `ln_f`, `lm_head`).

    A tied head counts 0. `llm_trainer.model.module_names.parameter_counts` counts a real model.
    """
    sizes = {"wte": config.vocab_size * config.hidden_size}
    if config.position_embedding == "learned":
        sizes["wpe"] = config.max_position_embeddings * config.hidden_size
    norm = config.hidden_size * (
        2 if config.norm == "layernorm" and _first_set(config.norm_bias, config.bias) else 1
    )
    for layer in range(config.num_hidden_layers):
        own = config.block_config(layer)
        sizes |= {
            f"ln_1.{layer}": norm,
            f"attn.{layer}": _attention_size(own),
            f"ln_2.{layer}": norm,
            f"mlp.{layer}": _mlp_size(own),
        }
        adapter = 2 * config.hidden_size * config.adapter_size
        sizes |= {f"adapter.{layer}": adapter} if config.use_adapter_modules else {}
        sizes |= (
            {f"domain_adapter.{layer}": adapter * len(config.domain_names)}
            if config.use_domain_adaptation
            else {}
        )
    if config.pre_norm:
        sizes["ln_f"] = norm
    sizes["lm_head"] = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    for target, (inputs, outputs) in _adaptable(config).items():
        rank = sum(table.rank_of(target) for table in config.with_lora_tables().lora.values())
        sizes[".".join(target.split(".")[:2])] += rank * (inputs + outputs)
    return sizes


def _adaptable(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each matrix that can have a LoRA adapter; a tied head uses the embedding's."""
    hidden = config.hidden_size
    found = {"wte": (hidden, config.vocab_size)}
    for layer in range(config.num_hidden_layers):
        own = config.block_config(layer)
        width, queries, keys = (
            own.mlp_width,
            own.num_attention_heads * own.head_width,
            own.kv_heads * own.head_width,
        )
        found |= {f"attn.{layer}.q_proj": (hidden, queries), f"attn.{layer}.k_proj": (hidden, keys)}
        found |= {f"attn.{layer}.v_proj": (hidden, keys), f"attn.{layer}.o_proj": (queries, hidden)}
        found |= {f"mlp.{layer}.gate_proj": (hidden, width)} if own.activation == "swiglu" else {}
        found |= {f"mlp.{layer}.up_proj": (hidden, width), f"mlp.{layer}.down_proj": (width, hidden)}
    return found if config.tie_word_embeddings else {**found, "lm_head": (hidden, config.vocab_size)}


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters of a model of this shape; tied weights count once."""
    return sum(params_per_module(config).values())


def _attention_size(config: ModelConfig) -> int:
    queries, keys = config.num_attention_heads * config.head_width, config.kv_heads * config.head_width
    output_bias = _first_set(config.attention_bias, config.bias)
    biases = (queries + 2 * keys if _first_set(config.qkv_bias, output_bias) else 0) + (
        config.hidden_size if output_bias else 0
    )
    return (
        2 * config.hidden_size * (queries + keys) + biases + (2 * config.head_width if config.qk_norm else 0)
    )


def _mlp_size(config: ModelConfig) -> int:
    width, maps_in = config.mlp_width, 2 if config.activation == "swiglu" else 1
    biases = maps_in * width + config.hidden_size if _first_set(config.mlp_bias, config.bias) else 0
    return (maps_in + 1) * config.hidden_size * width + biases
