"""LitGPT's GPT in Pythia's style (LayerNorm, GELU MLP, rotary positions on a quarter of each head; its head
is never tied).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from litgpt import GPT, Config
from litgpt.utils import chunked_cross_entropy

from workers.plain import steps
from workers.serving import Request, Run, serve


def build(request: Request) -> Run:
    """Build it with the loss of its pretraining (`chunked_cross_entropy` without chunks)."""
    torch.manual_seed(0)
    config = Config(
        block_size=request.shape.context,
        vocab_size=request.shape.vocabulary,
        padded_vocab_size=request.shape.vocabulary,
        n_layer=request.shape.layers,
        n_head=request.shape.heads,
        n_embd=request.shape.width,
        parallel_residual=False,
    )
    model = GPT(config)
    called = torch.compile(model) if request.compiled else model

    def loss(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return chunked_cross_entropy(called(ids), labels, chunk_size=0)

    return steps(model, loss, request.shape, request.precision)


if __name__ == "__main__":
    serve(build)
