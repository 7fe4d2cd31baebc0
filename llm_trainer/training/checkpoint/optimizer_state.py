"""Optimizers' state as tensors with names, in safetensors files, and back to the bit on any number of ranks.

Names are those of `torch.distributed.checkpoint.state_dict` (`state.<parameter>.<key>`), and the files are in the form of its
HuggingFaceStorageWriter: one file of whole tensors, or, where ranks hold shards, a file from each with the places of its pieces in the
header; torch's reader loads either (tests do). They are written and read with safetensors itself: importing
`torch.distributed.checkpoint` costs a second (it draws in sympy and DTensor), its save 50 ms against 10, and ours reads of each file
only what the rank needs. `get_optimizer_state_dict` is not used either: on an optimizer that has not stepped it makes a step with zero
gradients, so that a checkpoint of step 0 would say step 1.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llm_trainer.distributed.parallelize import (
    LocalShard,
    assemble_like,
    distribute_like,
    is_on_other_stage,
    local_shard,
)
from llm_trainer.errors import CheckpointError
from llm_trainer.model.module_names import canonical_name
from llm_trainer.run_dir import JSON

Held = tuple[str, Tensor, torch.optim.Optimizer, dict[str, Any]]

TENSORS_FILE = "model-00001-of-00001.safetensors"
_PLACES = "DCP_SHARDING_INFO"  # torch.distributed.checkpoint's name for it


def optimizer_state(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> tuple[dict[str, Tensor], dict[str, JSON]]:
    """All state of `optimizers` by name: the tensors as they are held, cut over ranks or whole, and plain
    numbers as JSON.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, JSON] = {}
    for name, parameter, optimizer, _ in _held(model, optimizers):
        for key, value in _state_of(optimizer, parameter).items():
            if isinstance(value, Tensor):
                tensors[f"state.{name}.{key}"] = value.detach()
            else:
                scalars[f"state.{name}.{key}"] = value
    return tensors, scalars


def shard_file(rank: int, count: int) -> str:
    """The file that one of `count` ranks writes its pieces to."""
    return f"shard-{rank + 1:05d}-model-00001-of-{count:05d}.safetensors"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write whole tensors into a file; none for none."""
    if tensors:
        save_file({name: _alone(tensor) for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def write_pieces(path: Path, pieces: Mapping[str, LocalShard]) -> None:
    """Write one rank's pieces into a file, with their places in its header; none for none."""
    places = {name: {"saved_offsets": list(piece.offsets)} for name, piece in pieces.items()}
    if pieces:
        metadata = {"format": "pt", "DCP_VERSION": "1.0", _PLACES: json.dumps(places)}
        save_file({name: _alone(piece.values) for name, piece in pieces.items()}, path, metadata=metadata)


def load_optimizer_state(
    folder: Path, scalars: Mapping[str, JSON], model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    """Give `optimizers` the state that was written there, replacing theirs; their settings (rates, decay)
    stay.

    Each rank reads what it holds. Raises CheckpointError where a file is damaged, a name is no parameter that
    an optimizer holds, a shape is another, or a piece is missing.
    """
    held = {
        name: (parameter, optimizer, group) for name, parameter, optimizer, group in _held(model, optimizers)
    }
    elsewhere = {
        canonical_name(name) for name, parameter in model.named_parameters() if is_on_other_stage(parameter)
    } - held.keys()
    for _, optimizer, _ in held.values():
        optimizer.state.clear()
    with _reading(folder), contextlib.ExitStack() as files:
        stored = _stored_in(folder, files)
        for name in [*scalars, *stored]:
            parameter_name, _, key = name.removeprefix("state.").rpartition(".")
            if parameter_name in elsewhere:
                continue
            if parameter_name not in held:
                raise CheckpointError(
                    f"{folder} has optimizer state of {parameter_name!r}, which is not being trained now"
                )
            parameter, optimizer, group = held[parameter_name]
            if name in scalars:
                optimizer.state[parameter][key] = scalars[name]
                continue
            shape = stored[name].shape
            if shape and shape != tuple(parameter.shape):
                raise CheckpointError(
                    f"{folder}: {name} has shape {shape}, the parameter {tuple(parameter.shape)}"
                )
            optimizer.state[parameter][key] = _as_held(
                stored[name], parameter, _device_of(key, parameter, group)
            )


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that was written there, whole, by name."""
    with _reading(folder), contextlib.ExitStack() as files:
        for name, stored in _stored_in(folder, files).items():
            yield name, stored.read([0] * len(stored.shape), stored.shape)


class _Stored:
    """A tensor that lies in pieces in one file or several."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._pieces: list[
            tuple[Any, tuple[int, ...], tuple[int, ...]]
        ] = []  # a slice of safetensors', its place, its shape

    def add(self, values: Any, offsets: Sequence[int]) -> None:
        """Another piece."""
        self._pieces.append((values, tuple(offsets), tuple(values.get_shape())))

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole tensor's."""
        ends = [
            [offset + size for offset, size in zip(place, shape, strict=True)]
            for _, place, shape in self._pieces
        ]
        return tuple(max(of_dimension) for of_dimension in zip(*ends, strict=True))

    def read(self, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """A part of it, with memory of its own: safetensors maps the file, which rotation will delete."""
        if not sizes:
            number: Tensor = self._pieces[0][0][...].clone()
            return number
        part: Tensor | None = None
        missing = math.prod(sizes)
        for values, place, shape in self._pieces:
            first = [max(a, b) for a, b in zip(offsets, place, strict=True)]
            last = [min(a + n, b + m) for a, n, b, m in zip(offsets, sizes, place, shape, strict=True)]
            if any(a >= b for a, b in zip(first, last, strict=True)):
                continue
            found = values[tuple(slice(a - at, b - at) for a, b, at in zip(first, last, place, strict=True))]
            part = torch.empty(tuple(sizes), dtype=found.dtype) if part is None else part
            part[tuple(slice(a - at, b - at) for a, b, at in zip(first, last, offsets, strict=True))] = found
            missing -= found.numel()
        if missing > 0:
            raise CheckpointError(
                f"{self.name} is not whole: {missing:,} of its numbers are in no file; take another checkpoint"
            )
        return torch.empty(tuple(sizes)) if part is None else part


def _stored_in(folder: Path, files: contextlib.ExitStack) -> dict[str, _Stored]:
    """Every tensor of the folder by name; `files` keeps them open."""
    stored: dict[str, _Stored] = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = files.enter_context(safe_open(path, framework="pt"))
        places = json.loads((file.metadata() or {}).get(_PLACES, "{}"))
        for name in file.keys():  # noqa: SIM118  # not a dictionary
            values = file.get_slice(name)
            offsets = places[name]["saved_offsets"] if name in places else [0] * len(values.get_shape())
            stored.setdefault(name, _Stored(name)).add(values, offsets)
    return stored


def _as_held(stored: _Stored, parameter: Tensor, device: torch.device) -> Tensor:
    """A parameter's state, cut as the parameter is cut; a number for the whole parameter (a count of steps)
    is whole.
    """
    wanted = local_shard(parameter.detach()) if stored.shape else None
    if wanted is None or not hasattr(parameter, "full_tensor"):
        return stored.read([0] * len(stored.shape), stored.shape).to(device)
    if tuple(wanted.values.shape) == wanted.shape:  # whole, or gathered because its shards interleave
        return distribute_like(stored.read(wanted.offsets, wanted.shape).to(device), parameter)
    return assemble_like(stored.read(wanted.offsets, wanted.values.shape).to(device), parameter)


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"the optimizer state in {folder} is damaged: {error}") from error


def _held(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[Held]:
    """Each parameter that is being trained: its name, itself, its optimizer, its group."""
    names = {id(parameter): canonical_name(name) for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assert id(parameter) in names, "an optimizer holds a parameter that is not the model's"
                yield names[id(parameter)], parameter, optimizer, group


def _state_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    return dict(optimizer.state.get(parameter, {}))  # state is a defaultdict: a look-up would add an entry


def _alone(tensor: Tensor) -> Tensor:
    """The tensor with storage of its own, which is what safetensors takes."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _device_of(key: str, parameter: Tensor, group: Mapping[str, Any]) -> torch.device:
    """Where torch keeps this state: the step counter beside the parameter only for fused and capturable
    optimizers.
    """
    beside = key != "step" or group.get("fused") or group.get("capturable")
    return parameter.device if beside else torch.device("cpu")
