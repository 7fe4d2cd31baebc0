"""The decoding step with fewer and larger operations, eager or compiled.

What: query, key and value are one product, gate and up another, and no tensor has a time axis. The fused
matrices share memory with the model's own, which become views of them: the model loses nothing, and no byte
is held twice. In fp32 on a CPU, matrices with more rows than columns are stored by columns.

Why: one row's step is about half as many operations; a token takes 6.3 ms in fp32 and 4.8 ms in bf16, of
which reading the weights is 3.9 and 2.5 (56 M parameters, two cores). Storing by columns takes 3.4 instead of
3.8 ms for all matrices but the head. Compiled (for a single row), Inductor turns the operations between the
products into C++ and calls the products as they are, which takes 5.2 and 3.8 ms per token. Compiling takes
some seconds, once for all lengths, so it pays for many thousand tokens only. The figures are in
docs/explanation/decisions.md.

Check: tests/inference/cpu/test_fused_decoder.py compares it with `EagerModelRunner` for every supported
shape, eager, in bf16 and compiled. Switch: LLM_TRAINER_CPU_DECODER=0 (see the package's docstring).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_trainer.inference.cpu.matvec import LinearFunction, matvec, select_linear
from llm_trainer.model.kv_cache import KVCache, LayerCache
from llm_trainer.model.layers import Linear
from llm_trainer.model.positional import cache_mask, rotate
from llm_trainer.model.transformer import MLP, Attention, Block, Transformer
from llm_trainer.torch_compat import mark_dynamic


@dataclass(frozen=True)
class StepPosition:
    """Where the new tokens go: `positions` (B,); all rows see slots `first:stop`, or fewer by `mask` (B, 1,
    1, S).

    `slot` is the position where all rows are at the same one, else None.
    """

    positions: Tensor
    slot: int | None
    first: int
    stop: int
    mask: Tensor | None = None


class FusedDecoder:
    """A `ModelRunner` for models that `can_fuse` accepts."""

    def __init__(self, model: Transformer, compile: bool = False) -> None:
        """Fuse the model's matrices; its own become views of the fused ones.

        Args:
            model: The network.
            compile: Compile the step of a single row, at its first call.
        """
        self.model = model
        self.blocks = [FusedBlock(block) for block in model.blocks if isinstance(block, Block)]
        self._compiled = (
            torch.compile(self._single_row, fullgraph=True, options={"cpp_wrapper": True})
            if compile
            else None
        )

    def __call__(self, ids: Sequence[int], positions: Sequence[int], cache: KVCache) -> Tensor:
        """See `ModelRunner`."""
        weight, window = self.model.wte.weight, self.model.config.sliding_window
        inputs = torch.tensor(ids, device=weight.device)
        slots = torch.tensor(positions, device=weight.device)
        stop = max(positions) + 1
        linear = select_linear(weight, len(ids))
        if len(set(positions)) > 1:
            mask = cache_mask(0, stop, slots[:, None], window, weight.device, weight.dtype)
            return self.run(inputs, StepPosition(slots, None, 0, stop, mask), cache.layers, linear)
        first = 0 if window is None else max(0, stop - window)
        if self._compiled is not None and len(ids) == 1:
            return self._run_compiled(inputs, first, stop, cache)
        return self.run(inputs, StepPosition(slots, stop - 1, first, stop), cache.layers, linear)

    def run(
        self, ids: Tensor, position: StepPosition, layers: Sequence[LayerCache], linear: LinearFunction
    ) -> Tensor:
        """Run one step on tensors.

        Args:
            ids: The last token of each row, (B,).
            position: Where they go.
            layers: The cache of each block.
            linear: The product with a matrix.

        Returns:
            Hidden states after the last norm, (B, C).
        """
        model = self.model
        x = model.wte(ids)  # (B, C)
        if model.wpe is not None:
            x = x + model.wpe(position.positions)
        rotary = None
        if model.rotary is not None:
            # (B, 1, D) each
            rotary = (
                model.rotary.cos[position.positions][:, None],
                model.rotary.sin[position.positions][:, None],
            )
        for block, layer in zip(self.blocks, layers, strict=True):
            x = block(x, rotary, position, layer, linear)
        hidden: Tensor = model.ln_f(x)
        return hidden

    def _run_compiled(self, ids: Tensor, first: int, stop: int, cache: KVCache) -> Tensor:
        """One graph for all lengths: only the dimensions that grow are marked dynamic, because Inductor's
        code is better the more of a shape it knows.
        """
        assert self._compiled is not None
        seen = torch.arange(stop, device=ids.device)
        mark_dynamic(seen, 0)
        for layer in cache.layers:
            mark_dynamic(layer.keys, 2)
            mark_dynamic(layer.values, 2)
        hidden: Tensor = self._compiled(ids, seen, first, cache.layers)
        return hidden

    def _single_row(self, ids: Tensor, seen: Tensor, first: int, layers: list[LayerCache]) -> Tensor:
        linear = F.linear if layers[0].keys.dtype == torch.float32 else matvec
        return self.run(ids, StepPosition(seen[-1:], None, first, seen.size(0)), layers, linear)


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
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        position: StepPosition,
        layer: LayerCache,
        linear: LinearFunction,
    ) -> Tensor:
        """x (B, C) → (B, C)."""
        block = self.block
        if block.pre_norm:
            x = x + self._attend(block.ln_1(x), rotary, position, layer, linear)
            return x + self._mlp(block.ln_2(x), linear)
        x = block.ln_1(x + self._attend(x, rotary, position, layer, linear))
        x = block.ln_2(x + self._mlp(x, linear))
        return x

    def _attend(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        position: StepPosition,
        layer: LayerCache,
        linear: LinearFunction,
    ) -> Tensor:
        attention = self.block.attn
        width, kv_heads = attention.head_width, layer.keys.size(1)
        qkv = linear(x, self.qkv_weight, self.qkv_bias).view(x.size(0), -1, width)  # (B, H + 2 KV, D)
        heads = qkv.size(1) - 2 * kv_heads
        if attention.q_norm is not None and attention.k_norm is not None:
            q, k = attention.q_norm(qkv[:, :heads]), attention.k_norm(qkv[:, heads:-kv_heads])
            qk = torch.cat((q, k), dim=1)
        else:
            qk = qkv[:, :-kv_heads]
        if rotary is not None:
            qk = rotate(qk, *rotary)
        keys, values = _store(layer, qk[:, heads:], qkv[:, -kv_heads:], position)
        # The query heads of one key-value head are its rows.
        y = F.scaled_dot_product_attention(
            qk[:, :heads].view(x.size(0), kv_heads, -1, width), keys, values, attn_mask=position.mask
        )
        return linear(y.reshape(x.size(0), -1), attention.o_proj.weight, attention.o_proj.bias)

    def _mlp(self, x: Tensor, linear: LinearFunction) -> Tensor:
        mlp = self.block.mlp
        inner = linear(x, self.in_weight, self.in_bias)
        if mlp.gate_proj is not None:
            gate, up = inner.chunk(2, dim=-1)
            inner = mlp.activation(gate) * up
        else:
            inner = mlp.activation(inner)
        return linear(inner, mlp.down_proj.weight, mlp.down_proj.bias)


def _store(layer: LayerCache, keys: Tensor, values: Tensor, position: StepPosition) -> tuple[Tensor, Tensor]:
    """Write keys and values (B, KV, D) of the new tokens; return all that may be seen, (B, KV, S, D)."""
    if position.slot is not None:
        layer.keys[:, :, position.slot] = keys
        layer.values[:, :, position.slot] = values
    else:
        rows = torch.arange(keys.size(0), device=keys.device)
        layer.keys[rows, :, position.positions] = keys
        layer.values[rows, :, position.positions] = values
    visible = slice(position.first, position.stop)
    return layer.keys[:, :, visible], layer.values[:, :, visible]


@torch.inference_mode(False)  # what the model trains on must not become inference tensors
@torch.no_grad()
def fuse(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Concatenate the weights of maps of one input; the maps' own weights become views of the result.

    In fp32 on a CPU, a weight with more rows than columns is stored by columns, which MKL reads a tenth
    faster.

    Args:
        linears: Maps from the same features; all have a bias, or none has.

    Returns:
        The weight, (sum of outs, in), and the bias, (sum of outs,), or None.
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


def can_fuse(model: Transformer) -> bool:
    """Whether every part is a plain one that `FusedDecoder` knows: no adapter, and no quantized or wrapped
    layer.
    """
    plain = all(
        isinstance(block, Block) and type(block.attn) is Attention and type(block.mlp) is MLP
        for block in model.blocks
    )
    plain = plain and not (model.config.use_adapter_modules or model.config.use_domain_adaptation)
    return plain and all(
        type(module) is Linear for name, module in model.named_modules() if name.endswith("_proj")
    )
