"""The loop from prompts to answers: read all prompts at once, then one token a row and step, until every row
has ended.

Prompts of different lengths are padded on the right. Attention is causal, so a prompt never sees the padding
behind it, and the keys and values that the padding left in the cache are overwritten by the row's own tokens
before anything may look at them. (Padding on the left, as transformers does it, moves every position and has
to be masked in every step; transformers#22707.) A row that has ended leaves the batch, so the others do not
pay for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from llm_trainer.inference.cpu.lm_head import Head
from llm_trainer.inference.model_runner import DecodingStep
from llm_trainer.inference.sampling import Sampler
from llm_trainer.inference.sequence import GrowingAnswer
from llm_trainer.model.kv_cache import KVCache
from llm_trainer.model.transformer import Transformer


@torch.inference_mode()
def decode(
    model: Transformer, answers: Sequence[GrowingAnswer], step: DecodingStep, head: Head
) -> Iterator[list[tuple[GrowingAnswer, str]]]:
    """Grow `answers` to their ends; yields, for each step, the rows that took a token and the text that each
    of them gave out.

    Only tokens that `head` scores are drawn.
    """
    rows = [answer for answer in answers if answer.finish_reason is None]
    if not rows:
        return
    cache, hidden = _read(model, rows)
    sampler = _sampler(model, rows, head.vocab_size)
    while True:
        drawn = sampler(*head(hidden, sampler.looks_at)).tolist()
        yield [(row, row.accept(token)) for row, token in zip(rows, drawn, strict=True)]
        going_on = [index for index, row in enumerate(rows) if row.finish_reason is None]
        if not going_on:
            return
        if len(going_on) < len(rows):
            rows = [rows[index] for index in going_on]
            cache = cache.select(going_on)
            sampler = _sampler(model, rows, head.vocab_size)
        if any([row.slide() for row in rows]):  # a list: each must be asked
            cache, hidden = _read(model, rows)
            continue
        hidden = step([row.last_id for row in rows], [row.length - 1 for row in rows], cache)


def _sampler(model: Transformer, rows: Sequence[GrowingAnswer], vocab_size: int) -> Sampler:
    return Sampler([row.sampling for row in rows], vocab_size, model.wte.weight.device)


def _read(model: Transformer, rows: Sequence[GrowingAnswer]) -> tuple[KVCache, Tensor]:
    """Fill a new cache with what each row has so far; hidden states (B, C) that the next tokens are drawn
    from.
    """
    weight = model.wte.weight
    lengths = [row.length for row in rows]
    padded = torch.tensor(
        [row.seen_ids + [0] * (max(lengths) - row.length) for row in rows], device=weight.device
    )
    cache = KVCache(model.config, len(rows), max(row.longest for row in rows), weight.device, weight.dtype)
    hidden = model.hidden_states(padded, cache=cache)
    last = hidden[
        torch.arange(len(rows), device=weight.device), torch.tensor(lengths, device=weight.device) - 1
    ]
    return cache, last
