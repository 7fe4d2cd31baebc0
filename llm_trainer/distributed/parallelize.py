"""Applies the parallel plan to a model, in one place and one visible order.

The model itself does not depend on the plan. Matrices are sharded first (tensor_parallel.py), then sequences
(context_parallel.py). Activation checkpointing, which is a setting of the model, and compilation follow. The
wrapper comes last: replicas alone use DistributedDataParallel, shards use FSDP2's `fully_shard` (Zhao et al.
2023, arXiv:2304.11277) block by block, and both together a mesh of replicas × shards. Compilation replaces
functions inside the blocks (training/engines/compile.py), so it ends up inside either wrapper, whichever is
applied first. Gradients are summed over ranks, not averaged: the step has already divided the loss by the
tokens of all ranks, and a mean over ranks with unequal numbers of tokens would be another loss.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from llm_trainer.config.resolve.parallelism import ParallelPlan, check_shape
from llm_trainer.distributed.context_parallel import build_sequence_shard
from llm_trainer.distributed.process_group import ProcessGroup
from llm_trainer.distributed.tensor_parallel import (
    all_reduce_gradient,
    apply_tensor_parallel,
    partial_gradient_parameters,
)
from llm_trainer.model.adapters.nf4 import copy_into
from llm_trainer.model.hf.checkpoint import load_weights
from llm_trainer.model.transformer import Transformer
from llm_trainer.torch_compat import local_shard_offsets

if TYPE_CHECKING:
    from pathlib import Path

    import torch.distributed as dist
    from torch.distributed import GradBucket  # type: ignore[attr-defined]  # public, and not in the stubs
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


class PartialGradient(NamedTuple):
    """A replicated parameter of whose gradient each rank computes a part, to be summed over `group`."""

    parameter: nn.Parameter
    group: dist.ProcessGroup


def apply_parallelism(
    model: Transformer, root: nn.Module, process_group: ProcessGroup
) -> list[PartialGradient]:
    """Shard a model over the ranks as the plan requires; build optimizers after this, over the shards.

    Args:
        model: The model, with the same full weights on all ranks.
        root: The module whose forward pass runs the model; FSDP wraps it.
        process_group: The ranks and their plan.

    Returns:
        The parameters whose gradients `all_reduce_partial_gradients` has to sum before the update.

    Raises:
        UsageError: The model's sizes do not divide by the plan's.
    """
    plan, device_type = process_group.plan, next(model.parameters()).device.type
    check_shape(plan, model.config)
    if plan.tensor_parallel > 1:
        apply_tensor_parallel(model, process_group.mesh(device_type)["tensor"])
    if plan.context_parallel > 1:
        model.set_sequence_shard(build_sequence_shard(process_group.context_mesh(device_type)))
    if uses_fsdp(plan):
        mesh = process_group.mesh(device_type)
        apply_fsdp(
            model.blocks, root, mesh["replicate", "shard"] if plan.data_parallel > 1 else mesh["shard"]
        )
    if plan.tensor_parallel == 1:
        return []
    group = process_group.mesh(device_type).get_group("tensor")
    return [PartialGradient(parameter, group) for _, parameter in partial_gradient_parameters(model)]


def uses_fsdp(plan: ParallelPlan) -> bool:
    """Whether the plan wraps the model with FSDP.

    Replicas of a model with tensor or pipeline parallelism are wrapped with FSDP too, with shards of one
    rank, because DistributedDataParallel takes unsharded models only.
    """
    return plan.shards > 1 or (plan.data_parallel > 1 and plan.tensor_parallel * plan.pipeline_parallel > 1)


def apply_fsdp(blocks: Iterable[nn.Module], root: nn.Module, mesh: DeviceMesh) -> None:
    """Wrap each block with FSDP, then `root`, which owns everything outside the blocks.

    Args:
        blocks: The modules that are gathered one at a time.
        root: The module that contains them; embeddings, final norm and head are sharded with it.
        mesh: The shard dimension, or the replicate and shard dimensions.
    """
    from torch.distributed.fsdp import fully_shard

    ignored = {parameter for parameter in root.parameters() if is_on_other_stage(parameter)}
    for module in (*blocks, root):
        fully_shard(module, mesh=mesh, ignored_params=ignored or None)
        sharded = cast("FSDPModule", module)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


def all_reduce_partial_gradients(partial: Sequence[PartialGradient]) -> None:
    """Sum the gradients over their groups, once per step after the last backward pass. A collective call."""
    for parameter, group in partial:
        if parameter.grad is not None:
            all_reduce_gradient(group, parameter.grad)


def apply_ddp(root: nn.Module, process_group: ProcessGroup) -> nn.Module:
    """Wrap `root` with DistributedDataParallel if the plan has unsharded replicas, else return it as is."""
    if process_group.plan.data_parallel == 1 or uses_fsdp(process_group.plan):
        return root
    from torch.nn.parallel import DistributedDataParallel

    # The buffers are constants; not broadcasting them keeps the forward pass free of communication. torch
    # 2.13 has another name for this and warns of the old one.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {name: False}
    wrapped = DistributedDataParallel(root, **options)
    # A lambda, because DDP compares the type annotations of a function with its own.
    wrapped.register_comm_hook(None, lambda _, bucket: _sum_bucket(bucket))
    return wrapped


def _sum_bucket(bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's communication of a bucket of gradients, without its division by the number of ranks."""
    import torch.distributed as dist

    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    future = work.get_future()
    return cast("torch.futures.Future[Tensor]", future.then(lambda done: done.value()[0]))


@contextmanager
def no_sync(module: nn.Module) -> Iterator[None]:
    """Within the context, backward passes accumulate gradients on this rank and send nothing.

    Used for every micro-batch of a step but the last. Works for DistributedDataParallel, FSDP and unwrapped
    modules.
    """
    if hasattr(module, "no_sync"):
        with module.no_sync():  # type: ignore[operator]  # DistributedDataParallel's
            yield
    elif hasattr(module, "set_requires_gradient_sync"):
        sharded = cast("FSDPModule", module)
        sharded.set_requires_gradient_sync(False)
        yield
        sharded.set_requires_gradient_sync(True)
    else:
        yield


def reshard_parameters(module: nn.Module) -> None:
    """Free the full weights that FSDP gathered, after forward passes without a backward pass."""
    for submodule in module.modules():
        if hasattr(submodule, "reshard"):
            cast("FSDPModule", submodule).reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the unsharded tensor; a collective call if it is a DTensor, else the tensor itself."""
    return cast("DTensor", tensor).full_tensor() if hasattr(tensor, "full_tensor") else tensor


def is_on_other_stage(parameter: Tensor) -> bool:
    """Whether another pipeline stage owns this parameter, which is then on the meta device here."""
    return parameter.device.type == "meta"


def device_mesh_of(tensor: Tensor) -> DeviceMesh | None:
    """Return the mesh over which a tensor is sharded; None if it is not a DTensor."""
    return getattr(tensor, "device_mesh", None)


def distribute_like(full: Tensor, sharded: Tensor) -> Tensor:
    """Shard `full`, which is equal on all ranks, like another tensor, which may be unsharded."""
    if not hasattr(sharded, "full_tensor"):
        return full
    from torch.distributed.tensor import distribute_tensor

    like = cast("DTensor", sharded)
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


def assemble_like(local: Tensor, sharded: Tensor) -> Tensor:
    """Return the tensor sharded like another one, of which `local` is this rank's shard."""
    from torch.distributed.tensor import DTensor

    like = cast("DTensor", sharded)
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


class LocalShard(NamedTuple):
    """What one rank has of a tensor.

    Attributes:
        values: This rank's elements.
        offsets: The position of the first of them in the full tensor, per dimension.
        shape: The shape of the full tensor.
    """

    values: Tensor
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


def local_shard(tensor: Tensor) -> LocalShard:
    """Return this rank's shard: all of an unsharded tensor, no elements if this rank has none.

    A collective call only for tensors whose shards interleave (one dimension sharded twice): those are
    gathered.
    """
    if not hasattr(tensor, "full_tensor"):
        return LocalShard(tensor, (0,) * tensor.ndim, tuple(tensor.shape))
    sharded = cast("DTensor", tensor)
    if not _has_plain_placements(sharded):
        return local_shard(sharded.full_tensor())
    return LocalShard(sharded.to_local(), local_shard_offsets(sharded), tuple(sharded.shape))


def is_shard_writer(tensor: Tensor, rank: int) -> bool:
    """Whether this rank writes its shard to a checkpoint, so that each shard is written once.

    Rank 0 writes unsharded tensors, and the first replica the shards of the others.
    """
    if not hasattr(tensor, "full_tensor"):
        return rank == 0
    from torch.distributed.tensor import Replicate

    sharded = cast("DTensor", tensor)
    if not _has_plain_placements(sharded):
        return rank == 0
    coordinate: Sequence[int] = sharded.device_mesh.get_coordinate() or []
    return all(
        index == 0
        for index, placement in zip(coordinate, sharded.placements, strict=True)
        if isinstance(placement, Replicate)
    )


def _has_plain_placements(tensor: DTensor) -> bool:
    """Whether the tensor's shards are contiguous chunks: each dimension is sharded at most once."""
    from torch.distributed.tensor import Replicate, Shard

    return all(type(placement) in (Shard, Replicate) for placement in tensor.placements)


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter of the model is sharded over ranks."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def load_model_weights(model: nn.Module, folder: Path) -> None:
    """Load the weights of a model folder, also into a sharded model.

    Each rank reads one tensor after another and keeps its shard.
    """

    def assign(parameter: nn.Parameter, tensor: Tensor) -> None:
        if is_on_other_stage(parameter):
            return
        copy_into(parameter, distribute_like(tensor.to(parameter.device), parameter))

    load_weights(model, folder, assign)
