"""Tensor parallelism: each block's matrices are sharded over a group of ranks that read the same samples.

This is the scheme of Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053), applied with torch's own parallel
styles. Query, key, value, up and gate projections are sharded by columns, so that each rank has attention
heads and hidden units of its own. The two output projections are sharded by rows, and their results are
summed. Norms, embeddings and the head are replicated: their inputs are equal on all ranks, so they stay
equal. The exception are the norms of queries and keys, which see only the rank's own heads: their gradients
have to be summed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor, nn

from llm_trainer.config import UsageError
from llm_trainer.model.layers import Linear
from llm_trainer.model.transformer import Transformer

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

_COLUMNWISE = {"attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.up_proj", "mlp.gate_proj"}
_ROWWISE = {"attn.o_proj", "mlp.down_proj"}
_PER_HEAD_NORMS = ("q_norm.weight", "k_norm.weight")


def apply_tensor_parallel(model: Transformer, mesh: DeviceMesh) -> None:
    """Shard the matrices of each block over the tensor group.

    Args:
        model: The model, with the same full weights on all ranks of the group.
        mesh: The tensor group, one-dimensional.

    Raises:
        UsageError: A matrix is not a plain `Linear`, for example because it has an adapter.
    """
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        parallelize_module,
    )

    for number, block in enumerate(model.blocks):
        linears = {name: module for name, module in block.named_modules() if name in _COLUMNWISE | _ROWWISE}
        for name, module in linears.items():
            if type(module) is not Linear:
                raise UsageError(
                    f"tensor_parallel cannot shard {name} of block {number}: it is not a plain linear layer "
                    "(an adapter?); use fsdp instead"
                )
        styles = {name: ColwiseParallel() if name in _COLUMNWISE else RowwiseParallel() for name in linears}
        parallelize_module(block, mesh, styles, src_data_rank=None)  # type: ignore[arg-type]
        # Once for all matrices with the same input, so that its gradient is summed over the ranks once.
        for name, others in (("attn", 4), ("mlp", 0)):
            layouts = (Replicate(), *[None] * others)
            prepare = PrepareModuleInput(input_layouts=layouts, desired_input_layouts=layouts)
            parallelize_module(block.get_submodule(name), mesh, prepare, src_data_rank=None)


def partial_gradient_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the replicated parameters whose gradient on a rank comes from that rank's own heads only.

    Their gradients have to be summed over the tensor group before the update.
    """
    yield from (
        (name, parameter) for name, parameter in model.named_parameters() if name.endswith(_PER_HEAD_NORMS)
    )


def all_reduce_gradient(group: dist.ProcessGroup, gradient: Tensor) -> None:
    """Sum a gradient, or this rank's shard of one, over a group in place. A collective call."""
    import torch.distributed as dist

    dist.all_reduce(gradient.to_local() if hasattr(gradient, "to_local") else gradient, group=group)
