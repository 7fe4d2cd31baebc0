"""Four-bit matrices under adapters: NormalFloat in blocks of 64 (QLoRA, Dettmers et al. 2023,
arXiv:2305.14314), frozen.

The tensors and their products are torchao's `NF4Tensor`: a parameter of the model under its own name, which
is dequantized for each product. Only the scales are chosen here and not by torchao. Torchao subtracts their
mean and rounds them to 8 bits, so that a dequantized matrix, quantized again, differs a little. Here the
scales of a group are 7 bits times a power of two, and quantizing a dequantized matrix again gives it back
bit-exactly. So a checkpoint stores the matrices as plain floats, which everybody can open, and a resumed run
has exactly the matrices that it had. The rounding of the scales (0.4 % of a scale) is small against that of
the weights (a tenth).
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
from llm_trainer.model.base import TransformerBase
from llm_trainer.model.layers import Linear
from llm_trainer.model.module_names import PROJECTIONS

if TYPE_CHECKING:
    from torchao.quantization import NF4Tensor
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import SubclassTensorArgs

BLOCK = 64  # weights with one scale
_SCALES = 256  # scales with one power of two; fewer where the matrix is small
_LEAST_EXPONENT = -100  # of a group's largest weight; smaller weights are zero
_CHUNK = 2**20  # weights whose nearest codes are searched for at once


class NF4Linear(Linear):
    """A linear map whose matrix has four bits per weight."""

    def __init__(self, base: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.training = base.training

    def forward(self, input: Tensor) -> Tensor:  # torch's name
        """(…, in) → (…, out)."""
        return nf4_linear(input, self.weight, self.bias)


def quantize_base(model: TransformerBase) -> None:
    """Quantize the matrices of attention and MLP in place; embedding, head, norms and adapters stay as they
    are.

    Raises:
        UsageError: A matrix is trained or is not a multiple of 64 weights, or torchao is not installed.
    """
    check_quantizable(model)
    for part, name, linear, _ in _base_matrices(model):
        linear.weight = nn.Parameter(quantize_nf4(linear.weight.detach()), requires_grad=False)
        if type(linear) is Linear:
            setattr(part, name, NF4Linear(linear))


def check_quantizable(model: TransformerBase) -> None:
    """Check that the matrices of attention and MLP can be quantized.

    Raises:
        UsageError: A matrix is trained, or is not a multiple of 64 weights.
    """
    for _, _, linear, title in _base_matrices(model):
        if linear.weight.requires_grad:
            raise UsageError(
                f"quantize_base needs frozen weights, but {title} is trained; train adapters over pretrained "
                "weights (--init_from gpt2 --attn_lora_rank 8), without lora_train_base"
            )
        if linear.weight.numel() % BLOCK:
            raise UsageError(
                f"quantize_base needs blocks of {BLOCK} weights, and {title} has {linear.weight.numel()}; "
                "set quantize_base to off"
            )


def bytes_saved(model: TransformerBase) -> int:
    """How many bytes the model would need less with a quantized base: half a byte per weight and the scales
    instead of the weights' own type.
    """
    sizes = [
        (linear.weight.numel(), linear.weight.element_size()) for _, _, linear, _ in _base_matrices(model)
    ]
    return sum(count * size - count // 2 - count // BLOCK for count, size in sizes)


def _base_matrices(model: TransformerBase) -> Iterator[tuple[nn.Module, str, Linear, str]]:
    """Each matrix of attention and MLP: the module that has it, its attribute there, itself, and its name for
    messages.
    """
    for number, block in enumerate(model.blocks):
        for kind, names in PROJECTIONS.items():
            part = block.get_submodule(kind)
            for name in names:
                linear = getattr(part, name, None)
                if linear is not None:
                    yield part, name, linear, f"{kind}.{number}.{name}"


def quantize_nf4(weight: Tensor) -> NF4Tensor:
    """Quantize a matrix to four bits per weight.

    Args:
        weight: A matrix of floats with a multiple of 64 elements.

    Returns:
        The quantized tensor; `dequantize` of it, quantized again, gives it back bit-exactly.

    Raises:
        UsageError: torchao is not installed.
    """
    NF4, TensorArguments = _torchao()
    levels = NF4.from_tensor(torch.zeros(BLOCK, device=weight.device), BLOCK, 1).nf4
    blocks = weight.detach().float().reshape(-1, BLOCK)
    group = math.gcd(len(blocks), _SCALES)
    scales, factors = _scales(blocks.abs().amax(dim=1), group)
    block_scale = (scales.view(-1, group) / factors[:, None]).view(-1, 1)
    scaled = torch.where(block_scale > 0, blocks / block_scale, torch.zeros(())).flatten()
    codes = torch.cat(
        [NF4.quantize_tensor_nearest(part, levels).to(torch.uint8) for part in torch.split(scaled, _CHUNK)]
    )
    arguments = TensorArguments(weight.shape, weight.stride(), 0, torch.float32, weight.device, False)
    mean = torch.zeros((), device=weight.device)
    packed = codes[::2] << 4 | codes[1::2]
    return NF4(arguments, BLOCK, len(blocks), group, scales.to(torch.int8), factors, mean, packed, levels)


def _torchao() -> tuple[type[NF4Tensor], type[SubclassTensorArgs]]:
    """Torchao's tensor and the description that it takes, without the warnings about kernels for other
    machines.
    """
    logger = logging.getLogger("torchao")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from torchao.quantization import NF4Tensor
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import SubclassTensorArgs
    except ImportError as error:
        raise UsageError(
            "quantize_base needs the extra 'quantize': pip install 'llm-trainer[quantize]', or set "
            "quantize_base to off"
        ) from error
    finally:
        logger.setLevel(level)
    return NF4Tensor, SubclassTensorArgs


def _scales(largest: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Scales 0 … 127 of blocks with these largest weights, and for each group the power of two that divides
    them.

    A scale is rounded down where rounding up would bring the largest weight nearer to another level than to
    the outermost, because then the same scale would not be found again.
    """
    exponents = torch.frexp(largest.view(-1, group).amax(dim=1)).exponent.clamp(min=_LEAST_EXPONENT)
    factors = torch.ldexp(torch.ones(len(exponents), device=largest.device), 7 - exponents)
    exact = largest.view(-1, group) * factors[:, None]
    return torch.where(exact >= 4, exact.round(), exact.floor()).clamp(max=127).flatten(), factors


def is_quantized(tensor: Tensor) -> bool:
    """Whether a tensor has four bits per weight."""
    return hasattr(tensor, "get_original_weight")


def dequantize(tensor: Tensor) -> Tensor:
    """The floats of a quantized tensor; any other tensor as it is."""
    return cast("NF4Tensor", tensor).get_original_weight() if is_quantized(tensor) else tensor


@torch.no_grad()
def copy_into(parameter: Tensor, values: Tensor) -> None:
    """Copy floats into a parameter, and quantize them if the parameter is quantized."""
    parameter.copy_(quantize_nf4(values.to(parameter.device)) if is_quantized(parameter) else values)


def nf4_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x·Wᵀ + bias for a matrix that may be quantized.

    Args:
        x: (…, in).
        weight: (out, in).
        bias: (out,), or None.

    Returns:
        (…, out), in the type of the product without the bias.
    """
    if not is_quantized(weight):
        return F.linear(x, weight, bias)
    y = F.linear(x, weight)
    return y if bias is None else y + bias.to(y.dtype)
