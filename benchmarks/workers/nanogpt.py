"""nanoGPT's model and optimizer from the clone that the environment variable NANOGPT names, in fp32 and
eager, as its README runs it on a CPU.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, os.environ["NANOGPT"])

import torch

from model import GPT, GPTConfig
from workers.plain import steps
from workers.serving import Request, Run, serve


def build(request: Request) -> Run:
    """Build its own model, loss and optimizer; the embedding is always tied."""
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(
            block_size=request.shape.context,
            vocab_size=request.shape.vocabulary,
            n_layer=request.shape.layers,
            n_head=request.shape.heads,
            n_embd=request.shape.width,
            dropout=0.0,
            bias=False,
        )
    )
    called = torch.compile(model) if request.compiled else model
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    return steps(
        model, lambda ids, labels: called(ids, labels)[1], request.shape, request.precision, optimizer
    )


if __name__ == "__main__":
    serve(build)
