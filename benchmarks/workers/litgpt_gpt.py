"""LitGPT's GPT in Pythia's style (LayerNorm, GELU MLP, rotary positions on a quarter of each head; its head is never tied)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from litgpt import GPT, Config
from litgpt.utils import chunked_cross_entropy

from workers.plain import steps
from workers.serving import Run, serve
from workers.shapes import Shape


def build(shape: Shape, precision: str, compiled: bool) -> Run:
    """Its own pretraining's loss (`chunked_cross_entropy` without chunks)."""
    torch.manual_seed(0)
    config = Config(
        block_size=shape.context,
        vocab_size=shape.vocabulary,
        padded_vocab_size=shape.vocabulary,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_embd=shape.width,
        parallel_residual=False,
    )
    model = GPT(config)
    called = torch.compile(model) if compiled else model

    def loss(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return chunked_cross_entropy(called(ids), labels, chunk_size=0)

    return steps(model, loss, shape, precision)


if __name__ == "__main__":
    serve(build)
