"""Tensor parallelism: the matrices of each block cut over a group of ranks that see the same samples (Shoeybi
et al. 2019, arXiv:1909.08053), by torch's own styles.

Query, key, value, up and gate are cut by columns, so that each rank has heads and inner units of its own; the
two output maps are cut by rows, and their results are summed. Norms, embeddings and the head are whole on
each rank: what enters them is equal there, so they stay equal. The exception are the norms of queries and
keys, which see only a rank's own heads: their gradients are summed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor, nn

from llm_trainer.config import UsageError
from llm_trainer.model.transformer import Linear, Transformer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

_BY_COLUMNS = {"attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.up_proj", "mlp.gate_proj"}
_BY_ROWS = {"attn.o_proj", "mlp.down_proj"}
_OF_OWN_HEADS = ("q_norm.weight", "k_norm.weight")


def cut_matrices(model: Transformer, mesh: DeviceMesh) -> None:
    """Cut each block's maps over the ranks of `mesh`, which hold the same whole weights. Raises UsageError
    where one is no plain map.
    """
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        parallelize_module,
    )

    for number, block in enumerate(model.blocks):
        maps = {name: module for name, module in block.named_modules() if name in _BY_COLUMNS | _BY_ROWS}
        for name, module in maps.items():
            if type(module) is not Linear:
                raise UsageError(
                    f"tensor_parallel cannot cut {name} of block {number}, which is more than a map (an adapter?); use fsdp with it"
                )
        styles = {name: ColwiseParallel() if name in _BY_COLUMNS else RowwiseParallel() for name in maps}
        parallelize_module(block, mesh, styles, src_data_rank=None)  # type: ignore[arg-type]
        # Once for the maps that share an input, so that its gradient is summed over the ranks once.
        for name, others in (("attn", 4), ("mlp", 0)):
            layouts = (Replicate(), *[None] * others)
            entering = PrepareModuleInput(input_layouts=layouts, desired_input_layouts=layouts)
            parallelize_module(block.get_submodule(name), mesh, entering, src_data_rank=None)


def gradients_in_parts(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The whole parameters of which each rank of a tensor group finds only its own heads' share of the
    gradient.
    """
    yield from (
        (name, parameter) for name, parameter in model.named_parameters() if name.endswith(_OF_OWN_HEADS)
    )


def sum_over(group: ProcessGroup, gradient: Tensor) -> None:
    """Sum a gradient, or this rank's shard of one, over a group."""
    import torch.distributed as dist

    dist.all_reduce(gradient.to_local() if hasattr(gradient, "to_local") else gradient, group=group)
