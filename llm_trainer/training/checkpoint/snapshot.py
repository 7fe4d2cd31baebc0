"""What one rank writes of a run at a step's edge: taken there, written then or later, in a thread while the
run goes on.

Where nothing is cut over ranks the main one writes all. Where ranks hold shards each writes its part: of the
weights whole tensors, gathered one at a time (as much traffic as a forward pass), so that the folder is the
same model folder that one process writes; of the optimizer the pieces that it holds, which costs no traffic
at all. In a pipeline each stage writes its own and sends nothing to others. A save that is written later is
made from copies in the host's memory, as large as this rank's part: weights and optimizer state, which is 12
bytes a parameter under AdamW. A base in four bits is copied as the floats that are written, a matrix at a
time.
"""

from __future__ import annotations

import functools
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from llm_trainer.config import RunConfig
from llm_trainer.distributed.parallelize import (
    LocalShard,
    full_tensor,
    is_on_other_stage,
    is_shard_writer,
    is_sharded,
    local_shard,
)
from llm_trainer.distributed.process_group import ProcessGroup
from llm_trainer.model.adapters.nf4 import dequantize
from llm_trainer.model.hf.checkpoint import (
    WeightLayout,
    metadata_files,
    named_weights,
    weight_layout,
    write_weights,
)
from llm_trainer.run_dir import JSON, OPTIMIZER_FOLDER, RANDOM_FILE, RUN_FILE, STATE_FILE
from llm_trainer.training.checkpoint.optimizer_state import (
    TENSORS_FILE,
    optimizer_state,
    shard_file,
    write_pieces,
    write_tensors,
)
from llm_trainer.training.checkpoint.rng_state import random_state

OPTIMIZER_SCALARS = "optimizer_scalars"
_RECORDED_PACKAGES = ("llm-trainer", "torch", "safetensors", "tokenizers", "numpy")


class SavedTokenizer(Protocol):
    """What a checkpoint needs of a tokenizer."""

    @property
    def bos_id(self) -> int | None:
        """Begin of text."""

    @property
    def eos_id(self) -> int | None:
        """End of text."""

    @property
    def pad_id(self) -> int | None:
        """Filling."""

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and what belongs to it."""


@dataclass(frozen=True)
class Snapshot:
    """A run at a step's edge. `state` is JSON and holds at least `step`; non-finite numbers in it survive.

    On several `ranks` all save together: each writes what it holds of what is cut over them, the main one the
    rest.
    """

    model: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    state: Mapping[str, JSON]
    config: RunConfig
    tokenizer: SavedTokenizer | None
    process_group: ProcessGroup = field(default_factory=ProcessGroup)

    @property
    def step(self) -> int:
        """The updates done."""
        step = self.state.get("step")
        assert isinstance(step, int), "a snapshot's state holds its step"
        return step

    @property
    def nbytes(self) -> int:
        """Of weights and optimizer state on this rank."""
        tensors = [
            *self.model.parameters(),
            *self.model.buffers(),
            *optimizer_state(self.model, self.optimizers)[0].values(),
        ]
        return sum(_held_part(tensor).nbytes for tensor in tensors)


class HostCopies:
    """The memory that copies are made into, kept from save to save: pages new to the process cost twenty
    times the copying.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def of(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of the tensor, in place of the earlier one of this name; done when `finish` returns."""
        kept = self._kept.get(name)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = self._kept[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return kept.copy_(tensor, non_blocking=True)

    @property
    def are_made(self) -> bool:
        """Whether the memory has been taken already."""
        return bool(self._kept)

    def finish(self) -> None:
        """Until the copies are made."""
        if any(tensor.is_pinned() for tensor in self._kept.values()):
            torch.cuda.current_stream().synchronize()


@dataclass(frozen=True)
class Capture:
    """The part of a snapshot that this rank writes; `texts` are the main rank's, by file name."""

    layout: WeightLayout
    files: Sequence[str]
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, LocalShard]
    is_cut: bool
    texts: Mapping[str, str]
    tokenizer: SavedTokenizer | None
    process_group: ProcessGroup
    version: tuple[tuple[int, int], ...]

    def is_of(self, snapshot: Snapshot) -> bool:
        """Whether weights and optimizer state of the snapshot are still those that were taken."""
        return self.version == _version(snapshot)

    @property
    def nbytes(self) -> int:
        """How much this rank writes."""
        return sum(
            tensor.nbytes
            for tensor in [*self.weights.values(), *(piece.values for piece in self.optimizer.values())]
        )

    def write(self, folder: Path) -> list[Path]:
        """Write this rank's files into `folder`, which has the optimizer's folder already; which they are."""
        written = []
        for name in self.files:
            write_weights(folder / name, self.layout.files[name], self.weights)
            written.append(folder / name)
        if self.optimizer:
            place = folder / OPTIMIZER_FOLDER
            if self.is_cut:
                place /= shard_file(self.process_group.rank, self.process_group.world_size)
                write_pieces(place, self.optimizer)
            else:
                place /= TENSORS_FILE
                write_tensors(place, {name: piece.values for name, piece in self.optimizer.items()})
            written.append(place)
        return written


def capture(snapshot: Snapshot, step: int, copies: HostCopies | None = None) -> Capture:
    """Take what this rank writes: into `copies`, or as it lies there, to be written before the next step. A
    collective call.
    """
    process_group, holders = snapshot.process_group, _holders(snapshot)
    is_cut = is_sharded(snapshot.model) or bool(holders)
    layout = weight_layout(
        snapshot.model,
        num_writers=process_group.world_size if is_cut else 1,
        writers=_stage_ranks(holders, process_group) if holders else None,
    )
    files = [name for name, writer in layout.writer_of.items() if writer == process_group.rank]
    wanted = {name for file in files for entry in layout.files[file] for name in entry.names}
    weights: dict[str, Tensor] = {}
    for name, tensor in named_weights(snapshot.model).items():
        if is_on_other_stage(tensor):
            continue
        value = full_tensor(tensor)
        if name in wanted:
            weights[name] = copies.of(name, dequantize(value)) if copies else value.cpu() if is_cut else value
    tensors, _ = optimizer_state(snapshot.model, snapshot.optimizers)
    optimizer: dict[str, LocalShard] = {}
    for name, tensor in tensors.items():
        piece = local_shard(tensor)
        if _writes(name, tensor, process_group, holders) and piece.values.numel():
            optimizer[name] = piece._replace(values=copies.of(name, piece.values)) if copies else piece
    if copies:
        copies.finish()
    texts = _texts(snapshot, step, layout)
    return Capture(
        layout,
        files,
        weights,
        optimizer,
        is_cut,
        texts,
        snapshot.tokenizer if process_group.is_main else None,
        process_group,
        _version(snapshot),
    )


def _holders(snapshot: Snapshot) -> dict[str, int]:
    """In a pipeline, the first rank that holds each parameter; empty elsewhere. A collective call."""
    if snapshot.process_group.plan.pipeline_parallel == 1:
        return {}
    own = [
        name for name, parameter in named_weights(snapshot.model).items() if not is_on_other_stage(parameter)
    ]
    holders: dict[str, int] = {}
    for rank, names in enumerate(map(json.loads, snapshot.process_group.all_gather_text(json.dumps(own)))):
        for name in names:
            holders.setdefault(name, rank)
    return holders


def _stage_ranks(holders: Mapping[str, int], process_group: ProcessGroup) -> dict[str, list[int]]:
    """The ranks of the stage that each parameter is on, the first of its stages where it is on two."""
    stage_of = process_group.plan.stage
    return {
        name: [rank for rank in range(process_group.world_size) if stage_of(rank) == stage_of(holder)]
        for name, holder in holders.items()
    }


def _writes(name: str, tensor: Tensor, process_group: ProcessGroup, holders: Mapping[str, int]) -> bool:
    """Whether this rank writes what it holds of a tensor of the optimizer."""
    if not holders:
        return is_shard_writer(tensor, process_group.rank)
    holder = holders[name.removeprefix("state.").rpartition(".")[0]]
    is_cut = hasattr(tensor, "full_tensor")
    return process_group.plan.stage(process_group.rank) == process_group.plan.stage(holder) and (
        is_shard_writer(tensor, process_group.rank) if is_cut else process_group.rank == holder
    )


def described_anew(taken: Capture, snapshot: Snapshot, step: int) -> Capture:
    """The same tensors with what a snapshot says now. A collective call."""
    return replace(taken, texts=_texts(snapshot, step, taken.layout))


def has_spare_core(snapshot: Snapshot) -> bool:
    """Whether a thread that writes takes no time from those that train: on an accelerator, or where these
    leave a core free.

    Where they do not, a save in the background loses a run as much time as one that it waits for (4.6 s
    against 4.0 to 5.4 for 98 M parameters on two cores), and the copies would be for nothing; with one of the
    two to spare it loses 2.9 s against 5.2.
    """
    on_processor = next(snapshot.model.parameters()).device.type == "cpu"
    return (
        not on_processor
        or (os.cpu_count() or 1) > torch.get_num_threads() * snapshot.process_group.world_size
    )


def host_memory_left() -> int:
    """Bytes that processes of this machine can still take."""
    import psutil

    return int(psutil.virtual_memory().available)


def _version(snapshot: Snapshot) -> tuple[tuple[int, int], ...]:
    """Changes whenever weights or optimizer state do: the step, which tensors they are, and how often each
    was written to.

    The step says most: fused optimizers write to weights without their being counted (torch 2.13).
    """
    state = (
        value
        for one in snapshot.optimizers
        for held in one.state.values()
        for value in held.values()
        if isinstance(value, Tensor)
    )
    tensors = [*snapshot.model.parameters(), *state]
    return (
        (snapshot.step, len(tensors)),
        *((id(tensor), _held_part(tensor.detach())._version) for tensor in tensors),
    )


def _texts(snapshot: Snapshot, step: int, layout: WeightLayout) -> dict[str, str]:
    """On the main rank every file but the tensors and the tokenizer, written out now: the state they tell of
    is changing.
    """
    generators = snapshot.process_group.all_gather_text(json.dumps(random_state()))
    if not snapshot.process_group.is_main:
        return {}
    scalars = optimizer_state(snapshot.model, snapshot.optimizers)[1]
    tokenizer = snapshot.tokenizer
    ids = (
        {}
        if tokenizer is None
        else {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    )
    return metadata_files(snapshot.model, layout, **ids) | {
        STATE_FILE: json_text({**snapshot.state, "step": step, OPTIMIZER_SCALARS: scalars}),
        RUN_FILE: run_text(snapshot.config),
        RANDOM_FILE: json_text({"ranks": [json.loads(one) for one in generators]}),
    }


def run_text(config: RunConfig) -> str:
    """`run.json`: every setting as it was resolved, and the versions that the run was made with."""
    return json_text({**config.model_dump(mode="json"), "versions": versions()})


@functools.cache
def versions() -> dict[str, str]:
    """Python and the packages whose version can change a number."""
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _RECORDED_PACKAGES},
    }


def json_text(value: Mapping[str, JSON]) -> str:
    """A JSON object whose floats come back to the bit."""
    return json.dumps(_spelled(value), indent=1, allow_nan=False) + "\n"


def _held_part(tensor: Tensor) -> Tensor:
    return local_shard(tensor).values if hasattr(tensor, "full_tensor") else tensor


def _spelled(value: JSON) -> JSON:
    """JSON has no infinities and no NaN: they become {"float": "inf"}. Other floats survive JSON to the bit."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, Mapping):
        return {str(name): _spelled(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_spelled(item) for item in value]
    return value
