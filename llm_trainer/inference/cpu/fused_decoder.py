"""The decoding step with fewer and larger operations, eager or compiled.

Query, key and value are one product, gate and up another, and nothing carries a time axis. The fused matrices
share memory with the model's own, which become views of them: the model loses nothing and no byte is held
twice.

Compiled (for a single row), Inductor turns what stands between the products into C++ and calls the products
as they are. Compiling takes some seconds, once for every length, so it is for whoever draws many thousand
tokens; anything shorter is done sooner without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_trainer.inference.cpu.matvec import Product, multiply_vector, product_of
from llm_trainer.model.kv_cache import KVCache, LayerCache
from llm_trainer.model.positional import cache_mask, rotate
from llm_trainer.model.transformer import MLP, Attention, Block, Linear, Transformer


@dataclass(frozen=True)
class Here:
    """Where the new tokens stand: `positions` (B,); all rows see slots `first:stop`, or less by `mask` (B, 1,
    1, S).

    `slot` is the position where all rows are at the same, else None.
    """

    positions: Tensor
    slot: int | None
    first: int
    stop: int
    mask: Tensor | None = None


class FusedStep:
    """A `DecodingStep`; only for models that `is_fusible` allows."""

    def __init__(self, model: Transformer, compile: bool = False) -> None:
        self.model = model
        self.blocks = [FusedBlock(block) for block in model.blocks if isinstance(block, Block)]
        self._compiled = (
            torch.compile(self._single_row, fullgraph=True, options={"cpp_wrapper": True})
            if compile
            else None
        )

    def __call__(self, ids: Sequence[int], positions: Sequence[int], cache: KVCache) -> Tensor:
        """See `DecodingStep`."""
        weight, window = self.model.wte.weight, self.model.config.sliding_window
        inputs = torch.tensor(ids, device=weight.device)
        places = torch.tensor(positions, device=weight.device)
        stop = max(positions) + 1
        if len(set(positions)) > 1:
            mask = cache_mask(0, stop, places[:, None], window, weight.device, weight.dtype)
            return self.run(
                inputs, Here(places, None, 0, stop, mask), cache.layers, product_of(weight, len(ids))
            )
        first = 0 if window is None else max(0, stop - window)
        if self._compiled is not None and len(ids) == 1:
            return self._run_compiled(inputs, first, stop, cache)
        return self.run(
            inputs, Here(places, stop - 1, first, stop), cache.layers, product_of(weight, len(ids))
        )

    def run(self, ids: Tensor, here: Here, layers: Sequence[LayerCache], product: Product) -> Tensor:
        """ids (B,) → hidden states (B, C)."""
        model = self.model
        x = model.wte(ids)  # (B, C)
        if model.wpe is not None:
            x = x + model.wpe(here.positions)
        rotary = None
        if model.rotary is not None:
            rotary = (
                model.rotary.cos[here.positions][:, None],
                model.rotary.sin[here.positions][:, None],
            )  # (B, 1, D)
        for block, layer in zip(self.blocks, layers, strict=True):
            x = block(x, rotary, here, layer, product)
        hidden: Tensor = model.ln_f(x)
        return hidden

    def _run_compiled(self, ids: Tensor, first: int, stop: int, cache: KVCache) -> Tensor:
        """One graph for every length: what grows is marked, since Inductor's code is the better the more of a
        shape it knows.
        """
        assert self._compiled is not None
        seen = torch.arange(stop, device=ids.device)
        torch._dynamo.mark_dynamic(seen, 0)
        for layer in cache.layers:
            torch._dynamo.mark_dynamic(layer.keys, 2)
            torch._dynamo.mark_dynamic(layer.values, 2)
        hidden: Tensor = self._compiled(ids, seen, first, cache.layers)
        return hidden

    def _single_row(self, ids: Tensor, seen: Tensor, first: int, layers: list[LayerCache]) -> Tensor:
        product = F.linear if layers[0].keys.dtype == torch.float32 else multiply_vector
        return self.run(ids, Here(seen[-1:], None, first, seen.size(0)), layers, product)


class FusedBlock:
    """A block of the model, with its projections fused."""

    def __init__(self, block: Block) -> None:
        self.block = block
        attention, mlp = block.attn, block.mlp
        self.qkv_weight, self.qkv_bias = fuse([attention.q_proj, attention.k_proj, attention.v_proj])
        self.in_weight, self.in_bias = fuse(
            [mlp.up_proj] if mlp.gate_proj is None else [mlp.gate_proj, mlp.up_proj]
        )

    def __call__(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, here: Here, layer: LayerCache, product: Product
    ) -> Tensor:
        """x (B, C) → (B, C)."""
        block = self.block
        if block.pre_norm:
            x = x + self._attend(block.ln_1(x), rotary, here, layer, product)
            return x + self._transform(block.ln_2(x), product)
        x = block.ln_1(x + self._attend(x, rotary, here, layer, product))
        x = block.ln_2(x + self._transform(x, product))
        return x

    def _attend(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, here: Here, layer: LayerCache, product: Product
    ) -> Tensor:
        attention = self.block.attn
        width, kv_heads = attention.head_width, layer.keys.size(1)
        qkv = product(x, self.qkv_weight, self.qkv_bias).view(x.size(0), -1, width)  # (B, H + 2 KV, D)
        heads = qkv.size(1) - 2 * kv_heads
        if attention.q_norm is not None and attention.k_norm is not None:
            qk = torch.cat(
                (attention.q_norm(qkv[:, :heads]), attention.k_norm(qkv[:, heads:-kv_heads])), dim=1
            )
        else:
            qk = qkv[:, :-kv_heads]
        if rotary is not None:
            qk = rotate(qk, *rotary)
        keys, values = store(layer, qk[:, heads:], qkv[:, -kv_heads:], here)
        # The query heads that share a key-value head are its rows.
        y = F.scaled_dot_product_attention(
            qk[:, :heads].view(x.size(0), kv_heads, -1, width), keys, values, attn_mask=here.mask
        )
        return product(y.reshape(x.size(0), -1), attention.o_proj.weight, attention.o_proj.bias)

    def _transform(self, x: Tensor, product: Product) -> Tensor:
        mlp = self.block.mlp
        inner = product(x, self.in_weight, self.in_bias)
        if mlp.gate_proj is not None:
            gate, up = inner.chunk(2, dim=-1)
            inner = mlp.activation(gate) * up
        else:
            inner = mlp.activation(inner)
        return product(inner, mlp.down_proj.weight, mlp.down_proj.bias)


def store(layer: LayerCache, keys: Tensor, values: Tensor, here: Here) -> tuple[Tensor, Tensor]:
    """Write keys and values (B, KV, D) of the new tokens; return all that may be seen, (B, KV, S, D)."""
    if here.slot is not None:
        layer.keys[:, :, here.slot] = keys
        layer.values[:, :, here.slot] = values
    else:
        rows = torch.arange(keys.size(0), device=keys.device)
        layer.keys[rows, :, here.positions] = keys
        layer.values[rows, :, here.positions] = values
    return layer.keys[:, :, here.first : here.stop], layer.values[:, :, here.first : here.stop]


@torch.inference_mode(False)  # what the model trains on must not become inference tensors
@torch.no_grad()
def fuse(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """One weight (sum of outs, in) and bias for maps of one input; the maps' own become views of them.

    In fp32 on a CPU the weight lies in memory by columns: with more rows than columns, MKL reads it a tenth
    faster so.
    """
    first = linears[0].weight
    rows = sum(linear.out_features for linear in linears)
    by_columns = first.device.type == "cpu" and first.dtype == torch.float32 and rows > first.size(1)
    if len(linears) == 1 and not by_columns:
        return first, linears[0].bias
    weight = first.new_empty(first.size(1), rows).t() if by_columns else first.new_empty(rows, first.size(1))
    torch.cat([linear.weight for linear in linears], out=weight)
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    start = 0
    for linear in linears:
        stop = start + linear.out_features
        linear.weight.data = weight[start:stop]
        if bias is not None:
            linear.bias.data = bias[start:stop]
        start = stop
    return weight, bias


def is_fusible(model: Transformer) -> bool:
    """Whether every part is the plain one that `FusedStep` knows: no adapter, no quantised or wrapped layer,
    weights in the open.
    """
    plain = all(
        isinstance(block, Block) and type(block.attn) is Attention and type(block.mlp) is MLP
        for block in model.blocks
    )
    plain = plain and not (model.config.use_adapter_modules or model.config.use_domain_adaptation)
    return plain and all(
        type(module) is Linear for name, module in model.named_modules() if name.endswith("_proj")
    )
