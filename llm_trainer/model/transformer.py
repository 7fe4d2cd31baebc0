"""The whole network: GPT-2's shape, Llama's, and shapes between them, by configuration and without a subclass
per family.

Read it from top to bottom: attention, MLP, block, model. B is the batch, T the tokens of a sequence, C the
width of the residual stream (`hidden_size`), H and KV the query and key-value heads, D the width of a head, V
the vocabulary.

Query, key, value, gate and up projections are separate matrices, though one fused matrix would be a little
faster on small shapes. Each is then one module with one name for Hugging Face's files, for LoRA, tensor
parallelism, Muon and pruning. What depends on the sequence and not on the layer (rotary tables, masks) is
computed once per pass and given to every block. Blocks have no index of their own, so that one compiled block
serves for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.errors import UsageError
from llm_trainer.model.activation_checkpointing import checkpointed
from llm_trainer.model.activations import ACTIVATIONS
from llm_trainer.model.adapters.bottleneck_adapter import AdapterIndex, BottleneckAdapter, domain_indices
from llm_trainer.model.adapters.lora import inject_adapters, set_lora_rank
from llm_trainer.model.attention import SequenceShard, attention
from llm_trainer.model.base import TransformerBase
from llm_trainer.model.kv_cache import CachePosition, KVCache, LayerCache
from llm_trainer.model.layers import Embedding, Linear, compute_dtype, fused_linears, make_norm
from llm_trainer.model.module_names import set_trainable
from llm_trainer.model.norms import RMSNorm
from llm_trainer.model.positional import (
    RotaryEmbedding,
    cache_mask,
    positions_in_documents,
    rotate,
    sequence_mask,
)


class Attention(nn.Module):
    """Causal self-attention with grouped key-value heads (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, heads, kv_heads = config.head_width, config.num_attention_heads, config.kv_heads
        bias = _first_set(config.attention_bias, config.bias)
        qkv_bias = _first_set(config.qkv_bias, bias)
        self.q_proj = Linear(config.hidden_size, heads * width, qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_heads * width, qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_heads * width, qkv_bias)
        self.o_proj = Linear(heads * width, config.hidden_size, bias)
        self.q_norm = RMSNorm(width, config.norm_epsilon) if config.qk_norm else None
        self.k_norm = RMSNorm(width, config.norm_epsilon) if config.qk_norm else None
        self.head_width = width
        self.dropout = config.dropout if config.attention_dropout is None else config.attention_dropout
        self.attention_function = attention

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        cache_position: CachePosition | None = None,
    ) -> Tensor:
        """Attend from each token to those before it.

        Args:
            x: (B, T, C).
            rotary: Tables of cos and sin, or None.
            mask: Additive, broadcastable to (B, H, T, S). None: causal; one new token over a cache sees all
                that the cache shows.
            cache: Keys and values of earlier tokens, or None.
            cache_position: Where the tokens of `x` go in the cache.

        Returns:
            (B, T, C).
        """
        batch, count, _ = x.shape
        x = x.to(compute_dtype(x))  # once: autocast would do it in each projection
        # (B, T, H, D), and (B, T, KV, D) twice
        q, k, v = (
            y.view(batch, count, -1, self.head_width)
            for y in fused_linears(x, (self.q_proj, self.k_proj, self.v_proj))
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None and cache_position is not None:
            keys, values = cache.write(k, v, cache_position)  # (B, KV, S, D)
        else:
            keys, values = k.transpose(1, 2), v.transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        y = self.attention_function(q.transpose(1, 2), keys, values, mask, dropout)  # (B, H, T, D)
        projected: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, count, -1))
        return projected


class MLP(nn.Module):
    """Two linear maps around an activation; with swiglu a third one gates them (Shazeer 2020,
    arXiv:2002.05202).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.mlp_width
        bias = _first_set(config.mlp_bias, config.bias)
        self.up_proj = Linear(width, inner, bias)
        self.down_proj = Linear(inner, width, bias)
        self.gate_proj = Linear(width, inner, bias) if config.activation == "swiglu" else None
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) → (B, T, C)."""
        x = x.to(compute_dtype(x))
        if self.gate_proj is None:
            inner: Tensor = self.activation(self.up_proj(x))
        else:
            gate, up = fused_linears(x, (self.gate_proj, self.up_proj))
            inner = self.activation(gate) * up
        projected: Tensor = self.down_proj(inner)
        return projected


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream.

    The stream is normalized before each (pre-norm, as GPT-2 and Llama do) or after each sum (post-norm).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = Attention(config)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)
        self.pre_norm = config.pre_norm
        width, inner, domains = config.hidden_size, config.adapter_size, len(config.domain_names)
        self.adapter = BottleneckAdapter(1, width, inner) if config.use_adapter_modules else None
        self.domain_adapter = (
            BottleneckAdapter(domains, width, inner) if config.use_domain_adaptation else None
        )

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        cache_position: CachePosition | None = None,
        domains: AdapterIndex = None,
    ) -> Tensor:
        """Run the block; all arguments but `domains` are those of `Attention.forward`.

        Args:
            x: (B, T, C).
            rotary: Tables of cos and sin, or None.
            mask: Attention mask, or None.
            cache: Keys and values of earlier tokens, or None.
            cache_position: Where the tokens of `x` go in the cache.
            domains: Which domain's adapter each row or token takes.

        Returns:
            (B, T, C).
        """
        if self.pre_norm:
            x = x + self.dropout(self.attn(self.ln_1(x), rotary, mask, cache, cache_position))
            x = x + self.dropout(self.mlp(self.ln_2(x)))
        else:
            x = self.ln_1(x + self.dropout(self.attn(x, rotary, mask, cache, cache_position)))
            x = self.ln_2(x + self.dropout(self.mlp(x)))
        if self.adapter is not None:
            x = self.adapter(x, 0)
        return x if self.domain_adapter is None else self.domain_adapter(x, domains)


class Transformer(TransformerBase):
    """The language model: token ids in, hidden states or logits out."""

    def __init__(self, config: ModelConfig, generator: torch.Generator | None = None) -> None:
        """Build the model and initialize its weights, except on the meta device.

        Args:
            config: The model's shape.
            generator: Source of the random weights. None: torch's global one.

        Raises:
            UsageError: The configuration describes no model that can be built.
        """
        super().__init__()
        config.check_shape()  # again: settings may have been assigned one by one
        self.config = config = config.with_lora_tables()
        device = torch.get_default_device()
        self.wte = Embedding(config.vocab_size, config.hidden_size)
        self.wpe = None
        if config.position_embedding == "learned":
            self.wpe = Embedding(config.max_position_embeddings, config.hidden_size)
        self.rotary = RotaryEmbedding(config) if config.position_embedding == "rope" else None
        self.dropout = nn.Dropout(
            config.dropout if config.embedding_dropout is None else config.embedding_dropout
        )
        self.blocks = nn.ModuleList(
            [Block(config.block_config(number)) for number in range(config.num_hidden_layers)]
        )
        # The last sum of a post-norm stack is normalized already.
        self.ln_f = make_norm(config) if config.pre_norm else nn.Identity()
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.domain: int | None = 0 if len(config.domain_names) == 1 else None
        self.sequence_shard: SequenceShard | None = None
        self.tie_weights()
        if device.type != "meta":
            self.initialize(generator)
        if config.lora or config.active_adapters:
            inject_adapters(self)

    def set_sequence_shard(self, shard: SequenceShard) -> None:
        """Work on a part of each sequence (context parallelism): it is the input, and the output is for it
        alone.
        """
        self.sequence_shard = shard
        for module in self.modules():
            if isinstance(module, Attention):
                module.attention_function = shard.attention

    def freeze_layer(self, parts: str | Sequence[str]) -> list[str]:
        """Stop training some parts.

        Args:
            parts: A name (`attn.2`), a range (`mlp.0-3`), a glob (`ln_*`), or a list of them; see
                `module_names`.

        Returns:
            All parts that this freezes, including a part that is tied to one of them.

        Raises:
            UsageError: The model has no such part.
        """
        return set_trainable(self, parts, False)

    def unfreeze_layer(self, parts: str | Sequence[str]) -> list[str]:
        """Train some parts again; arguments, result and errors are those of `freeze_layer`."""
        return set_trainable(self, parts, True)

    def set_layer_lora_rank(self, parts: str | Sequence[str], rank: int) -> list[str]:
        """Give parts low-rank adapters of another rank; see `adapters.lora.set_lora_rank`.

        Args:
            parts: Names, ranges or globs of `attn.N`, `mlp.N`, `wte` and `lm_head`.
            rank: The new rank; 0 merges the adapters and removes them.

        Returns:
            The parts that were changed.

        Raises:
            UsageError: A part does not exist or takes no adapter, or the rank is negative.
        """
        return set_lora_rank(self, parts, rank)

    def forward(
        self,
        input_ids: Tensor,
        *,
        document_ids: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        domains: Tensor | None = None,
    ) -> Tensor:
        """input_ids (B, T) → logits (B, T, V); the other arguments are those of `hidden_states`."""
        hidden = self.hidden_states(
            input_ids, document_ids=document_ids, positions=positions, cache=cache, domains=domains
        )
        return self.logits(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (…, C) → logits (…, V), with `logit_soft_cap` applied (Gemma 2, arXiv:2408.00118)."""
        logits: Tensor = self.lm_head(hidden)
        cap = self.config.logit_soft_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        document_ids: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        domains: Tensor | None = None,
    ) -> Tensor:
        """Run the model up to the head.

        Args:
            input_ids: (B, T).
            document_ids: (B, T). Packed documents do not see each other, and learned positions restart with
                each. Under context parallelism the ids are those of the complete sequences.
            positions: Position of each token, (B, T). Without a cache they choose position embeddings only;
                with one they choose the slots as well.
            cache: Keys and values of earlier tokens, to which these tokens are added; see `KVCache`.
            domains: Which domain's adapter each row, (B,), or each token, (B, T), takes; see
                `domain_indices`. None: the one that `set_domain` chose.

        Returns:
            What the head reads, (B, T, C).

        Raises:
            UsageError: The sequence is longer than the context or the cache, or two arguments exclude each
                other.
        """
        count = input_ids.size(1)
        if document_ids is not None and cache is not None:
            raise UsageError("packed documents cannot be combined with a cache; decode one document per row")
        if self.sequence_shard is not None and cache is not None:
            raise UsageError("decoding is not supported under context parallelism")
        window = self.config.sliding_window
        cache_position = None if cache is None else cache.locate(input_ids, positions, window)
        start, stop = (0, count) if cache_position is None else (cache_position.start, cache_position.stop)
        local = None  # positions of this rank's tokens, under context parallelism
        if self.sequence_shard is not None:
            stop, local = self.sequence_shard.token_positions(count, input_ids.device)
        if stop > self.config.max_position_embeddings:
            raise UsageError(
                f"{stop} tokens are more than the model's context of {self.config.max_position_embeddings}; "
                "shorten the sequence"
            )
        if document_ids is not None and positions is None and self.wpe is not None:
            # Rotary attention sees only differences of positions and needs none of this.
            positions = positions_in_documents(document_ids)
            positions = positions if local is None else positions[:, local]
        elif local is not None and positions is None:
            positions = local[None]
        x = self.embed(input_ids, start, stop, positions)
        dtype = compute_dtype(x)
        rotary = None if self.rotary is None else self.rotary(start, stop, positions, dtype)
        if cache_position is None:
            mask = sequence_mask(stop, window, document_ids, x.device, dtype, local)
        else:
            mask = cache_mask(start, stop, cache_position.positions, window, x.device, dtype)
        domain: AdapterIndex = self.domain if domains is None else domains
        x = self._run_blocks(x, rotary, mask, cache, cache_position, domain)
        if cache is not None and positions is None:
            cache.length = stop
        hidden: Tensor = self.ln_f(x)
        return hidden

    def embed(self, input_ids: Tensor, start: int, stop: int, positions: Tensor | None) -> Tensor:
        """What the first block reads.

        Args:
            input_ids: (B, T).
            start: Position of the first token.
            stop: Position after the last token.
            positions: Position of each token, (B, T), instead of `start` and `stop`.

        Returns:
            (B, T, C).
        """
        x = self.wte(input_ids)
        if self.wpe is not None:
            x = x + (self.wpe.weight[start:stop] if positions is None else self.wpe(positions))
        embedded: Tensor = self.dropout(x)
        return embedded

    def _run_blocks(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        cache: KVCache | None,
        cache_position: CachePosition | None,
        domains: AdapterIndex,
    ) -> Tensor:
        if cache is not None:
            for block, layer in zip(self.blocks, cache.layers, strict=True):
                x = block(x, rotary, mask, layer, cache_position, domains)
            return x
        saves_memory = self.config.gradient_checkpointing and self.training and torch.is_grad_enabled()
        every = self.config.activation_checkpoint_every if saves_memory else 0
        policy = self.config.activation_checkpoint_policy
        inputs = (rotary, mask) if domains is None else (rotary, mask, None, None, domains)
        for number, block in enumerate(self.blocks):
            if every and number % every == 0:
                x = checkpointed(block, x, *inputs, policy=policy)
            else:
                x = block(x, *inputs)
        return x

    def domain_indices(self, names: Sequence[str] | None, numbers: Tensor | None = None) -> Tensor | None:
        """Which adapter each row or token takes, for the `domains` argument of `hidden_states`.

        Args:
            names: The domain of each row, or, with `numbers`, the domains that these count.
            numbers: Index in `names` of each row, (B,), or each token, (B, T).

        Returns:
            (B,) or (B, T) int64, or None for a model without domain adapters.

        Raises:
            UsageError: A row's domain has no adapter.
        """
        if names is None or not self.config.use_domain_adaptation:
            return None
        return domain_indices(self.config.domain_names, names, numbers).to(self.wte.weight.device)

    def set_domain(self, name: str | None) -> None:
        """Choose the domain adapter of rows for which no domain is given.

        Args:
            name: The domain; None: no adapter.

        Raises:
            UsageError: The domain has no adapter.
        """
        self.domain = None if name is None else int(domain_indices(self.config.domain_names, [name])[0])

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh weights.

        Matrices are normal(0, initializer_range). Those that write into the residual stream are divided by
        √(2 × layers) as GPT-2 does (Radford et al. 2019), or are zero with `zero_init_outputs`. Norms are
        one, biases zero. Numbers are drawn on the CPU in fp32 whatever the weights' device and type, so that
        one seed gives one model everywhere.

        Args:
            generator: Source of the random numbers. None: torch's global one.
        """
        deviation = self.config.initializer_range
        residual_deviation = deviation / math.sqrt(2 * self.config.num_hidden_layers)
        if self.config.zero_init_outputs:
            residual_deviation = 0.0
        for name, module in self.named_modules():
            if isinstance(module, BottleneckAdapter):
                module.reset(name, deviation)
        for name, parameter in self.named_parameters():  # a tied matrix comes once, as wte
            if "adapter." in name:
                continue
            if parameter.dim() < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            drawn = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            drawn.normal_(0.0, residual_deviation if is_residual else deviation, generator=generator)
            parameter.copy_(drawn)
        if self.rotary is not None:
            self.rotary.reset()


def _first_set(*values: bool | None) -> bool:
    """The first value that is not None."""
    return next(value for value in values if value is not None)
