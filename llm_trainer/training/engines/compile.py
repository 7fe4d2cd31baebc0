"""torch.compile where it pays: the blocks, as one graph that every layer shares, or a small model's whole
stack of them.

By block, warm-up does not grow with depth. A shallow, narrow model spends much of its step on calling things,
and there the stack as one graph is a fifth faster still (4 layers of 128: 37 thousand tokens/s against 30),
at a bounded depth. The head with its loss stays outside: over a large vocabulary it is the chunked loss,
which is as fast without a compiler (losses.py), over a small one it is a hundredth of the step. Validation
runs uncompiled, so a run compiles one graph and shapes of validation batches cannot add others.

Functions are replaced, not modules, so that weights keep their names (`_orig_mod.` in checkpoints is
nanoGPT#325).
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from llm_trainer.model.transformer import Transformer

CompileMode = Literal["off", "blocks", "stack"]

_STACK_LAYERS = 6
_STACK_FEATURES = 1 << 19  # tokens × width of a micro-batch


def has_compiler() -> bool:
    """Whether the compiler that torch.compile calls is installed."""
    return shutil.which("clang++" if sys.platform == "darwin" else "g++") is not None


def best_mode(model: Transformer, tokens: int) -> CompileMode:
    """How to compile this model for micro-batches of so many tokens."""
    config = model.config
    is_small = config.num_hidden_layers <= _STACK_LAYERS and tokens * config.hidden_size <= _STACK_FEATURES
    return "stack" if is_small and not config.gradient_checkpointing else "blocks"


def compile_model(model: Transformer, mode: CompileMode) -> None:
    """Replace the functions that `mode` compiles; compilation itself happens at the first call."""
    if mode == "stack":
        model.hidden_states = torch.compile(model.hidden_states, dynamic=False)  # type: ignore[method-assign]
    elif mode == "blocks":
        for block in model.blocks:
            block.forward = torch.compile(block.forward, dynamic=False)


def undo_compile(model: Transformer) -> None:
    """Put the functions back."""
    model.__dict__.pop("hidden_states", None)
    for block in model.blocks:
        block.__dict__.pop("forward", None)


@contextmanager
def uncompiled(mode: CompileMode) -> Iterator[None]:
    """Within, compiled functions run as if they were not."""
    if mode == "off":
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
