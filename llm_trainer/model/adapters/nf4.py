"""Matrices of four bits under adapters: NormalFloat in blocks of 64 (QLoRA, Dettmers et al. 2023,
arXiv:2305.14314), frozen.

Tensors and products are torchao's `NF4Tensor`: a parameter of the model under its own name, which is made
whole for each product. Only the scales are chosen here and not by torchao. It subtracts their mean and rounds
them to 8 bits; quantised again, what came out of that differs a little. Here a group's scales are 7 bits
times a power of two, and what has been quantised once is left as it is to the last bit. So a checkpoint holds
the matrices whole, as plain weights that everybody can open, and a run that goes on from it has the very
matrices that it had. The scales' rounding (0.4 % of a scale) is lost in that of the weights (a tenth).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_trainer.errors import UsageError
from llm_trainer.model.transformer import Linear, Transformer

if TYPE_CHECKING:
    from torchao.quantization import NF4Tensor
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import SubclassTensorArgs

BLOCK = 64  # weights that share a scale
_SCALES = 256  # scales that share a power of two, or fewer where the matrix is small
_LEAST_EXPONENT = -100  # of a group's largest weight; smaller ones are zero
_CHUNK = 2**20  # weights whose nearest codes are looked for at once


class QuantizedLinear(Linear):
    """A linear map whose matrix is in four bits."""

    def __init__(self, base: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.training = base.training

    def forward(self, input: Tensor) -> Tensor:  # torch's name
        """(…, in) → (…, out)."""
        return product(input, self.weight, self.bias)


def quantize_blocks(model: Transformer) -> None:
    """Quantise the matrices of attention and MLP, in place; embedding, head, norms and adapters stay as they
    are.

    Raises UsageError for a matrix that is to be trained or is not made of blocks of 64, and where torchao is
    missing.
    """
    check_base(model)
    for part, name, linear, _ in _base_matrices(model):
        linear.weight = nn.Parameter(quantized(linear.weight.detach()), requires_grad=False)
        if type(linear) is Linear:
            setattr(part, name, QuantizedLinear(linear))


def check_base(model: Transformer) -> None:
    """Raises UsageError for a matrix of attention or MLP that is to be trained or is not made of blocks of
    64.
    """
    for _, _, linear, title in _base_matrices(model):
        if linear.weight.requires_grad:
            raise UsageError(
                f"quantize_base needs weights that are not trained, and {title} is; train adapters over pretrained "
                "weights (--init_from gpt2 --attn_lora_rank 8), without lora_train_base"
            )
        if linear.weight.numel() % BLOCK:
            raise UsageError(
                f"quantize_base takes blocks of {BLOCK} weights, and {title} has {linear.weight.numel()}; leave it off"
            )


def bytes_saved(model: Transformer) -> int:
    """How much less the model would hold with its base in four bits: half a byte a weight instead of its own,
    and the scales.
    """
    sizes = [
        (linear.weight.numel(), linear.weight.element_size()) for _, _, linear, _ in _base_matrices(model)
    ]
    return sum(count * size - count // 2 - count // BLOCK for count, size in sizes)


def _base_matrices(model: Transformer) -> Iterator[tuple[nn.Module, str, Linear, str]]:
    """Each matrix of attention and MLP: the module that holds it, its name there, itself, and what to call
    it.
    """
    from llm_trainer.model.adapters.lora import PROJECTIONS

    for number, block in enumerate(model.blocks):
        for kind, names in PROJECTIONS.items():
            part = block.get_submodule(kind)
            for name in names:
                linear = getattr(part, name, None)
                if linear is not None:
                    yield part, name, linear, f"{kind}.{number}.{name}"


def quantized(weight: Tensor) -> NF4Tensor:
    """A matrix of floats in four bits a weight; what `dequantized` gives of one stays the same to the bit.

    Raises UsageError without torchao.
    """
    FourBits, Described = _torchao()
    levels = FourBits.from_tensor(torch.zeros(BLOCK, device=weight.device), BLOCK, 1).nf4
    blocks = weight.detach().float().reshape(-1, BLOCK)
    group = math.gcd(len(blocks), _SCALES)
    scales, factors = _scales(blocks.abs().amax(dim=1), group)
    spread = (scales.view(-1, group) / factors[:, None]).view(-1, 1)
    scaled = torch.where(spread > 0, blocks / spread, torch.zeros(())).flatten()
    codes = torch.cat(
        [
            FourBits.quantize_tensor_nearest(part, levels).to(torch.uint8)
            for part in torch.split(scaled, _CHUNK)
        ]
    )
    described = Described(weight.shape, weight.stride(), 0, torch.float32, weight.device, False)
    mean = torch.zeros((), device=weight.device)
    packed = codes[::2] << 4 | codes[1::2]
    return FourBits(
        described, BLOCK, len(blocks), group, scales.to(torch.int8), factors, mean, packed, levels
    )


def _torchao() -> tuple[type[NF4Tensor], type[SubclassTensorArgs]]:
    """Its tensor, and what describes one; without its warnings of kernels for other machines, which nothing
    here uses.
    """
    logger = logging.getLogger("torchao")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from torchao.quantization import NF4Tensor
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import SubclassTensorArgs
    except ImportError as error:
        raise UsageError(
            "quantize_base needs the extra 'quantize': pip install 'llm-trainer[quantize]', or leave quantize_base off"
        ) from error
    finally:
        logger.setLevel(level)
    return NF4Tensor, SubclassTensorArgs


def _scales(largest: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Scales 0 … 127 of blocks with these largest weights, and for each group the power of two by which they
    are divided.

    A scale is rounded down where rounding up would leave the largest weight nearer to another level than to
    the outermost: then the scale would not be found again.
    """
    exponents = torch.frexp(largest.view(-1, group).amax(dim=1)).exponent.clamp(min=_LEAST_EXPONENT)
    factors = torch.ldexp(torch.ones(len(exponents), device=largest.device), 7 - exponents)
    exact = largest.view(-1, group) * factors[:, None]
    return torch.where(exact >= 4, exact.round(), exact.floor()).clamp(max=127).flatten(), factors


def is_quantized(tensor: Tensor) -> bool:
    """Whether a tensor is in four bits."""
    return hasattr(tensor, "get_original_weight")


def dequantized(tensor: Tensor) -> Tensor:
    """The floats of a tensor in four bits; itself where it is none."""
    return cast("NF4Tensor", tensor).get_original_weight() if is_quantized(tensor) else tensor


@torch.no_grad()
def fill(parameter: Tensor, values: Tensor) -> None:
    """Put values into a parameter, quantised where it is."""
    parameter.copy_(quantized(values.to(parameter.device)) if is_quantized(parameter) else values)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x·Wᵀ + bias, (…, in) → (…, out), in the type of the product without the bias."""
    if not is_quantized(weight):
        return F.linear(x, weight, bias)
    y = F.linear(x, weight)
    return y if bias is None else y + bias.to(y.dtype)
