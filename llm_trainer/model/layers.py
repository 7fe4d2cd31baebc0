"""The layers that every part of a transformer is made of: linear map, embedding and norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.model.norms import RMSNorm
from llm_trainer.torch_compat import has_forward_hooks


class Linear(nn.Linear):
    """A linear map without default initialization, which `Transformer.initialize` would only overwrite.

    (`nn.utils.skip_init` does the same through the meta device, where drawing numbers imports torch._dynamo:
    1.4 s of a program's start.)
    """

    def reset_parameters(self) -> None:
        """Leave the weights as allocated."""

    def apply_adapters(self, x: Tensor, y: Tensor) -> Tensor:
        """The output of this map, given the output of its matrix alone.

        Without adapters the two are the same; `adapters.lora_layers.LoraLinear` adds its adapters.

        Args:
            x: The input, (…, in).
            y: What the matrix and the bias give for `x`, (…, out).

        Returns:
            The output, (…, out).
        """
        return y

    def effective_weight(self) -> Tensor:
        """The matrix (out, in) that computes what the map does without dropout."""
        return self.weight


class Embedding(nn.Embedding):
    """An embedding without default initialization; see `Linear`."""

    def reset_parameters(self) -> None:
        """Leave the weights as allocated."""


def fused_linears(x: Tensor, linears: Sequence[nn.Linear]) -> Sequence[Tensor]:
    """Several linear maps of one input.

    In training they are computed as one product with their weights concatenated: products of a hundred
    features cost more for being called than for their arithmetic. Low-rank adapters then add to each map's
    part of the result. The maps are called one by one where a map is more than its matrix (it has a hook, or
    its weight is sharded), and without gradients, where a single token would pay for concatenating the
    weights.

    Args:
        x: The input, (…, in).
        linears: Maps from `in` features; all have a bias, or none has.

    Returns:
        The output of each map, (…, out).
    """
    if not (torch.is_grad_enabled() and all(map(_is_plain, linears))):
        return [linear(x) for linear in linears]
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    fused = F.linear(x, torch.cat([linear.weight for linear in linears]), bias)
    outputs = torch.split(fused, [linear.out_features for linear in linears], dim=-1)
    return [
        linear.apply_adapters(x, y) if isinstance(linear, Linear) else y
        for linear, y in zip(linears, outputs, strict=True)
    ]


def _is_plain(linear: nn.Linear) -> bool:
    return (
        isinstance(linear, Linear) and type(linear.weight) is nn.Parameter and not has_forward_hooks(linear)
    )


def make_norm(config: ModelConfig) -> nn.Module:
    """LayerNorm or RMSNorm over C features, by the setting `norm`."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.hidden_size, config.norm_epsilon)
    bias = config.bias if config.norm_bias is None else config.norm_bias
    return nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon, bias=bias)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type that matrix products of `x` have: autocast's where it is on, else the type of `x`.

    Tables and masks take this type, so that they do not pull attention back to fp32.
    """
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
