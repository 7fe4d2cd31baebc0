"""The training step of the peers: autocast, mean cross-entropy, clipping at 1, fused AdamW.

It is their fastest known method, and equivalent to ours.

(transformers' Trainer and LitGPT's Fabric loop do the same and more; leaving that out favors
them.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from workers.serving import Run
from workers.shapes import Shape

Loss = Callable[
    [torch.Tensor, torch.Tensor], torch.Tensor
]  # ids (B, T), labels (B, T) already shifted → mean loss


def steps(
    model: torch.nn.Module,
    loss: Loss,
    shape: Shape,
    precision: str,
    optimizer: torch.optim.Optimizer | None = None,
) -> Run:
    """Return a function that runs training steps on random tokens."""
    ids = torch.randint(
        shape.vocabulary, (shape.batch, shape.context + 1), generator=torch.Generator().manual_seed(1)
    )
    inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    parameters = list(model.parameters())
    optimizer = optimizer or torch.optim.AdamW(
        parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    model.train()

    def run(count: int) -> None:
        for _ in range(count):
            with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext():
                value = loss(inputs, labels)
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run
