"""Positions and visibility: rotary tables, positions within documents, and attention masks.

All of it is computed once per forward pass, outside the blocks, and used by every layer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from llm_trainer.config.schema.model import ModelConfig, RopeScaling


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of each pair of features (Su et al. 2021, arXiv:2104.09864), scaled by
    `rope_scaling`.

    Args:
        config: The model's shape.

    Returns:
        (D/2,), fp32, in radians per token.
    """
    scaling = config.rope_scaling
    own_theta = None if scaling is None else scaling.rope_theta
    theta = config.rope_theta if own_theta is None else own_theta
    exponents = torch.arange(0, config.head_width, 2, dtype=torch.int64).float() / config.head_width
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    return _llama3_frequencies(frequencies, scaling)


def _llama3_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's rule: short wavelengths stay, long ones are stretched by `factor`, those between are
    blended (arXiv:2407.21783).
    """
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    fraction_kept = (scaling.original_context / wavelengths - low) / (high - low)
    return torch.lerp(frequencies / scaling.factor, frequencies, fraction_kept.clamp(0, 1))


class RotaryEmbedding(nn.Module):
    """Tables of cos and signed sin, (context, D).

    The tables are neither saved nor trained, and follow the model's device and type. Features are paired as
    Hugging Face pairs them, i with i + D/2, so that its weights load as they are. The rotation (x₁, x₂) →
    (x₁·cos − x₂·sin, x₂·cos + x₁·sin) is then x·cos + roll(x, D/2)·(−sin, sin): with the sign kept in the
    table it takes three passes over memory in eager mode instead of five.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        shape = (config.max_position_embeddings, config.head_width)
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(shape), persistent=False)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Fill the tables; this is needed again after the module was built on the meta device."""
        if self.cos.is_meta:
            return
        frequencies = rotary_frequencies(self.config)
        angles = torch.outer(torch.arange(self.config.max_position_embeddings).float(), frequencies)
        self.cos.copy_(torch.cat((angles.cos(), angles.cos()), dim=-1))
        self.sin.copy_(torch.cat((-angles.sin(), angles.sin()), dim=-1))

    def forward(
        self, start: int, stop: int, positions: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The rows of the tables for some tokens.

        Args:
            start: Position of the first token.
            stop: Position after the last token.
            positions: Position of each token, (B, T), instead of `start` and `stop`.
            dtype: The type that attention computes in.

        Returns:
            cos and sin, (T, 1, D) or (B, T, 1, D) each.
        """
        chosen = slice(start, stop) if positions is None else positions
        return self.cos[chosen].unsqueeze(-2).to(dtype), self.sin[chosen].unsqueeze(-2).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the features of x (B, T, H, D) by tables that broadcast over the heads."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)


def positions_in_documents(document_ids: Tensor) -> Tensor:
    """Each token's position in its own document.

    Args:
        document_ids: (B, T); a document is a run of equal ids.

    Returns:
        (B, T), int64, 0 at the first token of a document.
    """
    index = torch.arange(document_ids.size(1), device=document_ids.device).expand_as(document_ids)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `visible`, −∞ elsewhere.

    SDPA would make this of a boolean mask in every layer; here it is made once for all layers.
    """
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -math.inf)


def sequence_mask(
    count: int,
    window: int | None,
    document_ids: Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
    query_positions: Tensor | None = None,
) -> Tensor | None:
    """The attention mask of complete sequences.

    Args:
        count: T, the length of the sequences.
        window: Tokens that a query sees, itself included, as Mistral counts (arXiv:2310.06825). None:
            all.
        document_ids: (B, T); a token sees its own document only. None: each row is one document.
        device: Where the mask is made.
        dtype: Its type.
        query_positions: (Q,); the queries whose rows of the mask are wanted. None: all.

    Returns:
        An additive mask, broadcastable to (B, 1, Q, T), or None for plain causal attention, which needs no
        mask.
    """
    if document_ids is None and (window is None or count <= window):
        return None
    key = torch.arange(count, device=device)
    query = (key if query_positions is None else query_positions)[:, None]
    visible = key <= query
    if window is not None:
        visible &= key > query - window
    if document_ids is not None:
        of_queries = document_ids if query_positions is None else document_ids[:, query_positions]
        visible = visible & (of_queries[:, None, :, None] == document_ids[:, None, None, :])
    return additive_mask(visible, dtype)


def cache_mask(
    start: int,
    stop: int,
    positions: Tensor | None,
    window: int | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor | None:
    """The attention mask of new tokens over the slots of a cache; a query sees the slots up to its own.

    Args:
        start: Slot of the first query.
        stop: Slot after the last query; the mask covers slots 0:stop.
        positions: Slot of each query, (B, T), instead of `start` and `stop`.
        window: Tokens that a query sees, itself included. None: all.
        device: Where the mask is made.
        dtype: Its type.

    Returns:
        An additive mask, or None where every slot is visible (one new token) and where plain causal attention
        is the same (a first chunk).
    """
    count = stop - start
    if positions is None and (count == 1 or (start == 0 and (window is None or count <= window))):
        return None
    query = torch.arange(start, stop, device=device) if positions is None else positions
    slots = torch.arange(stop, device=device)
    visible = slots <= query[..., None]
    if window is not None:
        visible &= slots > query[..., None] - window
    return additive_mask(visible if positions is None else visible[:, None], dtype)
