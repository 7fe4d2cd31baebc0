"""The shape of the network. GPT-2's shape is the default; `model_type: llama` turns the defaults into
Llama's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import model_validator

from llm_trainer.config.schema.base import Section, setting
from llm_trainer.config.schema.lora import DEFAULT_NAME, LoraConfig
from llm_trainer.errors import UsageError

FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "enhanced": {},
    "llama": {
        "position_embedding": "rope",
        "norm": "rmsnorm",
        "activation": "swiglu",
        "bias": False,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
    },
}


class RopeScaling(Section):
    """Stretching of rotary positions past the trained context."""

    kind: Literal["linear", "llama3"] = setting(
        "linear", "how positions are stretched", aliases=("rope_type", "type")
    )
    factor: float = setting(1.0, "how many times longer the context becomes", gt=0)
    low_frequency_factor: float = setting(
        1.0, "llama3: wavelengths above context/this are stretched fully", aliases=("low_freq_factor",), gt=0
    )
    high_frequency_factor: float = setting(
        4.0, "llama3: wavelengths below context/this are left alone", aliases=("high_freq_factor",), gt=0
    )
    original_context: int = setting(
        8192,
        "llama3: the context of the first training",
        unit="tokens",
        aliases=("original_max_position_embeddings",),
        gt=0,
    )
    rope_theta: float | None = setting(
        None, "base of the rotary frequencies where the file keeps it here", gt=0
    )


class ModelConfig(Section):
    """The network's shape."""

    model_type: Literal["gpt2", "llama", "enhanced"] = setting(
        "gpt2", "family that the defaults come from", aliases=("architecture", "family")
    )
    vocab_size: int = setting(
        50257,
        "rows of the embedding; set by the tokenizer when one is at hand",
        unit="tokens",
        aliases=("n_vocab",),
        gt=0,
    )
    hidden_size: int = setting(
        768, "width of the residual stream", unit="features", aliases=("d_model", "n_embd", "embed_dim"), gt=0
    )
    num_hidden_layers: int = setting(
        12, "transformer blocks", unit="layers", aliases=("num_layers", "n_layers", "n_layer"), gt=0
    )
    num_attention_heads: int = setting(
        12, "query heads", unit="heads", aliases=("num_heads", "n_heads", "n_head"), gt=0
    )
    num_key_value_heads: int | None = setting(
        None,
        "key and value heads (GQA); none: as many as query heads",
        unit="heads",
        aliases=("num_kv_heads", "n_kv_heads", "n_kv_head", "n_query_groups"),
        gt=0,
    )
    head_dim: int | None = setting(
        None,
        "width of a head; none: hidden_size / num_attention_heads",
        unit="features",
        aliases=("d_head", "head_size"),
        gt=0,
    )
    intermediate_size: int | None = setting(
        None,
        "inner width of the MLP; none: 4 × hidden_size, for swiglu 8/3 × hidden_size rounded up to 256",
        unit="features",
        aliases=("d_ff", "n_inner", "ffn_dim"),
        gt=0,
    )
    max_position_embeddings: int = setting(
        1024,
        "context",
        unit="tokens",
        aliases=("max_seq_len", "max_seq_length", "block_size", "n_positions", "n_ctx", "context_length"),
        gt=0,
    )
    position_embedding: Literal["learned", "rope", "none"] = setting(
        "learned", "Position embedding: learned vectors, rotary positions (RoPE), or none."
    )
    rope_theta: float = setting(10000.0, "base of the rotary frequencies", gt=0)
    rope_scaling: RopeScaling | None = setting(None, "stretching of rotary positions")
    norm: Literal["layernorm", "rmsnorm"] = setting("layernorm", "normalisation", aliases=("norm_type",))
    norm_epsilon: float = setting(
        1e-5,
        "added to the variance",
        aliases=("layer_norm_epsilon", "layer_norm_eps", "rms_norm_eps", "norm_eps"),
        gt=0,
    )
    pre_norm: bool = setting(
        True, "normalise before each sublayer; false: after its residual sum, as the first transformer did"
    )
    activation: Literal["gelu", "gelu_tanh", "relu", "relu2", "silu", "swiglu"] = setting(
        "gelu_tanh",
        "inner function of the MLP (relu2: ReLU squared, swiglu: gated SiLU)",
        aliases=("hidden_act", "activation_function"),
    )
    bias: bool = setting(True, "biases in linear layers and LayerNorm")
    attention_bias: bool | None = setting(None, "biases in all four attention projections; none: as `bias`")
    qkv_bias: bool | None = setting(
        None, "biases in query, key and value projections only; none: as `attention_bias`"
    )
    mlp_bias: bool | None = setting(None, "biases in the MLP; none: as `bias`")
    norm_bias: bool | None = setting(None, "biases in LayerNorm; none: as `bias`")
    qk_norm: bool = setting(False, "RMSNorm on each head's queries and keys", aliases=("use_qk_norm",))
    tie_word_embeddings: bool = setting(
        True, "the head shares the embedding's matrix", aliases=("tie_weights", "weight_tying")
    )
    sliding_window: int | None = setting(
        None, "each token sees so many tokens, itself included", unit="tokens", gt=0
    )
    logit_soft_cap: float | None = setting(
        None,
        "logits are squashed into ± this by tanh",
        aliases=("final_logit_softcapping", "logit_softcap"),
        gt=0,
    )
    dropout: float = setting(
        0.0, "dropout on each sublayer's output", aliases=("resid_pdrop", "hidden_dropout"), ge=0, lt=1
    )
    attention_dropout: float | None = setting(
        None, "dropout on attention weights; none: as `dropout`", aliases=("attn_pdrop",), ge=0, lt=1
    )
    embedding_dropout: float | None = setting(
        None, "dropout on the embeddings; none: as `dropout`", aliases=("embd_pdrop",), ge=0, lt=1
    )
    initializer_range: float = setting(
        0.02,
        "standard deviation of initial weights; residual outputs get it / √(2 × layers)",
        aliases=("init_std",),
        gt=0,
    )
    zero_init_outputs: bool = setting(
        False, "start each sublayer's output projection at zero (muP-like; helps Muon)"
    )
    gradient_checkpointing: bool = setting(
        False,
        "recompute activations in the backward pass: less memory, more time",
        paths=("training.gradient_checkpointing", "computational_efficiency.use_activation_checkpointing"),
        aliases=("use_activation_checkpointing", "activation_checkpointing"),
    )
    activation_checkpoint_every: int = setting(
        1,
        "with gradient_checkpointing: recompute every n-th block only",
        unit="blocks",
        aliases=("activation_checkpointing_every", "checkpoint_every_n_layers"),
        paths=("training.activation_checkpoint_every",),
        gt=0,
    )
    activation_checkpoint_policy: list[Literal["attention", "products"]] = setting(
        list,
        "with gradient_checkpointing: results that are kept, not recomputed (attention: its kernel's, products: matrix products')",
        aliases=("selective_checkpointing",),
        paths=("training.activation_checkpoint_policy",),
    )
    # Low-rank adapters. The four ranks and what follows them describe the set called `default`; `lora` is the
    # whole table.
    attn_lora_rank: int = setting(
        0, "LoRA rank of all attention parts; 0: none", paths=("training.attn_lora_rank",), ge=0
    )
    mlp_lora_rank: int = setting(
        0, "LoRA rank of all MLP parts; 0: none", paths=("training.mlp_lora_rank",), ge=0
    )
    embedding_lora_rank: int = setting(
        0,
        "LoRA rank of the embedding (a tied head shares it); 0: none",
        aliases=("embedding_rank",),
        paths=("training.embedding_rank",),
        ge=0,
    )
    head_lora_rank: int = setting(
        0, "LoRA rank of the head; 0: none", paths=("training.head_lora_rank",), ge=0
    )
    lora_alpha: float | None = setting(
        None,
        "LoRA products are scaled by alpha / rank; none: twice the rank",
        paths=("training.lora_alpha",),
        gt=0,
    )
    lora_dropout: float = setting(
        0.0, "dropout on what LoRA adapters of blocks read", paths=("training.lora_dropout",), ge=0, lt=1
    )
    use_rslora: bool = setting(False, "scale LoRA products by alpha / √rank", paths=("training.use_rslora",))
    lora_train_base: bool | None = setting(
        None,
        "train the weights under LoRA too; none: from scratch yes, over pretrained ones no",
        paths=("training.lora_train_base",),
    )
    lora: dict[str, LoraConfig] = setting(dict, "sets of LoRA adapters by name; filled from the ranks above")
    active_adapters: list[str] | None = setting(
        None, "names of the LoRA sets that count; none: `default`, or else the first"
    )

    # After pruning blocks may be unequal.
    mlp_hidden_sizes: list[int] = setting(
        list, "inner width of each block's MLP where they differ; none: intermediate_size", unit="features"
    )
    kv_heads_per_layer: list[int] = setting(
        list,
        "key-value heads of each block where they differ, each with its share of query heads; none: num_key_value_heads",
        unit="heads",
    )
    use_adapter_modules: bool = setting(False, "a bottleneck adapter behind each block")
    use_domain_adaptation: bool = setting(
        False, "a bottleneck adapter for each domain behind each block, chosen by the document's domain"
    )
    adapter_size: int = setting(
        64, "inner width of bottleneck adapters", unit="features", aliases=("bottleneck_size",), gt=0
    )
    adapter_domains: list[str] = setting(
        list, "names of the domains with adapters; none: those of the data, or one called general"
    )

    @classmethod
    def translate(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Common spellings of activations."""
        settled = dict(values)
        for name in ("activation", "hidden_act", "activation_function"):
            if isinstance(settled.get(name), str):
                settled[name] = {
                    "gelu_new": "gelu_tanh",
                    "gelu_pytorch_tanh": "gelu_tanh",
                    "relu_squared": "relu2",
                }.get(settled[name], settled[name])
        return settled

    def model_post_init(self, context: Any, /) -> None:
        """Runs once, when the section is made; an after-validator would run again whenever it is put into a
        RunConfig.
        """
        self._become_family()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if type(self).names().get(name) == "model_type":
            self._become_family()

    def _become_family(self) -> None:
        """Give every field that was not said its family's default, without counting it as said."""
        family = FAMILY_DEFAULTS[self.model_type]
        for name in {
            name for defaults in FAMILY_DEFAULTS.values() for name in defaults
        } - self.model_fields_set:
            self.__dict__[name] = family.get(name, type(self).model_fields[name].default)

    @model_validator(mode="after")
    def _shape_fits(self) -> ModelConfig:
        self.check_shape()
        return self

    def check_shape(self) -> None:
        """Raises UsageError where heads, widths and positions do not fit together. Assignments one by one are
        checked on use.
        """
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise UsageError(
                f"hidden_size {self.hidden_size} does not divide into {self.num_attention_heads} heads; "
                "change num_attention_heads or set head_dim"
            )
        for name in ("mlp_hidden_sizes", "kv_heads_per_layer"):
            said = getattr(self, name)
            if said and (len(said) != self.num_hidden_layers or min(said) < 1):
                raise UsageError(
                    f"{name} {said} is not a number above 0 for each of {self.num_hidden_layers} blocks"
                )
        if self.num_attention_heads % self.kv_heads:
            raise UsageError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads {self.kv_heads}"
            )
        if self.position_embedding == "rope" and self.head_width % 2:
            raise UsageError(f"rotary positions need an even head width, not {self.head_width}")

    def with_lora_table(self) -> ModelConfig:
        """The same, with `lora["default"]` filled from the single ranks where they ask for it and it is not
        there; else itself.
        """
        said = {"attn": self.attn_lora_rank, "mlp": self.mlp_lora_rank}
        ranks = {
            f"{kind}.{layer}": rank
            for layer in range(self.num_hidden_layers)
            for kind, rank in said.items()
            if rank
        }
        ranks |= {"wte": self.embedding_lora_rank} if self.embedding_lora_rank else {}
        ranks |= {"lm_head": self.head_lora_rank} if self.head_lora_rank else {}
        tables = dict(self.lora)
        if ranks:
            table = LoraConfig(
                ranks=ranks, alpha=self.lora_alpha, dropout=self.lora_dropout, use_rslora=self.use_rslora
            )
            tables.setdefault(DEFAULT_NAME, table)
        if self.tie_word_embeddings:
            tables = {name: table.with_tied_head() for name, table in tables.items()}
        return self if tables == self.lora else self.model_copy(update={"lora": tables})

    @property
    def counting_lora(self) -> list[str]:
        """Names of the sets of LoRA adapters that count, after the default."""
        if self.active_adapters is not None or not self.lora:
            return list(self.active_adapters or [])
        return [DEFAULT_NAME if DEFAULT_NAME in self.lora else next(iter(self.lora))]

    @property
    def has_adapters(self) -> bool:
        """Whether the model has parameters that are adapters'."""
        return bool(self.with_lora_table().lora) or self.use_adapter_modules or self.use_domain_adaptation

    @property
    def domain_names(self) -> list[str]:
        """Domains with adapters of their own, after the default."""
        return (self.adapter_domains or ["general"]) if self.use_domain_adaptation else []

    def of_block(self, number: int) -> ModelConfig:
        """The shape as one block has it: itself, unless blocks differ."""
        if not self.mlp_hidden_sizes and not self.kv_heads_per_layer:
            return self
        own: dict[str, Any] = {"mlp_hidden_sizes": [], "kv_heads_per_layer": []}
        if self.mlp_hidden_sizes:
            own["intermediate_size"] = self.mlp_hidden_sizes[number]
        if self.kv_heads_per_layer:
            group, kv_heads = self.num_attention_heads // self.kv_heads, self.kv_heads_per_layer[number]
            own |= {
                "num_attention_heads": group * kv_heads,
                "num_key_value_heads": kv_heads,
                "head_dim": self.head_width,
            }
        return self.model_copy(update=own)

    @property
    def kv_heads(self) -> int:
        """Key and value heads, after the default."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_width(self) -> int:
        """Features a head, after the default."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def mlp_width(self) -> int:
        """Inner features of the MLP, after the default."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        if self.activation == "swiglu":
            return -(-8 * self.hidden_size // (3 * 256)) * 256
        return 4 * self.hidden_size
