"""How tokens know where they stand and whom they see: rotary tables, positions inside documents, attention
masks.

All of it is computed once per forward pass, outside the blocks, and shared by every layer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from llm_trainer.config.schema.model import ModelConfig, RopeScaling


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of each pair of features, (D/2,) in fp32 (Su et al. 2021, arXiv:2104.09864),
    stretched as `rope_scaling` says.
    """
    scaling = config.rope_scaling
    theta = (
        scaling.rope_theta if scaling is not None and scaling.rope_theta is not None else config.rope_theta
    )
    exponents = torch.arange(0, config.head_width, 2, dtype=torch.int64).float() / config.head_width
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies
    return (
        frequencies / scaling.factor
        if scaling.kind == "linear"
        else _llama3_frequencies(frequencies, scaling)
    )


def _llama3_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's rule: short wavelengths stay, long ones are stretched by `factor`, those between are
    blended (arXiv:2407.21783).
    """
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    share_kept = (scaling.original_context / wavelengths - low) / (high - low)
    return torch.lerp(frequencies / scaling.factor, frequencies, share_kept.clamp(0, 1))


class Rotary(nn.Module):
    """Tables of cos and signed sin, (context, D): not saved, not trained, following the model's device and
    type.

    Features are paired as Hugging Face pairs them, i with i + D/2, so its weights load as they are. The
    rotation (x₁, x₂) → (x₁·cos − x₂·sin, x₂·cos + x₁·sin) is then x·cos + roll(x, D/2)·(−sin, sin): with the
    sign kept in the table it takes three passes over memory in eager mode and not five.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        for name in ("cos", "sin"):
            self.register_buffer(
                name, torch.empty(config.max_position_embeddings, config.head_width), persistent=False
            )
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Fill the tables; needed again after the module was built on the meta device."""
        if self.cos.is_meta:
            return
        frequencies = rotary_frequencies(self.config)
        angles = torch.outer(torch.arange(self.config.max_position_embeddings).float(), frequencies)
        self.cos.copy_(torch.cat((angles.cos(), angles.cos()), dim=-1))
        self.sin.copy_(torch.cat((-angles.sin(), angles.sin()), dim=-1))

    def forward(
        self, start: int, stop: int, positions: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Tables for slots start:stop, (T, 1, D), or for `positions` (B, T), (B, T, 1, D), in the type that
        attention computes in.
        """
        chosen = slice(start, stop) if positions is None else positions
        return self.cos[chosen].unsqueeze(-2).to(dtype), self.sin[chosen].unsqueeze(-2).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the features of x (B, T, H, D) by tables that broadcast over the heads."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)


def positions_in_documents(document_ids: Tensor) -> Tensor:
    """Each token's place in its own document, (B, T), where a document is a run of equal ids."""
    index = torch.arange(document_ids.size(1), device=document_ids.device).expand_as(document_ids)
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(begins, index, 0).cummax(dim=1).values


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `visible`, −∞ elsewhere. SDPA would make this of a boolean mask in every layer; made once, it
    is shared.
    """
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -math.inf)


def sequence_mask(
    count: int,
    window: int | None,
    document_ids: Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
    places: Tensor | None = None,
) -> Tensor | None:
    """Mask of a whole sequence, broadcastable to (B, 1, T, T); None where plain causal attention is meant,
    which needs no mask.

    window: a token sees so many tokens, itself included, as Mistral counts (arXiv:2310.06825). document_ids:
    (B, T); a token sees its own document only. places: (Q,), whose rows of the mask are wanted; none: all.
    """
    if document_ids is None and (window is None or count <= window):
        return None
    key = torch.arange(count, device=device)
    query = (key if places is None else places)[:, None]
    visible = key <= query
    if window is not None:
        visible &= key > query - window
    if document_ids is not None:
        of_queries = document_ids if places is None else document_ids[:, places]
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
    """Mask of queries at slots start:stop, or at `positions` (B, T), over cache slots 0:stop: a query sees
    the slots up to its own.

    None where every slot is seen (one new token) or where plain causal attention is the same thing (a first
    chunk).
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
