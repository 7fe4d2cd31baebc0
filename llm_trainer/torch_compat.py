"""The private parts of PyTorch that this package uses, all in one module.

PyTorch gives no promise for names that begin with an underscore. Everything that leans on such a name is
wrapped here, so that a new torch release is checked by reading one file and by running
`tests/test_torch_compat.py`, which names the part that is gone. Each docstring names the part, why no public
one serves, and the torch release that introduced it. Where that release is not known, the docstring gives the
one in which the part was checked.

The module is at the bottom of the package and imports nothing of it. Slow imports (Dynamo takes more than a
second) wait inside the functions that need them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "TorchDispatchMode",
    "compiler_exceptions",
    "fake_tensor_mode",
    "foreach_lerp",
    "foreach_lerp_",
    "foreach_mul_",
    "fused_attention_ops",
    "has_forward_hooks",
    "int8_linear",
    "item_op",
    "layer_norm_backward",
    "local_shard_offsets",
    "mark_dynamic",
    "pack_int8_weight",
    "strip_wrapper_names",
    "tree_leaves",
    "wrapped_module",
]

# `TorchDispatchMode` (torch.utils._python_dispatch, since torch 1.13) sees every operation after autograd.
# The memory estimator derives from it to note which tensors are alive. Its public relative,
# TorchFunctionMode, sees calls before autograd and so misses the backward pass.

_WRAPPER_NAMES = re.compile(r"(^|(?<=\.))(_orig_mod|module|_checkpoint_wrapped_module)\.")


def mark_dynamic(tensor: Tensor, dimension: int) -> None:
    """Compile for any size of one dimension of a tensor.

    Uses `torch._dynamo.mark_dynamic` (since torch 2.1). The public `dynamic=True` of `torch.compile` makes
    every dimension dynamic, which gives slower code.

    Args:
        tensor: An input of a compiled function.
        dimension: The dimension whose size changes between calls.
    """
    import torch._dynamo

    torch._dynamo.mark_dynamic(tensor, dimension)


def compiler_exceptions() -> tuple[type[Exception], ...]:
    """Exceptions that `torch.compile` raises where it cannot compile.

    Uses `torch._dynamo.exc.TorchDynamoException` (since torch 2.0), the base class of the errors of Dynamo
    and of Inductor. Without it, every RuntimeError of the model would pass for a failed compilation.

    Returns:
        The classes, for an `except` clause.
    """
    from torch._dynamo.exc import TorchDynamoException

    return (TorchDynamoException,)


def fake_tensor_mode() -> AbstractContextManager[Any]:
    """A context in which tensors have a shape, a type and a lifetime but no memory.

    Uses `torch._subclasses.fake_tensor.FakeTensorMode` (since torch 1.13). The public meta device has no
    memory either, but it forgets on which device a tensor would be and so takes other kernels.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def tree_leaves(tree: object) -> list[Any]:
    """The leaves of nested lists, tuples and dictionaries.

    Uses `torch.utils._pytree.tree_leaves` (since torch 2.2), which knows the result types of torch's
    operations.
    """
    return _pytree.tree_leaves(tree)


def item_op() -> Any:
    """The operation behind `Tensor.item()`.

    Uses `aten::_local_scalar_dense` (since torch 1.0), which is what a TorchDispatchMode sees of `item()`.
    """
    return torch.ops.aten._local_scalar_dense.default


def fused_attention_ops() -> frozenset[Any]:
    """The kernels that `scaled_dot_product_attention` dispatches to.

    Uses `aten::_scaled_dot_product_flash_attention` and `…_efficient_attention` (since torch 2.0),
    `…_flash_attention_for_cpu` (since torch 2.2) and `…_cudnn_attention` (since torch 2.4). Selective
    activation checkpointing decides by the operation that runs, and these have no public names.
    """
    aten = torch.ops.aten
    return frozenset(
        {
            aten._scaled_dot_product_flash_attention_for_cpu.default,
            aten._scaled_dot_product_flash_attention.default,
            aten._scaled_dot_product_efficient_attention.default,
            aten._scaled_dot_product_cudnn_attention.default,
        }
    )


def layer_norm_backward(
    gradient: Tensor, x: Tensor, mean: Tensor, inverse_deviation: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The fused backward pass of LayerNorm over the last dimension, without a bias.

    Uses `aten::native_layer_norm_backward` (since torch 1.5). RMSNorm's backward pass is built on it
    (`model/norms.py`); autograd offers the kernel to LayerNorm alone.

    Args:
        gradient: Gradient of the output, (…, C).
        x: The input, (…, C).
        mean: Mean of each row, (…, 1).
        inverse_deviation: One over the standard deviation of each row, (…, 1).
        weight: The norm's weight, (C,).

    Returns:
        Gradients of the input, (…, C), and of the weight, (C,).
    """
    wanted = [True, True, False]
    for_x, for_weight, _ = torch.ops.aten.native_layer_norm_backward(
        gradient, x, [x.size(-1)], mean, inverse_deviation, weight, None, wanted
    )
    return for_x, for_weight


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its `forward`.

    Uses `nn.Module._forward_hooks` and `_forward_pre_hooks` (in every torch release). There is no public way
    to ask whether hooks are registered.
    """
    return bool(module._forward_hooks or module._forward_pre_hooks)


def wrapped_module(module: nn.Module) -> nn.Module | None:
    """The module inside a wrapper of `torch.compile`, DistributedDataParallel or DeepSpeed, or None.

    Uses `OptimizedModule._orig_mod` (since torch 2.0). DDP's and DeepSpeed's `module` is public.
    """
    inner = getattr(module, "_orig_mod", getattr(module, "module", None))
    return inner if isinstance(inner, nn.Module) else None


def strip_wrapper_names(name: str) -> str:
    """A parameter's own name, without the names that wrappers put before or into it.

    Uses the attribute names `_orig_mod` (torch.compile, since torch 2.0) and `_checkpoint_wrapped_module`
    (checkpoint_wrapper, since torch 1.12), which end up in `state_dict` keys.
    """
    return _WRAPPER_NAMES.sub("", name)


def foreach_lerp_(tensors: Sequence[Tensor], ends: Sequence[Tensor], weight: float) -> None:
    """Interpolate many tensors in place: `tensors[i] += weight * (ends[i] - tensors[i])`.

    Uses `torch._foreach_lerp_` (since torch 2.1), one call instead of one per tensor. The public optimizers
    use it; there is no public name.
    """
    torch._foreach_lerp_(list(tensors), list(ends), weight)


def foreach_lerp(tensors: Sequence[Tensor], ends: Sequence[Tensor], weight: float) -> list[Tensor]:
    """Interpolate many tensors: `tensors[i] + weight * (ends[i] - tensors[i])`.

    Uses `torch._foreach_lerp` (since torch 2.1); see `foreach_lerp_`.
    """
    return list(torch._foreach_lerp(list(tensors), list(ends), weight))


def foreach_mul_(tensors: Sequence[Tensor], factor: float) -> None:
    """Multiply many tensors in place by one number.

    Uses `torch._foreach_mul_` (since torch 1.9); see `foreach_lerp_`.
    """
    torch._foreach_mul_(list(tensors), factor)


def local_shard_offsets(tensor: Tensor) -> tuple[int, ...]:
    """Where this rank's shard begins in a DTensor.

    Uses `DTensor.__create_chunk_list__` (checked in torch 2.13), the protocol by which
    `torch.distributed.checkpoint` asks a tensor for its shards. The public DTensor methods give the shard but
    not its offset.

    Args:
        tensor: A DTensor with one shard on this rank.

    Returns:
        The first index of the shard in each dimension.
    """
    return tuple(cast("Any", tensor).__create_chunk_list__()[0].offsets)


def pack_int8_weight(weight: Tensor) -> Any:
    """Arrange an int8 matrix (out, in) as oneDNN's products read it.

    Uses `onednn::qlinear_prepack` (since torch 2.1), an operation that only torch's own quantization calls.
    """
    return torch.ops.onednn.qlinear_prepack(weight, None)


def int8_linear(
    x: Tensor, zero_point: int, packed_weight: Any, scales: Tensor, weight_zero_points: Tensor
) -> Tensor:
    """Multiply uint8 rows with an int8 matrix, exactly, in integers.

    Uses `onednn::qlinear_pointwise` (since torch 2.1). The public int8 products quantize the input themselves
    and round the result.

    Args:
        x: Rows (B, in), uint8.
        zero_point: What `x` is above the numbers that it means.
        packed_weight: The matrix (out, in) from `pack_int8_weight`.
        scales: A factor for each row of the matrix, (out,), fp32.
        weight_zero_points: Zero points of the matrix's rows, (out,), int32.

    Returns:
        The products (B, out), fp32.
    """
    result: Tensor = torch.ops.onednn.qlinear_pointwise(
        x,
        1.0,
        zero_point,
        packed_weight,
        scales,
        weight_zero_points,
        None,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )
    return result
