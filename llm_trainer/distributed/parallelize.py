"""The parallel plan, applied to a model in one place and one visible order; the model itself knows nothing of
it.

Matrices are cut first (matrices.py), then sequences (context.py), then come recomputation (a setting of the
model), compilation, and the wrapper: replicas alone are DistributedDataParallel, shards are FSDP2's
`fully_shard` (Zhao et al. 2023, arXiv:2304.11277) by block, and both together a mesh of replicas × shards.
Compilation replaces functions inside the blocks (compilation.py), so it lies within either wrapper, whichever
comes first. Gradients are summed over ranks, not averaged: the step has divided by the tokens of all ranks
already, and a mean over ranks with unequal numbers of tokens would be another loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from llm_trainer.config.resolve.parallelism import ParallelPlan, check_shape
from llm_trainer.distributed.context_parallel import share_over
from llm_trainer.distributed.process_group import Ranks
from llm_trainer.distributed.tensor_parallel import cut_matrices, gradients_in_parts, sum_over
from llm_trainer.model.adapters.nf4 import fill
from llm_trainer.model.hf.checkpoint import load_weights
from llm_trainer.training.objectives.objective import TrainingStep

if TYPE_CHECKING:
    from pathlib import Path

    from torch.distributed import GradBucket, ProcessGroup  # type: ignore[attr-defined]  # public, and not in the stubs
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


class Shared(NamedTuple):
    """A parameter that several ranks hold whole, each of which finds a part of its gradient: to be summed
    over `group`.
    """

    parameter: nn.Parameter
    group: ProcessGroup


def shard(step: TrainingStep, ranks: Ranks) -> list[Shared]:
    """Cut the model's weights over the ranks where the plan says so; optimizers are made after this, over
    what each rank holds.

    Returns the parameters whose gradients are to be summed over a group before the update.
    """
    plan = ranks.plan
    check_shape(plan, step.model.config)
    if plan.tensor_parallel > 1:
        cut_matrices(step.model, ranks.mesh(_kind(step))["tensor"])
    if plan.context_parallel > 1:
        step.model.take_share(share_over(ranks.context_mesh(_kind(step))))
    if is_fully_sharded(plan):
        mesh = ranks.mesh(_kind(step))
        shard_fully(
            step.model.blocks, step, mesh["replicate", "shard"] if plan.data_parallel > 1 else mesh["shard"]
        )
    if plan.tensor_parallel == 1:
        return []
    group = ranks.mesh(_kind(step)).get_group("tensor")
    return [Shared(parameter, group) for _, parameter in gradients_in_parts(step.model)]


def is_fully_sharded(plan: ParallelPlan) -> bool:
    """Replicas of a model whose matrices are cut are FSDP's too, with shards of one rank:
    DistributedDataParallel takes whole models.
    """
    return plan.shards > 1 or (plan.data_parallel > 1 and plan.tensor_parallel * plan.pipeline_parallel > 1)


def shard_fully(blocks: Iterable[nn.Module], root: nn.Module, mesh: DeviceMesh) -> None:
    """FSDP over `mesh`, block by block; what of `root` is in no block (embeddings, last norm, head) belongs
    to the whole.
    """
    from torch.distributed.fsdp import fully_shard

    elsewhere = {parameter for parameter in root.parameters() if is_elsewhere(parameter)}
    for module in (*blocks, root):
        fully_shard(module, mesh=mesh, ignored_params=elsewhere or None)
        sharded = cast("FSDPModule", module)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


def _kind(step: TrainingStep) -> str:
    return next(step.model.parameters()).device.type


def sum_shared(shared: Sequence[Shared]) -> None:
    """Sum the gradients of shared parameters over their groups: once a step, after the last backward pass. A
    collective call.
    """
    for parameter, group in shared:
        if parameter.grad is not None:
            sum_over(group, parameter.grad)


def replicate(step: TrainingStep, ranks: Ranks) -> nn.Module:
    """The module to train: `step`, in DistributedDataParallel where there are whole replicas on several
    ranks.
    """
    if ranks.plan.data_parallel == 1 or is_fully_sharded(ranks.plan):
        return step
    from torch.nn.parallel import DistributedDataParallel

    wrapped = DistributedDataParallel(
        step, broadcast_buffers=False
    )  # they are constants, and a forward pass sends nothing so
    wrapped.register_comm_hook(
        None, lambda _, bucket: _sum_bucket(bucket)
    )  # no names of types, which DDP would compare
    return wrapped


def _sum_bucket(bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's communication of a bucket of gradients, without its division by the number of ranks."""
    import torch.distributed as dist

    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    future = work.get_future()
    return cast("torch.futures.Future[Tensor]", future.then(lambda done: done.value()[0]))


@contextmanager
def gradients_stay_here(module: nn.Module) -> Iterator[None]:
    """Within, backward passes add to this rank's gradients and send nothing: every micro-batch of a step but
    the last.
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


def free_gathered(module: nn.Module) -> None:
    """After passes without gradients: let go of the whole weights that FSDP gathered, so that the model's
    parameters are shards again.
    """
    for one in module.modules():
        if hasattr(one, "reshard"):
            cast("FSDPModule", one).reshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor's whole value: gathered over the ranks (a collective call) where each holds a shard, else
    itself.
    """
    return cast("DTensor", tensor).full_tensor() if hasattr(tensor, "full_tensor") else tensor


def is_elsewhere(parameter: Tensor) -> bool:
    """Whether another stage of a pipeline holds this parameter."""
    return parameter.device.type == "meta"


def mesh_of(tensor: Tensor) -> DeviceMesh | None:
    """The ranks over which a tensor is cut; None where it is whole."""
    return getattr(tensor, "device_mesh", None)


def placed_like(full: Tensor, held: Tensor) -> Tensor:
    """`full`, known alike to all ranks, cut as `held` is cut; itself where that is whole."""
    if not hasattr(held, "full_tensor"):
        return full
    from torch.distributed.tensor import distribute_tensor

    sharded = cast("DTensor", held)
    return distribute_tensor(full, sharded.device_mesh, sharded.placements, src_data_rank=None)


def assembled_like(local: Tensor, held: Tensor) -> Tensor:
    """The tensor cut as `held` is, of which this rank has the piece `local`."""
    from torch.distributed.tensor import DTensor as CutTensor

    like = cast("DTensor", held)
    return CutTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


class Piece(NamedTuple):
    """What one rank holds of a tensor, or all of it: the values, where the first of them stands in the whole,
    and the whole's shape.
    """

    values: Tensor
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


def piece_of(tensor: Tensor) -> Piece:
    """This rank's piece of a tensor: all of it where it is whole, nothing (no elements) where the rank got
    none.

    A collective call only for tensors whose shards interleave (one dimension cut twice), which are gathered.
    """
    if not hasattr(tensor, "full_tensor"):
        return Piece(tensor, (0,) * tensor.ndim, tuple(tensor.shape))
    from torch.distributed.tensor import Replicate, Shard

    sharded = cast("DTensor", tensor)
    if not all(type(placement) in (Shard, Replicate) for placement in sharded.placements):
        return piece_of(sharded.full_tensor())
    chunk = cast("Any", sharded).__create_chunk_list__()[
        0
    ]  # what torch.distributed.checkpoint asks a tensor for
    return Piece(sharded.to_local(), tuple(chunk.offsets), tuple(sharded.shape))


def is_first_holder(tensor: Tensor, rank: int) -> bool:
    """Whether this rank is the one that writes its piece: rank 0 of what all hold, the first replica of what
    is cut.
    """
    if not hasattr(tensor, "full_tensor"):
        return rank == 0
    from torch.distributed.tensor import Replicate, Shard

    sharded = cast("DTensor", tensor)
    if not all(type(placement) in (Shard, Replicate) for placement in sharded.placements):
        return rank == 0
    place: Sequence[int] = sharded.device_mesh.get_coordinate() or []
    return all(
        at == 0
        for at, placement in zip(place, sharded.placements, strict=True)
        if isinstance(placement, Replicate)
    )


def is_sharded(model: nn.Module) -> bool:
    """Whether ranks hold shards of the model."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def load_model_weights(model: nn.Module, folder: Path) -> None:
    """`load_weights`, also into a model that is cut over ranks: each rank reads one tensor after another and
    keeps its part.
    """

    def keep_part(parameter: nn.Parameter, tensor: Tensor) -> None:
        if is_elsewhere(parameter):
            return
        fill(parameter, placed_like(tensor.to(parameter.device), parameter))

    load_weights(model, folder, keep_part)
