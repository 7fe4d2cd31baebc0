"""The shape of the network. GPT-2's shape is the default; `model_type: llama` changes the defaults to
Llama's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from llm_trainer.config.schema.base import Section, setting
from llm_trainer.config.schema.lora import DEFAULT_ADAPTER, LoraConfig
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
    """Scaling of rotary positions beyond the context that the model was trained with."""

    kind: Literal["linear", "llama3"] = setting(
        "linear", "Method by which rotary positions are scaled.", aliases=("rope_type", "type")
    )
    factor: float = setting(1.0, "Factor by which the context becomes longer.", gt=0)
    low_frequency_factor: float = setting(
        1.0,
        "llama3: wavelengths above the original context divided by this are scaled fully.",
        aliases=("low_freq_factor",),
        gt=0,
    )
    high_frequency_factor: float = setting(
        4.0,
        "llama3: wavelengths below the original context divided by this are not scaled.",
        aliases=("high_freq_factor",),
        gt=0,
    )
    original_context: int = setting(
        8192,
        "llama3: context length that the model was first trained with.",
        unit="tokens",
        aliases=("original_max_position_embeddings",),
        gt=0,
    )
    rope_theta: float | None = setting(
        None, "Base of the rotary frequencies, where a file gives it here.", gt=0
    )


class ModelConfig(Section):
    """The shape of the network."""

    help_heading: ClassVar[str] = "Model"

    model_type: Literal["gpt2", "llama", "enhanced"] = setting(
        "gpt2",
        "Model family, which sets the defaults of the other model settings.",
        aliases=("architecture", "family"),
        common=True,
    )
    vocab_size: int = setting(
        50257,
        "Vocabulary size of the embedding. The tokenizer sets it where there is one.",
        unit="tokens",
        aliases=("n_vocab",),
        gt=0,
    )
    hidden_size: int = setting(
        768,
        "Width of the residual stream.",
        unit="features",
        aliases=("d_model", "n_embd", "embed_dim"),
        common=True,
        gt=0,
    )
    num_hidden_layers: int = setting(
        12,
        "Number of transformer blocks.",
        unit="layers",
        aliases=("num_layers", "n_layers", "n_layer"),
        common=True,
        gt=0,
    )
    num_attention_heads: int = setting(
        12,
        "Number of query heads.",
        unit="heads",
        aliases=("num_heads", "n_heads", "n_head"),
        common=True,
        gt=0,
    )
    num_key_value_heads: int | None = setting(
        None,
        "Number of key and value heads (grouped-query attention). Unset: as many as query heads.",
        unit="heads",
        aliases=("num_kv_heads", "n_kv_heads", "n_kv_head", "n_query_groups"),
        gt=0,
    )
    head_dim: int | None = setting(
        None,
        "Width of one attention head. Unset: hidden_size / num_attention_heads.",
        unit="features",
        aliases=("d_head", "head_size"),
        gt=0,
    )
    intermediate_size: int | None = setting(
        None,
        "Hidden width of the MLP. Unset: 4 × hidden_size, or for swiglu 8/3 × hidden_size rounded up to a "
        "multiple of 256.",
        unit="features",
        aliases=("d_ff", "n_inner", "ffn_dim"),
        gt=0,
    )
    max_position_embeddings: int = setting(
        1024,
        "Context length.",
        unit="tokens",
        aliases=("max_seq_len", "max_seq_length", "block_size", "n_positions", "n_ctx", "context_length"),
        common=True,
        gt=0,
    )
    position_embedding: Literal["learned", "rope", "none"] = setting(
        "learned", "Position embedding: learned vectors, rotary positions (RoPE), or none."
    )
    rope_theta: float = setting(10000.0, "Base of the rotary frequencies.", gt=0)
    rope_scaling: RopeScaling | None = setting(None, "Scaling of rotary positions for longer contexts.")
    norm: Literal["layernorm", "rmsnorm"] = setting(
        "layernorm", "Normalization layer.", aliases=("norm_type",)
    )
    norm_epsilon: float = setting(
        1e-5,
        "Value added to the variance in normalization layers.",
        aliases=("layer_norm_epsilon", "layer_norm_eps", "rms_norm_eps", "norm_eps"),
        gt=0,
    )
    pre_norm: bool = setting(
        True,
        "Normalize before each sublayer. False: after the residual sum, as in the original transformer.",
    )
    activation: Literal["gelu", "gelu_tanh", "relu", "relu2", "silu", "swiglu"] = setting(
        "gelu_tanh",
        "Activation function of the MLP (relu2: squared ReLU, swiglu: gated SiLU).",
        aliases=("hidden_act", "activation_function"),
    )
    bias: bool = setting(True, "Use biases in linear layers and in LayerNorm.")
    attention_bias: bool | None = setting(
        None, "Use biases in all four attention projections. Unset: as `bias`."
    )
    qkv_bias: bool | None = setting(
        None, "Use biases in the query, key and value projections only. Unset: as `attention_bias`."
    )
    mlp_bias: bool | None = setting(None, "Use biases in the MLP. Unset: as `bias`.")
    norm_bias: bool | None = setting(None, "Use biases in LayerNorm. Unset: as `bias`.")
    qk_norm: bool = setting(
        False, "Apply RMSNorm to the queries and keys of each head.", aliases=("use_qk_norm",)
    )
    tie_word_embeddings: bool = setting(
        True,
        "Use the embedding matrix as the output head too.",
        aliases=("tie_weights", "weight_tying"),
    )
    sliding_window: int | None = setting(
        None,
        "Number of tokens that each token attends to, itself included. Unset: all tokens before it.",
        unit="tokens",
        gt=0,
    )
    logit_soft_cap: float | None = setting(
        None,
        "Limit logits to this absolute value with tanh. Unset: no limit.",
        aliases=("final_logit_softcapping", "logit_softcap"),
        gt=0,
    )
    dropout: float = setting(
        0.0,
        "Dropout probability on the output of each sublayer.",
        aliases=("resid_pdrop", "hidden_dropout"),
        common=True,
        ge=0,
        lt=1,
    )
    attention_dropout: float | None = setting(
        None,
        "Dropout probability on attention weights. Unset: as `dropout`.",
        aliases=("attn_pdrop",),
        ge=0,
        lt=1,
    )
    embedding_dropout: float | None = setting(
        None,
        "Dropout probability on the embeddings. Unset: as `dropout`.",
        aliases=("embd_pdrop",),
        ge=0,
        lt=1,
    )
    initializer_range: float = setting(
        0.02,
        "Standard deviation of the initial weights. Output projections of sublayers use it divided by "
        "√(2 × layers).",
        aliases=("init_std",),
        gt=0,
    )
    zero_init_outputs: bool = setting(
        False,
        "Initialize the output projection of each sublayer to zero (as in muP; helps Muon).",
    )
    gradient_checkpointing: bool = setting(
        False,
        "Recompute activations in the backward pass: less memory, more time.",
        dotted_aliases=(
            "training.gradient_checkpointing",
            "training.activation_checkpointing",
            "computational_efficiency.use_activation_checkpointing",
        ),
        aliases=("use_activation_checkpointing", "activation_checkpointing"),
        heading="Activation checkpointing",
    )
    activation_checkpoint_every: int = setting(
        1,
        "With gradient_checkpointing: recompute only every n-th block.",
        unit="blocks",
        aliases=("activation_checkpointing_every", "checkpoint_every_n_layers"),
        dotted_aliases=("training.activation_checkpoint_every",),
        gt=0,
    )
    activation_checkpoint_policy: list[Literal["attention", "matmul"]] = setting(
        list,
        "With gradient_checkpointing: results that are kept instead of recomputed (attention: those of the "
        "attention kernel, matmul: those of matrix products).",
        aliases=("selective_checkpointing",),
        dotted_aliases=("training.activation_checkpoint_policy",),
    )
    # The four ranks and the settings after them describe the LoRA adapter called `default`; `lora` is the
    # table of all adapters.
    attn_lora_rank: int = setting(
        0,
        "LoRA rank of all attention modules. 0: no LoRA there.",
        dotted_aliases=("training.attn_lora_rank",),
        heading="Adapters",
        ge=0,
    )
    mlp_lora_rank: int = setting(
        0, "LoRA rank of all MLP modules. 0: no LoRA there.", dotted_aliases=("training.mlp_lora_rank",), ge=0
    )
    embedding_lora_rank: int = setting(
        0,
        "LoRA rank of the embedding, and so of a tied head. 0: no LoRA there.",
        aliases=("embedding_rank",),
        dotted_aliases=("training.embedding_rank",),
        ge=0,
    )
    head_lora_rank: int = setting(
        0, "LoRA rank of the head. 0: no LoRA there.", dotted_aliases=("training.head_lora_rank",), ge=0
    )
    lora_alpha: float | None = setting(
        None,
        "LoRA updates are scaled by alpha / rank. Unset: twice the rank.",
        dotted_aliases=("training.lora_alpha",),
        gt=0,
    )
    lora_dropout: float = setting(
        0.0,
        "Dropout probability on the inputs of LoRA adapters in blocks.",
        dotted_aliases=("training.lora_dropout",),
        ge=0,
        lt=1,
    )
    use_rslora: bool = setting(
        False, "Scale LoRA updates by alpha / √rank (rsLoRA).", dotted_aliases=("training.use_rslora",)
    )
    lora_train_base: bool | None = setting(
        None,
        "Also train the weights under LoRA. Unset: yes from scratch, no over pretrained weights.",
        dotted_aliases=("training.lora_train_base",),
    )
    lora: dict[str, LoraConfig] = setting(
        dict, "LoRA adapters by name. The ranks above fill in the one called `default`."
    )
    active_adapters: list[str] | None = setting(
        None, "Names of the active LoRA adapters. Unset: `default`, or else the first."
    )

    # After pruning, blocks may differ in size.
    mlp_hidden_sizes: list[int] = setting(
        list,
        "Hidden width of each block's MLP where blocks differ. Empty: intermediate_size everywhere.",
        unit="features",
        heading="Model",
    )
    kv_heads_per_layer: list[int] = setting(
        list,
        "Number of key and value heads of each block where blocks differ; query heads are scaled alike. "
        "Empty: num_key_value_heads everywhere.",
        unit="heads",
    )
    use_adapter_modules: bool = setting(
        False, "Add a bottleneck adapter after each block.", heading="Adapters"
    )
    use_domain_adaptation: bool = setting(
        False,
        "Add a bottleneck adapter per domain after each block, chosen by the domain of the document.",
    )
    adapter_size: int = setting(
        64, "Hidden width of bottleneck adapters.", unit="features", aliases=("bottleneck_size",), gt=0
    )
    adapter_domains: list[str] = setting(
        list,
        "Names of the domains that have adapters. Empty: those of the data, or a single one called general.",
    )

    @classmethod
    def translate(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Translate Hugging Face's names of activation functions."""
        translated = dict(values)
        for name in ("activation", "hidden_act", "activation_function"):
            if isinstance(translated.get(name), str):
                translated[name] = {
                    "gelu_new": "gelu_tanh",
                    "gelu_pytorch_tanh": "gelu_tanh",
                    "relu_squared": "relu2",
                }.get(translated[name], translated[name])
        return translated

    def model_post_init(self, context: Any, /) -> None:
        """Apply the family's defaults once. A validator would run again whenever the section is put into a
        `RunConfig`.
        """
        self._apply_family_defaults()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if type(self).names().get(name) == "model_type":
            self._apply_family_defaults()

    def _apply_family_defaults(self) -> None:
        """Give every field that the user did not set its family's default, without marking it as set."""
        family = FAMILY_DEFAULTS[self.model_type]
        for name in {
            name for defaults in FAMILY_DEFAULTS.values() for name in defaults
        } - self.model_fields_set:
            self.__dict__[name] = family.get(name, type(self).model_fields[name].default)

    @model_validator(mode="after")
    def _check_shape(self) -> ModelConfig:
        self.check_shape()
        return self

    def check_shape(self) -> None:
        """Check that heads, widths and positions fit together. Single assignments are not checked, only their
        result when it is used.

        Raises:
            UsageError: The shape is not valid.
        """
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise UsageError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                f"{self.num_attention_heads}; "
                "change num_attention_heads or set head_dim"
            )
        for name in ("mlp_hidden_sizes", "kv_heads_per_layer"):
            values = getattr(self, name)
            if values and (len(values) != self.num_hidden_layers or min(values) < 1):
                raise UsageError(
                    f"invalid value for {name}: {values} must have one number above 0 for each of "
                    f"{self.num_hidden_layers} blocks"
                )
        if self.num_attention_heads % self.kv_heads:
            raise UsageError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.kv_heads}; change one of them"
            )
        if self.position_embedding == "rope" and self.head_width % 2:
            raise UsageError(
                f"rotary positions need an even head_dim, not {self.head_width}; change hidden_size, "
                "num_attention_heads or head_dim"
            )

    def with_lora_tables(self) -> ModelConfig:
        """The same configuration with `lora["default"]` filled in from the rank settings, unless it exists.

        Returns:
            This configuration itself where nothing is to fill in.
        """
        block_ranks = {"attn": self.attn_lora_rank, "mlp": self.mlp_lora_rank}
        ranks = {
            f"{kind}.{layer}": rank
            for layer in range(self.num_hidden_layers)
            for kind, rank in block_ranks.items()
            if rank
        }
        ranks |= {"wte": self.embedding_lora_rank} if self.embedding_lora_rank else {}
        ranks |= {"lm_head": self.head_lora_rank} if self.head_lora_rank else {}
        tables = dict(self.lora)
        if ranks:
            table = LoraConfig(
                ranks=ranks, alpha=self.lora_alpha, dropout=self.lora_dropout, use_rslora=self.use_rslora
            )
            tables.setdefault(DEFAULT_ADAPTER, table)
        if self.tie_word_embeddings:
            tables = {name: table.with_tied_head() for name, table in tables.items()}
        return self if tables == self.lora else self.model_copy(update={"lora": tables})

    @property
    def active_adapter_names(self) -> list[str]:
        """Names of the active LoRA adapters, with the default filled in."""
        if self.active_adapters is not None or not self.lora:
            return list(self.active_adapters or [])
        return [DEFAULT_ADAPTER if DEFAULT_ADAPTER in self.lora else next(iter(self.lora))]

    @property
    def has_adapters(self) -> bool:
        """Whether the model has adapters, LoRA or bottleneck."""
        return bool(self.with_lora_tables().lora) or self.use_adapter_modules or self.use_domain_adaptation

    @property
    def domain_names(self) -> list[str]:
        """Domains that have adapters, with the default filled in."""
        return (self.adapter_domains or ["general"]) if self.use_domain_adaptation else []

    def block_config(self, number: int) -> ModelConfig:
        """The configuration of one block, which is this one unless blocks differ in size."""
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
        """Number of key and value heads, with the default filled in."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_width(self) -> int:
        """Features per head, with the default filled in."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def mlp_width(self) -> int:
        """Hidden width of the MLP, with the default filled in."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        if self.activation == "swiglu":
            return -(-8 * self.hidden_size // (3 * 256)) * 256
        return 4 * self.hidden_size
