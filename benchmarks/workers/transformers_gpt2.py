"""transformers' GPT-2 with exact GELU, SDPA attention (its default) and no dropout."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from workers.plain import steps
from workers.serving import Request, Run, serve


def build(request: Request) -> Run:
    """Build it with its own loss and without the KV cache."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=request.shape.vocabulary,
        n_positions=request.shape.context,
        n_embd=request.shape.width,
        n_layer=request.shape.layers,
        n_head=request.shape.heads,
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=request.shape.tied,
        use_cache=False,
        attn_implementation=request.attention or None,
    )
    model = GPT2LMHeadModel(config)
    called = torch.compile(model) if request.compiled else model

    def loss(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return called(input_ids=ids, labels=labels, shift_labels=labels).loss

    return steps(model, loss, request.shape, request.precision)


if __name__ == "__main__":
    serve(build)
