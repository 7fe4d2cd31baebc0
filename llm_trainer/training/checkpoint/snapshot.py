"""What one rank writes of a checkpoint: a snapshot taken between two steps, written now or asynchronously.

Without sharding the main rank writes everything. With sharding each rank writes a part. Of the weights these
are full tensors, gathered one at a time (as much traffic as a forward pass), so that the folder is the same
model folder that one process writes. Of the optimizer state they are the shards that the rank holds, which
costs no traffic. In a pipeline each stage writes its own parameters and sends nothing.

An asynchronous save is written from copies in host memory. They are as large as this rank's part: weights and
optimizer state, 12 bytes per parameter under AdamW. A base model in four bits is copied as the floats that
are written, one matrix at a time.
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
from llm_trainer.model.hf.generation_config import GenerationDefaults
from llm_trainer.run_dir import JSON, OPTIMIZER_FOLDER, RANDOM_FILE, RUN_FILE, STATE_FILE
from llm_trainer.training.checkpoint.optimizer_state import (
    TENSORS_FILE,
    optimizer_state,
    shard_file,
    write_shards,
    write_tensors,
)
from llm_trainer.training.checkpoint.rng_state import get_rng_state

OPTIMIZER_SCALARS = "optimizer_scalars"
_RECORDED_PACKAGES = ("llm-trainer", "torch", "safetensors", "tokenizers", "numpy")


class SavedTokenizer(Protocol):
    """What a checkpoint needs of a tokenizer."""

    @property
    def bos_id(self) -> int | None:
        """Id of the beginning-of-text token."""

    @property
    def eos_id(self) -> int | None:
        """Id of the end-of-text token."""

    @property
    def pad_id(self) -> int | None:
        """Id of the padding token."""

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and its companions."""


@dataclass(frozen=True)
class CheckpointData:
    """What a checkpoint is made of, as it is between two steps. Nothing is copied.

    With several ranks all save together: each writes its shards, the main rank the rest.

    Attributes:
        model: The model, full or sharded.
        optimizers: Its optimizers.
        state: Contents of state.json, with at least `step`. Non-finite numbers in it are preserved.
        config: The settings, for run.json.
        tokenizer: The tokenizer that is saved with the model.
        process_group: The ranks.
        generation: What the base model says about generation, which is saved again.
    """

    model: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    state: Mapping[str, JSON]
    config: RunConfig
    tokenizer: SavedTokenizer | None
    process_group: ProcessGroup = field(default_factory=ProcessGroup)
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)

    @property
    def step(self) -> int:
        """Optimizer updates so far."""
        step = self.state.get("step")
        assert isinstance(step, int), "a snapshot's state holds its step"
        return step

    @property
    def nbytes(self) -> int:
        """Bytes of weights and optimizer state on this rank."""
        tensors = [
            *self.model.parameters(),
            *self.model.buffers(),
            *optimizer_state(self.model, self.optimizers)[0].values(),
        ]
        return sum(_local_part(tensor).nbytes for tensor in tensors)


class HostBuffers:
    """Host memory that copies are made into. It is kept from save to save, because memory that is new to a
    process costs twenty times as much as the copying.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """Copy a tensor into the buffer of this name.

        Args:
            name: Name of the buffer. A copy from an earlier save is overwritten.
            tensor: The tensor.

        Returns:
            The copy, complete after `synchronize`.
        """
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[name] = buffer
        return buffer.copy_(tensor, non_blocking=True)

    @property
    def is_allocated(self) -> bool:
        """Whether the memory has been allocated."""
        return bool(self._buffers)

    def synchronize(self) -> None:
        """Wait until all copies are complete."""
        if any(buffer.is_pinned() for buffer in self._buffers.values()):
            torch.cuda.current_stream().synchronize()


@dataclass(frozen=True)
class Snapshot:
    """The part of a checkpoint that this rank writes.

    Attributes:
        layout: Which weight is in which file, for all ranks.
        files: The weight files that this rank writes.
        weights: The weights in them.
        optimizer: This rank's shards of the optimizer state.
        is_sharded: Whether ranks hold different parameters or shards.
        text_files: On the main rank, the contents of all text files by name.
        tokenizer: On the main rank, the tokenizer.
        process_group: The ranks.
        version: Identifies the state of the tensors that were taken.
    """

    layout: WeightLayout
    files: Sequence[str]
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, LocalShard]
    is_sharded: bool
    text_files: Mapping[str, str]
    tokenizer: SavedTokenizer | None
    process_group: ProcessGroup
    version: tuple[tuple[int, int], ...]

    def matches(self, data: CheckpointData) -> bool:
        """Whether model and optimizers still hold the values that were taken.

        Args:
            data: What is to be saved now.
        """
        return self.version == _version(data)

    @property
    def nbytes(self) -> int:
        """Bytes that this rank writes."""
        return sum(
            tensor.nbytes
            for tensor in [*self.weights.values(), *(shard.values for shard in self.optimizer.values())]
        )

    def write(self, folder: Path) -> list[Path]:
        """Write this rank's tensor files.

        Args:
            folder: The checkpoint folder, which contains the folder of the optimizer already.

        Returns:
            The files.
        """
        written = []
        for name in self.files:
            write_weights(folder / name, self.layout.files[name], self.weights)
            written.append(folder / name)
        if self.optimizer:
            path = folder / OPTIMIZER_FOLDER
            if self.is_sharded:
                path /= shard_file(self.process_group.rank, self.process_group.world_size)
                write_shards(path, self.optimizer)
            else:
                path /= TENSORS_FILE
                write_tensors(path, {name: shard.values for name, shard in self.optimizer.items()})
            written.append(path)
        return written


def take_snapshot(data: CheckpointData, step: int, buffers: HostBuffers | None = None) -> Snapshot:
    """Take what this rank writes. A collective call.

    Args:
        data: What is to be saved.
        step: The step under which it is saved.
        buffers: Where copies are made, for a later write. Without buffers the snapshot may refer to the live
            tensors, and has to be written before the next step.

    Returns:
        The snapshot.
    """
    process_group, holders = data.process_group, _first_holders(data)
    has_shards = is_sharded(data.model) or bool(holders)
    layout = weight_layout(
        data.model,
        num_writers=process_group.world_size if has_shards else 1,
        writers=_stage_ranks(holders, process_group) if holders else None,
    )
    files = [name for name, writer in layout.writer_of.items() if writer == process_group.rank]
    wanted = {name for file in files for entry in layout.files[file] for name in entry.names}
    weights: dict[str, Tensor] = {}
    for name, tensor in named_weights(data.model).items():
        if is_on_other_stage(tensor):
            continue
        value = full_tensor(tensor)
        if name not in wanted:
            continue
        if buffers:
            weights[name] = buffers.copy(name, dequantize(value))
        else:
            weights[name] = value.cpu() if has_shards else value
    tensors, _ = optimizer_state(data.model, data.optimizers)
    optimizer: dict[str, LocalShard] = {}
    for name, tensor in tensors.items():
        shard = local_shard(tensor)
        if _is_writer(name, tensor, process_group, holders) and shard.values.numel():
            optimizer[name] = shard._replace(values=buffers.copy(name, shard.values)) if buffers else shard
    if buffers:
        buffers.synchronize()
    return Snapshot(
        layout,
        files,
        weights,
        optimizer,
        has_shards,
        _text_files(data, step, layout),
        data.tokenizer if process_group.is_main else None,
        process_group,
        _version(data),
    )


def _first_holders(data: CheckpointData) -> dict[str, int]:
    """In a pipeline, the first rank that holds each parameter; empty elsewhere. A collective call."""
    if data.process_group.plan.pipeline_parallel == 1:
        return {}
    own = [name for name, parameter in named_weights(data.model).items() if not is_on_other_stage(parameter)]
    holders: dict[str, int] = {}
    for rank, names in enumerate(map(json.loads, data.process_group.all_gather_text(json.dumps(own)))):
        for name in names:
            holders.setdefault(name, rank)
    return holders


def _stage_ranks(holders: Mapping[str, int], process_group: ProcessGroup) -> dict[str, list[int]]:
    """The ranks of the stage that each parameter is on. For a parameter on two stages it is the first of
    them.
    """
    stage_of = process_group.plan.stage
    return {
        name: [rank for rank in range(process_group.world_size) if stage_of(rank) == stage_of(holder)]
        for name, holder in holders.items()
    }


def _is_writer(name: str, tensor: Tensor, process_group: ProcessGroup, holders: Mapping[str, int]) -> bool:
    """Whether this rank writes what it holds of a tensor of the optimizer."""
    if not holders:
        return is_shard_writer(tensor, process_group.rank)
    holder = holders[name.removeprefix("state.").rpartition(".")[0]]
    has_shards = hasattr(tensor, "full_tensor")
    return process_group.plan.stage(process_group.rank) == process_group.plan.stage(holder) and (
        is_shard_writer(tensor, process_group.rank) if has_shards else process_group.rank == holder
    )


def with_new_metadata(snapshot: Snapshot, data: CheckpointData, step: int) -> Snapshot:
    """The tensors of a snapshot with the present state, settings and generators. A collective call.

    Args:
        snapshot: A snapshot whose tensors have not changed since.
        data: What is to be saved now.
        step: The step under which it is saved.
    """
    return replace(snapshot, text_files=_text_files(data, step, snapshot.layout))


def has_spare_core(data: CheckpointData) -> bool:
    """Whether a writing thread takes no time from training: on an accelerator, or where training leaves a
    core free.

    Without a spare core an asynchronous save costs a run as much time as a synchronous one (4.6 s against
    4.0 to 5.4 for 98 M parameters on two cores), and the copies would gain nothing. With one of two cores
    free it costs 2.9 s against 5.2.

    Args:
        data: What is to be saved.
    """
    if next(data.model.parameters()).device.type != "cpu":
        return True
    return (os.cpu_count() or 1) > torch.get_num_threads() * data.process_group.world_size


def available_host_memory() -> int:
    """Bytes of host memory that can still be allocated on this machine."""
    import psutil

    return int(psutil.virtual_memory().available)


def _version(data: CheckpointData) -> tuple[tuple[int, int], ...]:
    """Changes whenever weights or optimizer state change: the step, the identity of the tensors, and torch's
    count of writes to each.

    The step matters most, because fused optimizers write to weights without counting it (torch 2.13).
    """
    state = (
        value
        for one in data.optimizers
        for held in one.state.values()
        for value in held.values()
        if isinstance(value, Tensor)
    )
    tensors = [*data.model.parameters(), *state]
    return (
        (data.step, len(tensors)),
        *((id(tensor), _local_part(tensor.detach())._version) for tensor in tensors),
    )


def _text_files(data: CheckpointData, step: int, layout: WeightLayout) -> dict[str, str]:
    """On the main rank all text files, as text: the state that they describe changes after this step."""
    generators = data.process_group.all_gather_text(json.dumps(get_rng_state()))
    if not data.process_group.is_main:
        return {}
    scalars = optimizer_state(data.model, data.optimizers)[1]
    tokenizer = data.tokenizer
    ids = (
        {}
        if tokenizer is None
        else {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    )
    return metadata_files(data.model, layout, **ids, generation=data.generation) | {
        STATE_FILE: json_text({**data.state, "step": step, OPTIMIZER_SCALARS: scalars}),
        RUN_FILE: run_json(data.config),
        RANDOM_FILE: json_text({"ranks": [json.loads(one) for one in generators]}),
    }


def run_json(config: RunConfig) -> str:
    """The text of `run.json`: every setting as it was resolved, and the versions of Python and packages.

    Args:
        config: The settings.
    """
    return json_text({**config.model_dump(mode="json"), "versions": versions()})


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number."""
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _RECORDED_PACKAGES},
    }


def json_text(value: Mapping[str, JSON]) -> str:
    """A JSON object whose floats are restored bit-exactly."""
    return json.dumps(_encode_floats(value), indent=1, allow_nan=False) + "\n"


def _local_part(tensor: Tensor) -> Tensor:
    return local_shard(tensor).values if hasattr(tensor, "full_tensor") else tensor


def _encode_floats(value: JSON) -> JSON:
    """Replace infinities and NaN, which JSON lacks, by {"float": "inf"}. Other floats are exact in JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, Mapping):
        return {str(name): _encode_floats(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_encode_floats(item) for item in value]
    return value
