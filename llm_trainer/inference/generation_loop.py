"""The loop from prompts to completions: read all prompts at once, then one token per row and step, until
every row has ended.

Prompts of different lengths are padded on the right. Attention is causal, so a prompt never sees the padding
behind it, and the keys and values that the padding left in the cache are overwritten by the row's own tokens
before anything may look at them. (Padding on the left, as transformers does it, moves every position and has
to be masked in every step; transformers#22707.) A row that has ended leaves the batch, so that the others do
not pay for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from llm_trainer.inference.cpu.lm_head import LMHead
from llm_trainer.inference.model_runner import ModelRunner
from llm_trainer.inference.sampling import Sampler
from llm_trainer.inference.sequence import GenerationSequence
from llm_trainer.model.kv_cache import KVCache
from llm_trainer.model.transformer import Transformer


@torch.inference_mode()
def decode(
    model: Transformer, sequences: Sequence[GenerationSequence], runner: ModelRunner, head: LMHead
) -> Iterator[list[tuple[GenerationSequence, str]]]:
    """Generate until every sequence has ended.

    Args:
        model: The model, which reads the prompts.
        sequences: What to continue; each gets its tokens and its finish reason.
        runner: Runs the decoding steps.
        head: Scores the next token; only tokens that it scores are sampled.

    Yields:
        For each step, the sequences that got a token, and the text that became certain with it.
    """
    rows = [sequence for sequence in sequences if sequence.finish_reason is None]
    if not rows:
        return
    cache, hidden = _prefill(model, rows)
    sampler = _sampler(model, rows, head.vocab_size)
    while True:
        sampled = sampler(*head(hidden, sampler.num_candidates)).tolist()
        yield [(row, row.accept(token)) for row, token in zip(rows, sampled, strict=True)]
        unfinished = [index for index, row in enumerate(rows) if row.finish_reason is None]
        if not unfinished:
            return
        if len(unfinished) < len(rows):
            rows = [rows[index] for index in unfinished]
            cache = cache.select(unfinished)
            sampler = _sampler(model, rows, head.vocab_size)
        if any([row.slide_context() for row in rows]):  # a list, because every row has to slide
            cache, hidden = _prefill(model, rows)
            continue
        hidden = runner([row.last_id for row in rows], [row.length - 1 for row in rows], cache)


def _sampler(model: Transformer, rows: Sequence[GenerationSequence], vocab_size: int) -> Sampler:
    return Sampler([row.sampling for row in rows], vocab_size, model.wte.weight.device)


def _prefill(model: Transformer, rows: Sequence[GenerationSequence]) -> tuple[KVCache, Tensor]:
    """Fill a new cache with the tokens of each row.

    Returns it with the hidden states (B, C) that the next tokens are sampled from.
    """
    weight = model.wte.weight
    device, lengths = weight.device, [row.length for row in rows]
    padded = [row.visible_ids + [0] * (max(lengths) - row.length) for row in rows]
    cache = KVCache(model.config, len(rows), max(row.max_length for row in rows), device, weight.dtype)
    hidden = model.hidden_states(torch.tensor(padded, device=device), cache=cache)
    last = torch.tensor(lengths, device=device) - 1
    return cache, hidden[torch.arange(len(rows), device=device), last]
