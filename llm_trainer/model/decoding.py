"""One new token a row, with as little as possible around the matrix products.

Decoding one sequence reads every weight once for a single vector; on small models the calls around that cost as much as the reading. This
is `Transformer` for T = 1 written flat: no module calls; query, key and value in one product, gate and up in another; and for a
single row `torch.mv`, which on CPUs takes half of `F.linear`'s time in bf16. The joined matrices replace the separate ones in memory and
are not copies beside them: `q_proj.weight` becomes a view of its rows.

It computes what `Transformer.logits(hidden_states(…))` computes (a test holds them together), for a model that is made of this
package's own parts. One with adapters, hooks or replaced layers goes the ordinary way: ask `can_decode` first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_trainer.model.cache import KVCache, LayerCache, Place
from llm_trainer.model.norms import RMSNorm
from llm_trainer.model.positions import cache_mask, rotate
from llm_trainer.model.transformer import MLP, Attention, Block, Embedding, Linear, Transformer

_PLAIN = (Transformer, Block, Attention, MLP, Linear, Embedding, RMSNorm, nn.LayerNorm, nn.Dropout, nn.Identity, nn.ModuleList)


def can_decode(model: nn.Module) -> bool:
    """Whether the model is made of unchanged parts only, without hooks."""
    if not isinstance(model, Transformer):
        return False
    known = {*_PLAIN, type(model.rotary)}
    return all(type(module) in known and not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


class TokenDecoder:
    """Decodes through a model's own weights, which it rearranges once; moving or retyping the model afterwards needs a new decoder."""

    @torch.no_grad()
    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.heads, self.kv_heads = model.config.num_attention_heads, model.config.kv_heads
        self.layers = [_Layer.of(block) for block in model.blocks if isinstance(block, Block)]

    @torch.inference_mode()
    def logits(self, input_ids: Tensor, cache: KVCache, positions: Tensor | None = None) -> Tensor:
        """input_ids (B, 1) → logits of the next token (B, V); positions (B, 1) and the cache are as in `Transformer.hidden_states`."""
        model, config = self.model, self.model.config
        batch = input_ids.size(0)
        place = cache.place(input_ids, positions, config.sliding_window)
        x = model.wte(input_ids.view(-1))  # (B, C)
        if model.wpe is not None:
            x = x + (model.wpe.weight[place.start] if positions is None else model.wpe(positions.view(-1)))
        rotary = None
        if model.rotary is not None:
            cos, sin = model.rotary(place.start, place.stop, positions, x.dtype)  # (1, 1, D) or (B, 1, 1, D)
            rotary = cos.squeeze(-3), sin.squeeze(-3)
        mask = None if positions is None else cache_mask(0, place.stop, positions, config.sliding_window, x.device, x.dtype)
        if batch == 1 and x.device.type == "cpu":
            x = x[0]  # (C,): one vector, for torch.mv
        for layer, slots in zip(self.layers, cache.layers, strict=True):
            if layer.pre_norm:
                x = x + self._attend(layer, layer.ln_1(x), batch, rotary, mask, slots, place)
                x = x + layer.mlp(layer.ln_2(x))
            else:
                x = layer.ln_1(x + self._attend(layer, x, batch, rotary, mask, slots, place))
                x = layer.ln_2(x + layer.mlp(x))
        if positions is None:
            cache.length = place.stop
        logits = _multiply(x if isinstance(model.ln_f, nn.Identity) else _Norm.of(model.ln_f)(x), model.lm_head.weight, None)
        cap = config.logit_soft_cap
        return (logits if cap is None else cap * torch.tanh(logits / cap)).view(batch, -1)

    def _attend(
        self,
        layer: _Layer,
        x: Tensor,
        batch: int,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        slots: LayerCache,
        place: Place,
    ) -> Tensor:
        """x (C,) or (B, C) → the same shape, over the keys and values of `slots` and this token's."""
        heads, kv_heads = self.heads, self.kv_heads
        qkv = _multiply(x, *layer.qkv).view(batch, heads + 2 * kv_heads, -1)  # (B, H + 2 KV, D)
        qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if layer.q_norm is not None and layer.k_norm is not None:
            qk = torch.cat((layer.q_norm(qk[:, :heads]), layer.k_norm(qk[:, heads:])), dim=1)
        if rotary is not None:
            qk = rotate(qk, *rotary)
        keys, values = slots.write(qk[:, None, heads:], v[:, None], place)  # (B, KV, S, D)
        q = qk[:, :heads].reshape(batch, kv_heads, heads // kv_heads, -1)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)  # (B, KV, H / KV, D)
        return _multiply(y.reshape(*x.shape[:-1], -1), *layer.output)


@dataclass(frozen=True)
class _Norm:
    """A norm without the module around it."""

    shape: Sequence[int]
    weight: Tensor
    bias: Tensor | None
    epsilon: float
    centred: bool

    @classmethod
    def of(cls, norm: nn.Module) -> _Norm:
        assert isinstance(norm, nn.LayerNorm | RMSNorm)
        return cls(norm.normalized_shape, norm.weight, getattr(norm, "bias", None), norm.eps or 0.0, isinstance(norm, nn.LayerNorm))

    def __call__(self, x: Tensor) -> Tensor:
        if self.centred:
            return F.layer_norm(x, self.shape, self.weight, self.bias, self.epsilon)
        return F.rms_norm(x, self.shape, self.weight, self.epsilon)


@dataclass(frozen=True)
class _Layer:
    """One block's weights, joined where they read the same input."""

    ln_1: _Norm
    ln_2: _Norm
    qkv: tuple[Tensor, Tensor | None]
    output: tuple[Tensor, Tensor | None]
    up: tuple[Tensor, Tensor | None]
    down: tuple[Tensor, Tensor | None]
    q_norm: _Norm | None
    k_norm: _Norm | None
    block: Block

    @classmethod
    def of(cls, block: Block) -> _Layer:
        attention, mlp = block.attn, block.mlp
        gate_and_up = [mlp.up_proj] if mlp.gate_proj is None else [mlp.gate_proj, mlp.up_proj]
        return cls(
            _Norm.of(block.ln_1),
            _Norm.of(block.ln_2),
            _join([attention.q_proj, attention.k_proj, attention.v_proj]),
            (attention.o_proj.weight, attention.o_proj.bias),
            _join(gate_and_up),
            (mlp.down_proj.weight, mlp.down_proj.bias),
            None if attention.q_norm is None else _Norm.of(attention.q_norm),
            None if attention.k_norm is None else _Norm.of(attention.k_norm),
            block,
        )

    @property
    def pre_norm(self) -> bool:
        return self.block.pre_norm

    def mlp(self, x: Tensor) -> Tensor:
        inner = _multiply(x, *self.up)
        activation = self.block.mlp.activation
        if self.block.mlp.gate_proj is None:
            return _multiply(activation(inner), *self.down)
        gate, up = inner.chunk(2, dim=-1)
        return _multiply(activation(gate) * up, *self.down)


def _join(maps: list[Linear]) -> tuple[Tensor, Tensor | None]:
    """Stack the weights (and biases) of linear maps of one input, and let each map's own weight be a view of its rows."""
    if len(maps) == 1:
        return maps[0].weight, maps[0].bias
    sizes = [linear.out_features for linear in maps]
    weight = torch.cat([linear.weight for linear in maps])
    for linear, rows in zip(maps, torch.split(weight, sizes), strict=True):
        linear.weight.data = rows
    biases: list[Tensor] = [linear.bias for linear in maps if linear.bias is not None]
    return weight, torch.cat(biases) if biases else None


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (…, inputs) → (…, outputs)."""
    if x.dim() > 1:
        return F.linear(x, weight, bias)
    return torch.mv(weight, x) if bias is None else torch.addmv(bias, weight, x)
