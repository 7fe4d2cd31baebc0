"""The whole network: GPT-2's shape, Llama's, and what lies between, by configuration and without a subclass
per family.

Read it from top to bottom: attention, MLP, block, model. B is the batch, T the tokens of a sequence, C the
width of the residual stream (`hidden_size`), H and KV the query and key-value heads, D the width of a head, V
the vocabulary.

Query, key, value, gate and up projections are separate matrices, though one fused product is a little faster
on small shapes: each is then one thing with one name for Hugging Face's files, for LoRA, tensor parallelism,
Muon and pruning. What depends on the sequence and not on the layer (rotary tables, masks) is made once per
pass and handed to every block; blocks carry no index of their own, so that a compiled block serves for all of
them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.errors import UsageError
from llm_trainer.model.activation_checkpointing import recomputed
from llm_trainer.model.activations import ACTIVATIONS
from llm_trainer.model.adapters.bottleneck_adapter import Bottleneck, Choice, chosen_domains
from llm_trainer.model.attention import Share, attend
from llm_trainer.model.kv_cache import KVCache, LayerCache, Place
from llm_trainer.model.norms import RMSNorm
from llm_trainer.model.positional import Rotary, cache_mask, positions_in_documents, rotate, sequence_mask


def _either(first: bool | None, *others: bool) -> bool:
    """The first that is said."""
    return next(value for value in (first, *others) if value is not None)


def computing_dtype(x: Tensor) -> torch.dtype:
    """The type that matrix products will have: autocast's where it is on, so that tables and masks do not
    pull attention back to fp32.
    """
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class Linear(nn.Linear):
    """A linear map without default initialisation, which `Transformer.initialize` would only overwrite.

    (`nn.utils.skip_init` does the same by way of the meta device, where drawing numbers imports
    torch._dynamo: 1.4 s of a program's start.)
    """

    def reset_parameters(self) -> None:
        """Leave the weights as allocated."""

    def adapted(self, x: Tensor, y: Tensor) -> Tensor:
        """What this map gives for `x` where its matrix gives `y`: the same, unless adapters add to it
        (lora.py).
        """
        return y

    def effective_weight(self) -> Tensor:
        """The matrix (out, in) that computes what the map does without dropout."""
        return self.weight


def project(x: Tensor, maps: Sequence[nn.Linear]) -> Sequence[Tensor]:
    """Several linear maps of one input, x (…, in) → (…, out) each.

    In training they are one product with their weights joined: products of a hundred features cost more for
    being called than for their arithmetic; low-rank adapters add to each map's share. Each map is called by
    itself where it is more than that (a hook, a weight spread over ranks), and without gradients, where a
    single token would pay for joining the weights.
    """
    if not (torch.is_grad_enabled() and all(map(_is_plain, maps))):
        return [linear(x) for linear in maps]
    bias = None if maps[0].bias is None else torch.cat([linear.bias for linear in maps])
    joined = F.linear(x, torch.cat([linear.weight for linear in maps]), bias)
    shares = torch.split(joined, [linear.out_features for linear in maps], dim=-1)
    return [
        linear.adapted(x, share) if isinstance(linear, Linear) else share
        for linear, share in zip(maps, shares, strict=True)
    ]


def _is_plain(linear: nn.Linear) -> bool:
    return (
        isinstance(linear, Linear)
        and type(linear.weight) is nn.Parameter
        and not linear._forward_hooks
        and not linear._forward_pre_hooks
    )


class Embedding(nn.Embedding):
    """An embedding without default initialisation, likewise."""

    def reset_parameters(self) -> None:
        """Leave the weights as allocated."""


def make_norm(config: ModelConfig) -> nn.Module:
    """LayerNorm or RMSNorm over C features."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.hidden_size, config.norm_epsilon)
    return nn.LayerNorm(
        config.hidden_size, eps=config.norm_epsilon, bias=_either(config.norm_bias, config.bias)
    )


class Attention(nn.Module):
    """Causal self-attention with grouped key-value heads (Ainslie et al. 2023, arXiv:2305.13245) through
    PyTorch's fused kernels.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, heads, kv_heads = config.head_width, config.num_attention_heads, config.kv_heads
        bias = _either(config.attention_bias, config.bias)
        qkv_bias = _either(config.qkv_bias, bias)
        self.q_proj = Linear(config.hidden_size, heads * width, qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_heads * width, qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_heads * width, qkv_bias)
        self.o_proj = Linear(heads * width, config.hidden_size, bias)
        self.q_norm = RMSNorm(width, config.norm_epsilon) if config.qk_norm else None
        self.k_norm = RMSNorm(width, config.norm_epsilon) if config.qk_norm else None
        self.head_width = width
        self.dropout = _attention_dropout(config)
        self.attend = attend

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        place: Place | None = None,
    ) -> Tensor:
        """x (B, T, C) → (B, T, C). Without a mask attention is causal; one new token over a cache sees all
        that the cache shows.
        """
        batch, count, _ = x.shape
        x = x.to(computing_dtype(x))  # once: autocast would do it in each projection
        # (B, T, H, D), and (B, T, KV, D) twice
        q, k, v = (
            y.view(batch, count, -1, self.head_width)
            for y in project(x, (self.q_proj, self.k_proj, self.v_proj))
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None and place is not None:
            keys, values = cache.write(k, v, place)  # (B, KV, S, D)
        else:
            keys, values = k.transpose(1, 2), v.transpose(1, 2)
        y = self.attend(
            q.transpose(1, 2), keys, values, mask, self.dropout if self.training else 0.0
        )  # (B, H, T, D)
        projected: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, count, -1))
        return projected


def _attention_dropout(config: ModelConfig) -> float:
    return config.dropout if config.attention_dropout is None else config.attention_dropout


class MLP(nn.Module):
    """Two linear maps around an activation; with swiglu a third gates them (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        bias = _either(config.mlp_bias, config.bias)
        self.up_proj = Linear(config.hidden_size, config.mlp_width, bias)
        self.down_proj = Linear(config.mlp_width, config.hidden_size, bias)
        self.gate_proj = (
            Linear(config.hidden_size, config.mlp_width, bias) if config.activation == "swiglu" else None
        )
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) → (B, T, C)."""
        x = x.to(computing_dtype(x))
        if self.gate_proj is None:
            inner: Tensor = self.activation(self.up_proj(x))
        else:
            gate, up = project(x, (self.gate_proj, self.up_proj))
            inner = self.activation(gate) * up
        projected: Tensor = self.down_proj(inner)
        return projected


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream; normalised before (as GPT-2 and Llama do) or
    after the sum.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = Attention(config)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)
        self.pre_norm = config.pre_norm
        width, inner = config.hidden_size, config.adapter_size
        self.adapter = Bottleneck(1, width, inner) if config.use_adapter_modules else None
        self.domain_adapter = (
            Bottleneck(len(config.domain_names), width, inner) if config.use_domain_adaptation else None
        )

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        place: Place | None = None,
        domains: Choice = None,
    ) -> Tensor:
        """x (B, T, C) → (B, T, C)."""
        if self.pre_norm:
            x = x + self.dropout(self.attn(self.ln_1(x), rotary, mask, cache, place))
            x = x + self.dropout(self.mlp(self.ln_2(x)))
        else:
            x = self.ln_1(x + self.dropout(self.attn(x, rotary, mask, cache, place)))
            x = self.ln_2(x + self.dropout(self.mlp(x)))
        if self.adapter is not None:
            x = self.adapter(x, 0)
        return x if self.domain_adapter is None else self.domain_adapter(x, domains)


class Transformer(nn.Module):
    """Token ids in, hidden states or logits out."""

    def __init__(self, config: ModelConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        config.check_shape()  # again: settings may have been assigned one by one
        self.config = config = config.with_lora_table()
        device = torch.get_default_device()
        self.wte = Embedding(config.vocab_size, config.hidden_size)
        self.wpe = None
        if config.positions == "learned":
            self.wpe = Embedding(config.max_position_embeddings, config.hidden_size)
        self.rotary = Rotary(config) if config.positions == "rope" else None
        self.dropout = nn.Dropout(
            config.dropout if config.embedding_dropout is None else config.embedding_dropout
        )
        self.blocks = nn.ModuleList(
            [Block(config.of_block(number)) for number in range(config.num_hidden_layers)]
        )
        # The last sum of a post-norm stack is normalised already.
        self.ln_f = make_norm(config) if config.pre_norm else nn.Identity()
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.domain: int | None = 0 if len(config.domain_names) == 1 else None
        self.share: Share | None = None
        self.tie_weights()
        if device.type != "meta":
            self.initialize(generator)
        if config.lora or config.lora_in_use:
            from llm_trainer.model.adapters.lora import attach_all  # it builds on this module

            attach_all(self)

    def tie_weights(self) -> None:
        """Let the head use the embedding's matrix, where the configuration says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.wte.weight

    def take_share(self, share: Share) -> None:
        """Expect this part of each sequence as input, and give it as output."""
        self.share = share
        for module in self.modules():
            if isinstance(module, Attention):
                module.attend = share.attend

    def freeze_layer(self, parts: str | Sequence[str]) -> list[str]:
        """Stop training parts by name, range or glob (`attn.2`, `mlp.0-3`, `ln_*`); returns all that are
        frozen by it (parts.py).
        """
        from llm_trainer.model.module_names import set_trainable  # it builds on this module

        return set_trainable(self, parts, False)

    def unfreeze_layer(self, parts: str | Sequence[str]) -> list[str]:
        """Train parts again."""
        from llm_trainer.model.module_names import set_trainable

        return set_trainable(self, parts, True)

    def set_layer_lora_rank(self, parts: str | Sequence[str], rank: int) -> list[str]:
        """Give attn.N, mlp.N, wte or lm_head low-rank adapters of this rank, 0: merge and remove them
        (lora.py).
        """
        from llm_trainer.model.adapters.lora import set_lora_rank

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
        """input_ids (B, T) → logits (B, T, V)."""
        return self.logits(
            self.hidden_states(
                input_ids, document_ids=document_ids, positions=positions, cache=cache, domains=domains
            )
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (…, C) → logits (…, V), squashed where `logit_soft_cap` says so (Gemma 2, arXiv:2408.00118)."""
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
        """input_ids (B, T) → what the head reads, (B, T, C).

        document_ids (B, T): packed documents neither see each other nor count on from each other's positions.
        They are of whole sequences also where the model has its share of each (see `take_share`). positions
        (B, T): where each token stands; without a cache this moves position embeddings only, with one also
        the slots. cache: keys and values of earlier tokens; these ones are added (see KVCache). domains (B,)
        or (B, T): whose adapter each row, or each place, takes, by its number (see `domain_rows`); none: what
        `use_domain` said. Raises UsageError where the sequence is longer than the context or the cache.
        """
        count = input_ids.size(1)
        if document_ids is not None and cache is not None:
            raise UsageError("packed documents and a cache do not go together; decode one document a row")
        if self.share is not None and cache is not None:
            raise UsageError(
                "a model that has its share of each sequence cannot decode; use one that is whole"
            )
        place = None if cache is None else cache.place(input_ids, positions, self.config.sliding_window)
        start, stop = (0, count) if place is None else (place.start, place.stop)
        places = None
        if self.share is not None:
            stop, places = self.share.places(count, input_ids.device)
        if stop > self.config.max_position_embeddings:
            raise UsageError(
                f"{stop} tokens are more than the model's context of {self.config.max_position_embeddings}"
            )
        if document_ids is not None and positions is None and self.wpe is not None:
            positions = positions_in_documents(
                document_ids
            )  # rotary attention sees differences only and needs none
            positions = positions if places is None else positions[:, places]
        elif places is not None and positions is None:
            positions = places[None]
        x = self.embed(input_ids, start, stop, positions)
        dtype = computing_dtype(x)
        rotary = None if self.rotary is None else self.rotary(start, stop, positions, dtype)
        window = self.config.sliding_window
        if place is None:
            mask = sequence_mask(stop, window, document_ids, x.device, dtype, places)
        else:
            mask = cache_mask(start, stop, place.positions, window, x.device, dtype)
        x = self._through_blocks(x, rotary, mask, cache, place, self.domain if domains is None else domains)
        if cache is not None and positions is None:
            cache.length = stop
        hidden: Tensor = self.ln_f(x)
        return hidden

    def embed(self, input_ids: Tensor, start: int, stop: int, positions: Tensor | None) -> Tensor:
        """input_ids (B, T), which stand at `start` to `stop` or at `positions` (B, T) → what the first block
        reads, (B, T, C).
        """
        x = self.wte(input_ids)
        if self.wpe is not None:
            x = x + (self.wpe.weight[start:stop] if positions is None else self.wpe(positions))
        embedded: Tensor = self.dropout(x)
        return embedded

    def _through_blocks(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        cache: KVCache | None,
        place: Place | None,
        domains: Choice,
    ) -> Tensor:
        if cache is not None:
            for block, layer in zip(self.blocks, cache.layers, strict=True):
                x = block(x, rotary, mask, layer, place, domains)
            return x
        every = (
            self.config.checkpoint_every
            if self.config.gradient_checkpointing and self.training and torch.is_grad_enabled()
            else 0
        )
        inputs = (rotary, mask) if domains is None else (rotary, mask, None, None, domains)
        for number, block in enumerate(self.blocks):
            x = (
                recomputed(block, x, *inputs, keep=self.config.checkpoint_keep)
                if every and number % every == 0
                else block(x, *inputs)
            )
        return x

    def domain_rows(self, names: Sequence[str] | None, numbers: Tensor | None = None) -> Tensor | None:
        """Whose adapter each row, (B,), or each place, (B, T), takes: `chosen_domains` of this model's; None
        where it tells none apart.
        """
        if names is None or not self.config.use_domain_adaptation:
            return None
        return chosen_domains(self.config.domain_names, names, numbers).to(self.wte.weight.device)

    def use_domain(self, name: str | None) -> None:
        """Whose adapter rows take of which no domain is given; None: none. Raises UsageError for a domain
        that has no adapter.
        """
        self.domain = None if name is None else int(chosen_domains(self.config.domain_names, [name])[0])

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh weights: normal(0, initializer_range), residual outputs divided by √(2 × layers) as
        GPT-2 does (Radford et al. 2019), or zero where `zero_init_outputs` says so; norms one, biases zero.

        Numbers are drawn on the CPU in fp32 whatever the weights' device and type, so one seed means one
        model everywhere.
        """
        deviation = self.config.initializer_range
        outputs = (
            0.0 if self.config.zero_init_outputs else deviation / math.sqrt(2 * self.config.num_hidden_layers)
        )
        for name, module in self.named_modules():
            if isinstance(module, Bottleneck):
                module.restart(name, deviation)
        for name, parameter in self.named_parameters():  # a tied matrix comes once, as wte
            if "adapter." in name:
                continue
            if parameter.dim() < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            drawn = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            parameter.copy_(drawn.normal_(0.0, outputs if residual else deviation, generator=generator))
        if self.rotary is not None:
            self.rotary.reset()
