"""The processes of one run: collectives on plain values, the device mesh, and start-up and shutdown.

A single process that no launcher started is `ProcessGroup()`. It imports nothing of torch.distributed, and
its collectives return their arguments. Ranks that fail or hang are detected by `heartbeat.py`.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn, TypeVar

import torch
from torch import Tensor

from llm_trainer.config import CheckpointError, LLMTrainerError, TrainingConfig, UsageError
from llm_trainer.config.environment import LaunchEnvironment
from llm_trainer.config.resolve.parallelism import ParallelPlan, resolve_plan
from llm_trainer.distributed.heartbeat import Heartbeat

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch.distributed import Store  # type: ignore[attr-defined]  # public, and not in the stubs
    from torch.distributed.device_mesh import DeviceMesh

Result = TypeVar("Result")
_RENDEZVOUS_SECONDS = 600.0  # long, for slow file systems from which Python itself is loaded


class RankLostError(LLMTrainerError):
    """Another rank died, hung or failed."""


@dataclass(frozen=True)
class ProcessGroup:
    """This process among all processes of the run, and the collectives on plain Python values.

    All methods but the properties are collective calls: every rank must make them in the same order.

    Args:
        rank: This process among `world_size`.
        world_size: The number of processes in the run.
        plan: The sizes of the data, FSDP, tensor, pipeline and context dimensions.
        group: torch's group that the collectives run on; None for the default group of all ranks.
        local_rank: This process among the `local_world_size` processes of its machine.
        local_world_size: The number of the run's processes on this machine.
    """

    rank: int = 0
    world_size: int = 1
    plan: ParallelPlan = field(default_factory=ParallelPlan)
    group: dist.ProcessGroup | None = None
    local_rank: int = 0
    local_world_size: int = 1

    _meshes: dict[tuple[str, tuple[tuple[str, int], ...]], DeviceMesh] = field(
        default_factory=dict, compare=False, repr=False
    )

    def mesh(self, device_type: str) -> DeviceMesh:
        """Return the mesh of all ranks, with the dimensions pipeline, replicate, shard and tensor.

        The pipeline dimension is outermost and the tensor dimension innermost. The mesh is built once per
        device type, because building it creates process groups. A collective call.

        Args:
            device_type: "cpu" or "cuda".
        """
        plan = self.plan
        return self._mesh(
            device_type,
            pipeline=plan.pipeline_parallel,
            replicate=plan.data_parallel,
            shard=plan.shards,
            tensor=plan.tensor_parallel,
        )

    def context_mesh(self, device_type: str) -> DeviceMesh:
        """Return the one-dimensional mesh of the ranks that hold parts of the same sequences.

        They are some of the ranks of the shard dimension of `mesh`, hence a mesh of their own. A collective
        call.
        """
        plan = self.plan
        others = plan.ranks // (plan.context_parallel * plan.tensor_parallel)
        return self._mesh(
            device_type, others=others, context=plan.context_parallel, tensor=plan.tensor_parallel
        )["context"]

    def _mesh(self, device_type: str, **sizes: int) -> DeviceMesh:
        key = (device_type, tuple(sizes.items()))
        if key not in self._meshes:
            from torch.distributed.device_mesh import init_device_mesh

            self._meshes[key] = init_device_mesh(
                device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes)
            )
        return self._meshes[key]

    def new_group(self) -> ProcessGroup:
        """Return the same ranks with a torch group of their own, for a thread that runs during training."""
        if self.world_size == 1:
            return self
        import torch.distributed as dist

        return replace(self, group=dist.new_group(backend="gloo"))

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and logs."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """The index of this rank's group of ranks that read the same samples.

        The ranks of a tensor group, of a pipeline and of a context group have one data rank.
        """
        return self.plan.data_rank(self.rank)

    @property
    def token_rank(self) -> int:
        """The index of the tokens that this rank computes on, among all samples; dropout is seeded by it."""
        return self.plan.token_rank(self.rank)

    @property
    def data_world_size(self) -> int:
        """The number of groups of ranks that read samples of their own."""
        return self.plan.data_ranks

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Sum each value over the ranks that have different tokens, in double precision.

        Only one rank of each tensor group and pipeline contributes: the one that owns the loss.
        """
        if self.world_size == 1:
            return list(values)
        import torch.distributed as dist

        own = torch.tensor(values, dtype=torch.float64)
        summed = own if self.plan.owns_loss(self.rank) else torch.zeros_like(own)
        dist.all_reduce(summed, group=self.group)
        return [float(value) for value in summed]

    def all_reduce_tensor(self, value: Tensor) -> Tensor:
        """Sum a tensor over the same ranks as `all_reduce_sum`, on its own device."""
        if self.world_size > 1:
            import torch.distributed as dist

            value = value.clone() if self.plan.owns_loss(self.rank) else torch.zeros_like(value)
            dist.all_reduce(value, group=self.group)
        return value

    def all_reduce_max(self, values: Sequence[int]) -> list[int]:
        """Return the largest of each value over all ranks; with flags, whether any rank has set one."""
        if self.world_size == 1:
            return list(values)
        import torch.distributed as dist

        largest = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        return [int(value) for value in largest]

    def all_gather_text(self, text: str) -> list[str]:
        """Return the text of every rank, in the order of ranks."""
        if self.world_size == 1:
            return [text]
        import torch.distributed as dist

        encoded = torch.frombuffer(bytearray(text.encode()) or bytearray(1), dtype=torch.uint8)
        longest = self.all_reduce_max([len(encoded)])[0]
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(encoded)] = encoded
        gathered = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(gathered, padded, group=self.group)
        return [bytes(one.numpy()).rstrip(b"\0").decode() for one in gathered]

    def broadcast_text(self, text: str) -> str:
        """Return the main rank's text on all ranks; the text of the other ranks is ignored."""
        return self.all_gather_text(text if self.is_main else "")[0]

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.all_reduce_max([0])

    def run_on_main(self, task: Callable[[], Result]) -> Result | None:
        """Run `task` on the main rank while the others wait.

        Returns:
            The result on the main rank, None on the others.

        Raises:
            LLMTrainerError: The task raised it. The other ranks raise CheckpointError with the same message.
        """
        result, problem = None, ""
        error: LLMTrainerError | None = None
        if self.is_main:
            try:
                result = task()
            except LLMTrainerError as raised:
                error, problem = raised, str(raised)
        problem = self.broadcast_text(problem) if self.world_size > 1 else problem
        if error is not None:
            raise error
        if problem:
            raise CheckpointError(problem)
        return result

    def run_on_all(self, task: Callable[[], str]) -> list[str]:
        """Run `task` on every rank and wait for all of them.

        Returns:
            The results of all ranks, in the order of ranks.

        Raises:
            LLMTrainerError: This rank's task raised it.
            CheckpointError: The task failed on another rank; the message names the rank.
        """
        answer, error = "", None
        try:
            answer = task()
        except LLMTrainerError as raised:
            error = raised
        results = self.all_gather_text(f"{'!' if error else '='}{error or answer}")
        if error is not None:
            raise error
        for rank, text in enumerate(results):
            if text.startswith("!"):
                raise CheckpointError(f"rank {rank}: {text[1:]}")
        return [text[1:] for text in results]

    def main_process_first(self, task: Callable[[], Result]) -> Result:
        """Run `task` on every rank, on the main rank first, so that the others find what it has prepared."""
        if self.is_main:
            result = task()
            self.barrier()
            return result
        self.barrier()
        return task()


@contextmanager
def init_process_group(launch: LaunchEnvironment, training: TrainingConfig) -> Iterator[ProcessGroup]:
    """Connect this process to the others that the launcher started, for the duration of the context.

    Raises:
        UsageError: The parallel dimensions do not fit the number of processes, or there are too few GPUs.
        RankLostError: Another rank ended during the context; the message names it.
    """
    plan = resolve_plan(training, launch.world_size)
    if launch.world_size == 1:
        yield ProcessGroup(plan=plan)
        return
    import torch.distributed as dist

    store = _rendezvous(launch, training)
    process_group = ProcessGroup(
        launch.rank, launch.world_size, plan, None, launch.local_rank, launch.local_world_size
    )
    heartbeat = Heartbeat(store, launch.rank, launch.world_size, training.rank_timeout_seconds)
    try:
        yield process_group
        process_group.barrier()  # the launcher ends all processes once one has exited with an error code
    except Exception as error:
        if not _is_communication_error(error):
            heartbeat.report_failure(error)
            _exit_if_main_reports(heartbeat, process_group, error)
            raise
        raise RankLostError(heartbeat.describe_lost_rank()) from error
    else:
        heartbeat.stop(finished=True)
        dist.destroy_process_group()
    finally:
        heartbeat.stop()


def exit_process(code: int) -> NoReturn:
    """Run the exit handlers and end the process at once, for a process that was one of several.

    DistributedDataParallel keeps gloo's threads for as long as the process lives. One of them may be late in
    releasing a tensor, for which it needs the interpreter. If the interpreter is shutting down just then, the
    process aborts ("terminate called without an active exception", pytorch#179291). So the interpreter is
    never shut down here: the operating system takes everything.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _rendezvous(launch: LaunchEnvironment, training: TrainingConfig) -> Store:
    """Set up torch.distributed and return a connection to the launcher's store for the heartbeat."""
    import torch.distributed as dist

    on_gpu = training.device in ("auto", "cuda") and torch.cuda.is_available()
    if training.distributed_backend == "nccl" and not on_gpu:
        raise UsageError(
            "distributed_backend nccl needs one GPU per rank, and PyTorch finds none; set it to gloo or auto"
        )
    if on_gpu:
        gpus = torch.cuda.device_count()
        if launch.local_rank >= gpus:
            raise UsageError(
                f"there is no GPU for local rank {launch.local_rank}: this machine has {gpus}; "
                "start fewer processes"
            )
        torch.cuda.set_device(launch.local_rank)
    backend = "gloo" if not on_gpu or training.distributed_backend == "gloo" else "cpu:gloo,cuda:nccl"
    rendezvous = dist.rendezvous("env://", timeout=timedelta(seconds=_RENDEZVOUS_SECONDS))  # type: ignore[attr-defined]
    store, rank, count = next(iter(rendezvous))
    # After a restart the store still contains what the previous attempt wrote, hence the prefix.
    store = dist.PrefixStore(f"attempt-{launch.attempt}", store)  # type: ignore[attr-defined]
    own = dist.PrefixStore("training", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=own, rank=rank, world_size=count)
    cloned: Store = store.clone()  # type: ignore[attr-defined]  # its own connection, on which nothing else waits
    return cloned


def _is_communication_error(error: Exception) -> bool:
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )


def _exit_if_main_reports(heartbeat: Heartbeat, process_group: ProcessGroup, error: Exception) -> None:
    """Raise SystemExit where the main rank fails with the same error, so that it is printed only once."""
    if (
        isinstance(error, LLMTrainerError)
        and not process_group.is_main
        and heartbeat.failure_of(0, seconds=2) == str(error)
    ):
        raise SystemExit(error.exit_code) from error
