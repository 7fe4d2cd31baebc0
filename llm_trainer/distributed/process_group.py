"""The processes of one run and what they say to each other: sums, agreement, who writes, and who has died.

A rank that is killed, stopped or unreachable would leave the others waiting for half an hour in their next
all-reduce. So every rank counts aloud in the launcher's key-value store, a thread watches the others count,
and when one falls silent the run ends and says which. (The alternative, a short timeout on collectives,
cannot tell a dead rank from a slow save, nor name it.)

One process that nobody launched is `Ranks()`: it imports nothing of torch.distributed, and its sums are its
own numbers.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
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

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store  # type: ignore[attr-defined]  # public, and not in the stubs
    from torch.distributed.device_mesh import DeviceMesh

Result = TypeVar("Result")
_BEAT_SECONDS = 0.5
_JOIN_SECONDS = 600.0  # for slow file systems, from which Python itself is read
_DEAD_STATUS = 1


class RankLost(LLMTrainerError):
    """Another rank died, hung or failed."""


@dataclass(frozen=True)
class Ranks:
    """This process among `count`, and among the `machine_ranks` of its machine. All methods but the
    properties are called by every rank, in the same order.
    """

    rank: int = 0
    count: int = 1
    plan: ParallelPlan = field(default_factory=ParallelPlan)
    group: ProcessGroup | None = None  # none: that of all ranks
    machine_rank: int = 0
    machine_ranks: int = 1

    _meshes: dict[tuple[str, tuple[tuple[str, int], ...]], DeviceMesh] = field(
        default_factory=dict, compare=False, repr=False
    )

    def mesh(self, kind: str) -> DeviceMesh:
        """The ranks of the plan by dimension, on devices of this kind ("cpu", "cuda"): stages outermost,
        tensor groups innermost.

        Made once, as its groups are. A collective call.
        """
        plan = self.plan
        return self._mesh(
            kind,
            pipeline=plan.pipeline_parallel,
            replicate=plan.data_parallel,
            shard=plan.shards,
            tensor=plan.tensor_parallel,
        )

    def context_mesh(self, kind: str) -> DeviceMesh:
        """The ranks that share this one's sequences: some of its shards, so they are a mesh of their own. A
        collective call.
        """
        plan = self.plan
        others = plan.ranks // (plan.context_parallel * plan.tensor_parallel)
        return self._mesh(kind, others=others, context=plan.context_parallel, tensor=plan.tensor_parallel)[
            "context"
        ]

    def _mesh(self, kind: str, **sizes: int) -> DeviceMesh:
        key = (kind, tuple(sizes.items()))
        if key not in self._meshes:
            from torch.distributed.device_mesh import init_device_mesh

            self._meshes[key] = init_device_mesh(kind, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        return self._meshes[key]

    def apart(self) -> Ranks:
        """The same ranks with a line of their own, on which they may talk in a thread while training goes on.
        A collective call.
        """
        if self.count == 1:
            return self
        import torch.distributed as dist

        return replace(self, group=dist.new_group(backend="gloo"))

    @property
    def is_main(self) -> bool:
        """Whether this rank writes and talks."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which samples are this rank's: it shares them with the other ranks of its tensor group and
        pipeline, and of its sequences.
        """
        return self.plan.data_rank(self.rank)

    @property
    def token_rank(self) -> int:
        """Which tokens are this rank's, of all samples: what dropout must differ by."""
        return self.plan.token_rank(self.rank)

    @property
    def data_count(self) -> int:
        """Groups of ranks with samples of their own."""
        return self.plan.data_ranks

    def add(self, values: Sequence[float]) -> list[float]:
        """Sums over the groups of ranks with tokens of their own, in double precision, alike on all; one rank
        of each is heard.
        """
        if self.count == 1:
            return list(values)
        import torch.distributed as dist

        said = torch.tensor(values, dtype=torch.float64)
        summed = said if self.plan.speaks(self.rank) else torch.zeros_like(said)
        dist.all_reduce(summed, group=self.group)
        return [float(value) for value in summed]

    def add_tensor(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the same groups, where it lies."""
        if self.count > 1:
            import torch.distributed as dist

            value = value.clone() if self.plan.speaks(self.rank) else torch.zeros_like(value)
            dist.all_reduce(value, group=self.group)
        return value

    def largest(self, values: Sequence[int]) -> list[int]:
        """The largest of each over ranks: how all agree to what one wants."""
        if self.count == 1:
            return list(values)
        import torch.distributed as dist

        agreed = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=self.group)
        return [int(value) for value in agreed]

    def texts(self, text: str) -> list[str]:
        """Every rank's text, in the order of ranks."""
        if self.count == 1:
            return [text]
        import torch.distributed as dist

        said = torch.frombuffer(bytearray(text.encode()) or bytearray(1), dtype=torch.uint8)
        longest = self.largest([len(said)])[0]
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(said)] = said
        gathered = [torch.empty_like(padded) for _ in range(self.count)]
        dist.all_gather(gathered, padded, group=self.group)
        return [bytes(one.numpy()).rstrip(b"\0").decode() for one in gathered]

    def of_main(self, text: str) -> str:
        """The main rank's text."""
        return self.texts(text if self.is_main else "")[0]

    def wait(self) -> None:
        """Until all are here."""
        self.largest([0])

    def main_does(self, task: Callable[[], Result]) -> Result | None:
        """The main rank runs `task`, and the others wait for its end; None for them. What it raises of ours,
        all raise.
        """
        result, problem = None, ""
        error: LLMTrainerError | None = None
        if self.is_main:
            try:
                result = task()
            except LLMTrainerError as raised:
                error, problem = raised, str(raised)
        problem = self.of_main(problem) if self.count > 1 else problem
        if error is not None:
            raise error
        if problem:
            raise CheckpointError(problem)
        return result

    def all_do(self, task: Callable[[], str]) -> list[str]:
        """Every rank runs `task`; each gets all answers, once all have ended. What one raises of ours, all
        raise.
        """
        answer, error = "", None
        try:
            answer = task()
        except LLMTrainerError as raised:
            error = raised
        told = self.texts(f"{'!' if error else '='}{error or answer}")
        if error is not None:
            raise error
        for rank, text in enumerate(told):
            if text.startswith("!"):
                raise CheckpointError(f"rank {rank}: {text[1:]}")
        return [text[1:] for text in told]

    def main_first(self, task: Callable[[], Result]) -> Result:
        """Every rank runs `task`, the main one before the others: what it prepares, they find."""
        if self.is_main:
            result = task()
            self.wait()
            return result
        self.wait()
        return task()


@contextmanager
def joined(launch: LaunchEnvironment, training: TrainingConfig) -> Iterator[Ranks]:
    """This process among those that the launcher started. Raises UsageError for a plan that does not fit
    their number, RankLost (naming the rank) where another one ends first.
    """
    plan = resolve_plan(training, launch.world_size)
    if launch.world_size == 1:
        yield Ranks(plan=plan)
        return
    import torch.distributed as dist

    store = _join(launch, training)
    ranks = Ranks(launch.rank, launch.world_size, plan, None, launch.local_rank, launch.local_size)
    watch = Watch(store, ranks, training.rank_timeout_seconds)
    try:
        yield ranks
        ranks.wait()  # the launcher ends all when one has left with an error status
    except Exception as error:
        watch.tell_failure(error)
        if not _is_from_communication(error):
            _leave_speech_to_main(watch, ranks, error)
            raise
        raise RankLost(watch.who_is_lost()) from error
    else:
        watch.stop(left=True)
        dist.destroy_process_group()
    finally:
        watch.stop()


def end_process(status: int) -> NoReturn:
    """Leave with this status, for good, where this process was one of several; what is to be done at an exit
    is done.

    DistributedDataParallel keeps gloo's threads for as long as the process lives. One of them may be late in
    letting go of a tensor, for which it needs the interpreter; where the interpreter is ending just then, the
    process aborts ("terminate called without an active exception", pytorch#179291). So it does not end: the
    operating system takes it all.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _join(launch: LaunchEnvironment, training: TrainingConfig) -> Store:
    import torch.distributed as dist

    on_gpu = training.device in ("auto", "cuda") and torch.cuda.is_available()
    if training.distributed_backend == "nccl" and not on_gpu:
        raise UsageError(
            "distributed_backend nccl needs a GPU for each rank, and there is none that PyTorch can use; take gloo or auto"
        )
    if on_gpu:
        there = torch.cuda.device_count()
        if launch.local_rank >= there:
            raise UsageError(
                f"local rank {launch.local_rank} has no GPU of its own: this machine has {there}; start fewer processes"
            )
        torch.cuda.set_device(launch.local_rank)
    backend = "gloo" if not on_gpu or training.distributed_backend == "gloo" else "cpu:gloo,cuda:nccl"
    store, rank, count = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=_JOIN_SECONDS))))  # type: ignore[attr-defined]
    store = dist.PrefixStore(f"attempt-{launch.attempt}", store)  # type: ignore[attr-defined]  # a restart finds the store as it was left
    own = dist.PrefixStore("training", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=own, rank=rank, world_size=count)
    made: Store = store.clone()  # type: ignore[attr-defined]  # with a connection of its own: nobody waits in it
    return made


class Watch:
    """Counts aloud for this rank and listens to the others, in a thread; ends the process when one falls
    silent.
    """

    def __init__(self, store: Store, ranks: Ranks, silence_seconds: float) -> None:
        self._store, self._ranks, self._silence = store, ranks, silence_seconds
        self._others = [rank for rank in range(ranks.count) if rank != ranks.rank]
        self._heard: dict[int, tuple[str, float]] = {}
        self._failed: dict[int, str] = {}
        self._stopped = threading.Event()
        self._rounds = 0
        self._store.set(_key("beat", ranks.rank), "0")
        self._thread = threading.Thread(target=self._run, name="watch-ranks", daemon=True)
        self._thread.start()
        threading.Thread(target=self._watch_store, name="watch-store", daemon=True).start()

    def stop(self, *, left: bool = False) -> None:
        """Stop watching; `left`: and say that this rank went as it should."""
        self._stopped.set()
        if self._thread is not threading.current_thread():
            self._thread.join(
                self._silence
            )  # a thread that is inside the store when the interpreter ends takes the process with it
        if left:
            self._set("beat", "left")

    def tell_failure(self, error: Exception) -> None:
        """Let the others know why this rank ends."""
        if not _is_from_communication(error):
            self._set("failed", json.dumps({"kind": type(error).__name__, "message": str(error)}))

    def failure_of(self, rank: int, seconds: float) -> str | None:
        """What a rank said of its end, as soon as it says it within so many seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if (said := self._get("failed", rank)) is not None:
                return str(json.loads(said)["message"])
            time.sleep(_BEAT_SECONDS / 5)
        return None

    def who_is_lost(self) -> str:
        """Which rank ended, in words; waits until one has been silent for long enough to know."""
        end = time.monotonic() + self._silence
        while time.monotonic() < end:
            for rank in self._others:
                if (said := self._get("failed", rank)) is not None:
                    return f"rank {rank} failed: {json.loads(said)['message']}"
            silent = self._silent_for(self._silence / 2)
            if silent:
                return f"{_named(silent)} died or cannot be reached; the run ends here. {_RESUME}"
            time.sleep(_BEAT_SECONDS / 5)
        return f"the connection to another rank broke. {_RESUME}"

    def _run(self) -> None:
        count = 0
        while not self._stopped.wait(_BEAT_SECONDS):
            count += 1
            try:
                self._set("beat", str(count))
                self._listen()
            except (RuntimeError, ConnectionError):
                self._end(f"the launcher of rank {self._ranks.rank} cannot be reached any more. {_RESUME}")
            self._rounds = count
            silent = self._silent_for(self._silence)
            if silent:
                self._end(
                    f"{_named(silent)} has not been heard of for {self._silence:g} s; the run ends here. {_RESUME}"
                )

    def _watch_store(self) -> None:
        """A store that lies beyond a broken network does not answer and does not fail: nobody is heard then,
        and no call returns.

        Waits are counted, not measured, so that a process that was stopped for a while and goes on does not
        blame the store.
        """
        known, waits = -1, 0
        while not self._stopped.wait(_BEAT_SECONDS):
            waits = waits + 1 if known == self._rounds else 0
            known = self._rounds
            if waits * _BEAT_SECONDS >= self._silence:
                self._end(
                    f"the launcher of rank {self._ranks.rank} cannot be reached: no answer for {self._silence:g} s. {_RESUME}"
                )

    def _listen(self) -> None:
        for rank in self._others:
            beat = self._get("beat", rank) or ""
            if beat != self._heard.get(rank, ("never", 0.0))[0]:
                self._heard[rank] = (beat, time.monotonic())

    def _silent_for(self, seconds: float) -> list[int]:
        now = time.monotonic()
        return [
            rank
            for rank, (beat, when) in list(self._heard.items())
            if beat not in ("left", "") and now - when > seconds
        ]

    def _end(self, message: str) -> None:
        if not self._stopped.is_set():
            print(f"error: rank {self._ranks.rank}: {message}", file=sys.stderr, flush=True)
            os._exit(_DEAD_STATUS)  # the main thread is inside a collective that will not return

    def _set(self, kind: str, value: str) -> None:
        self._store.set(_key(kind, self._ranks.rank), value)

    def _get(self, kind: str, rank: int) -> str | None:
        key = _key(kind, rank)
        return self._store.get(key).decode() if self._store.check([key]) else None


_RESUME = "Go on from the newest checkpoint with --resume auto"


def _key(kind: str, rank: int) -> str:
    return f"llm-trainer/{kind}/{rank}"


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _is_from_communication(error: Exception) -> bool:
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )


def _leave_speech_to_main(watch: Watch, ranks: Ranks, error: Exception) -> None:
    """What goes wrong alike on all ranks is said once: raises SystemExit where the main rank says the same."""
    if (
        isinstance(error, LLMTrainerError)
        and not ranks.is_main
        and watch.failure_of(0, seconds=2) == str(error)
    ):
        raise SystemExit(error.exit_status) from error
