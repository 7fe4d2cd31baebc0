"""torch.compile where it pays: a block as one graph that every layer uses, or all blocks of a small model.

By block, the time to compile does not grow with depth. A shallow, narrow model spends much of its step on
Python calls, and for it one graph of all blocks is a fifth faster still (4 layers of width 128: 37 thousand
tokens per second against 30). The head and its loss are not compiled. Over a large vocabulary the loss is the
chunked one, which is as fast without a compiler (`objectives/cross_entropy.py`); over a small one it is a
hundredth of the step. Validation runs uncompiled. So a run compiles one graph, and the shapes of validation
batches cannot add others.

Functions are replaced, not modules, so that weights keep their names (`_orig_mod.` in checkpoints is
nanoGPT#325).
"""

from __future__ import annotations

import shutil
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from llm_trainer.config.environment import compile_cache_dir
from llm_trainer.model.transformer import Transformer

CompileMode = Literal["off", "blocks", "stack"]

_STACK_LAYERS = 6
_STACK_FEATURES = 1 << 19  # tokens × width of a micro-batch
# A library that has not changed for so long is not being linked by another process.
_LINKING_SECONDS = 10.0


def has_compiler() -> bool:
    """Whether the C++ compiler that torch.compile calls is installed."""
    return shutil.which("clang++" if sys.platform == "darwin" else "g++") is not None


def best_mode(model: Transformer, tokens: int) -> CompileMode:
    """The compile mode for a model.

    Args:
        model: The model.
        tokens: Tokens in a micro-batch.
    """
    config = model.config
    is_small = config.num_hidden_layers <= _STACK_LAYERS and tokens * config.hidden_size <= _STACK_FEATURES
    return "stack" if is_small and not config.gradient_checkpointing else "blocks"


def compile_model(model: Transformer, mode: CompileMode) -> None:
    """Replace the functions that a mode compiles. Compilation itself happens at the first call.

    Args:
        model: The model.
        mode: `blocks`, `stack` (all blocks as one graph) or `off`.
    """
    if mode != "off":
        remove_broken_libraries(compile_cache_dir())
    if mode == "stack":
        model.hidden_states = torch.compile(model.hidden_states, dynamic=False)  # type: ignore[method-assign]
    elif mode == "blocks":
        for block in model.blocks:
            block.forward = torch.compile(block.forward, dynamic=False)


def undo_compile(model: Transformer) -> None:
    """Restore the functions that `compile_model` replaced.

    Args:
        model: The model.
    """
    model.__dict__.pop("hidden_states", None)
    for block in model.blocks:
        block.__dict__.pop("forward", None)


def remove_broken_libraries(cache: Path) -> list[Path]:
    """Delete libraries in PyTorch's compile cache that a killed process left empty or cut short.

    PyTorch links a library under its final name. One that was cut short fails to load ("file too short") in
    every later run, and PyTorch does not compile it again. This has to happen before the first compilation of
    a process: PyTorch takes a library of its own checks that does not load for a missing instruction set.

    Args:
        cache: The folder, `TORCHINDUCTOR_CACHE_DIR`.

    Returns:
        The files that were deleted.
    """
    broken = [library for library in cache.glob("*/*.so") if not _is_complete_library(library)]
    if broken:
        newest = max((_modified(library) for library in broken), default=0.0)
        time.sleep(max(0.0, min(_LINKING_SECONDS, newest + _LINKING_SECONDS - time.time())))
    broken = [library for library in broken if not _is_complete_library(library)]
    for library in broken:
        library.unlink(missing_ok=True)
    return broken


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _is_complete_library(path: Path) -> bool:
    """Whether an ELF file is as long as its header says; the table of sections is its end. Files of other
    kinds are only checked for being empty.
    """
    try:
        with path.open("rb") as file:
            header = file.read(64)
        size = path.stat().st_size
    except OSError:
        return True  # another process is at it
    if header[:5] != b"\x7fELF\x02":  # ELF, 64 bits
        return size > 0 and not b"\x7fELF".startswith(header[:4])
    if len(header) < 64:
        return False
    (sections_at,) = struct.unpack_from("<Q", header, 40)
    section_bytes, sections = struct.unpack_from("<HH", header, 58)
    return bool(size >= sections_at + section_bytes * sections > 0)


@contextmanager
def uncompiled(mode: CompileMode) -> Iterator[None]:
    """A context in which compiled functions run uncompiled.

    Args:
        mode: How the model is compiled.
    """
    if mode == "off":
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
