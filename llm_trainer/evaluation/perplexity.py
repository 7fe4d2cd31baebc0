"""How well a model predicts a text: loss, perplexity, bits per byte.

Every token of the text is scored exactly once, and the first too: it is predicted from the token that begins
a text, where the tokenizer has one. The text is cut into windows of the model's context. By default windows
do not overlap, as in validation, so a token has on average half a context to look back on; with `stride`
below the context each window scores its last `stride` tokens only and gives them at least context − stride
tokens to look back on, which costs context / stride times as much and gives the lower loss. State which, when
comparing. Bits per byte compare models with different tokenizers; loss and perplexity do not.

Sums are added over all windows and divided once: the batch size does not change the result
(transformers#39241, mlx-lm#1855).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llm_trainer.data.prepared_dataset import open_prepared, require_vocabulary
from llm_trainer.data.sampling.packing import Packing
from llm_trainer.data.sampling.samplers import Batch, validation_row_count
from llm_trainer.data.token_shards import TokenDataset
from llm_trainer.errors import DataError, UsageError
from llm_trainer.inference.engine import LanguageModel
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.engines.validation import ValidationResult, validate
from llm_trainer.training.objectives.objective import NextToken

IGNORED = -100
Progress = Callable[[int, int], None]  # windows done, windows in all


@dataclass(frozen=True)
class Window:
    """Positions `begin:end` of the stream are read, and the tokens after positions `scored_from:end` are
    scored.
    """

    begin: int
    end: int
    scored_from: int


def evaluate_source(
    model: LanguageModel,
    source: str | Path,
    *,
    batch_size: int = 8,
    stride: int | None = None,
    on_progress: Progress | None = None,
) -> ValidationResult:
    """Loss on a text file, or on a prepared folder's test split (without one, its validation split)."""
    if Path(source).is_dir():
        return evaluate_prepared(model, source, batch_size=batch_size, stride=stride, on_progress=on_progress)
    return evaluate_text(
        model, read_text(source), batch_size=batch_size, stride=stride, on_progress=on_progress
    )


def evaluate_text(
    model: LanguageModel,
    text: str,
    *,
    batch_size: int = 8,
    stride: int | None = None,
    on_progress: Progress | None = None,
) -> ValidationResult:
    """Loss in nats a token, perplexity and bits per byte of `text`.

    Raises DataError where there is nothing to predict or the tokenizer lacks a character, UsageError for a
    stride above the context.
    """
    if model.tokenizer is None:
        raise UsageError(
            "a text can be scored only by a model with a tokenizer; load a folder that holds tokenizer.json"
        )
    tokenizer = model.tokenizer
    start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    ids = ([] if start is None else [start]) + tokenizer.encode(text)
    if len(ids) < 2:
        raise DataError("the text has no token to predict; give a longer one")
    stream = TokenDataset.from_ids(ids, vocab_size=tokenizer.vocab_size, tokenizer_hash=tokenizer.hash)
    total, count = score(
        model.model, stream, model.context, batch_size, stride=stride, on_progress=on_progress
    )
    # Without a token that begins a text the first one is given, not predicted, so its bytes do not count
    # either.
    scored_bytes = len(text.encode("utf-8")) - (
        0 if start is not None else len(tokenizer.token_bytes(ids[0]))
    )
    return _result(total, count, scored_bytes)


def evaluate_prepared(
    model: LanguageModel,
    folder: str | Path,
    *,
    split: str | None = None,
    batch_size: int = 8,
    stride: int | None = None,
    on_progress: Progress | None = None,
) -> ValidationResult:
    """Loss on a split of a prepared folder; none named: test, else validation.

    Without a stride it is computed by training's own `validate`, in rows packed as the folder says, and is
    the same number. Raises DataError where the split is missing or its ids are another tokenizer's.
    """
    tokens, packing = _split(folder, split)
    require_vocabulary(tokens, model.model.config.vocab_size)
    if model.tokenizer is not None and tokens.tokenizer_hash != model.tokenizer.hash:
        raise DataError(
            f"the data in {folder} was made with another tokenizer than the model's; "
            "prepare it with the model's tokenizer, or give the text itself"
        )
    if stride is None or stride == model.context:
        batches = math.ceil(validation_row_count(tokens, model.context, packing) / batch_size)
        told = None if on_progress is None else (lambda done: on_progress(done, batches))
        return validate(model.model, tokens, model.context, batch_size, packing=packing, on_batch=told)
    total, count = score(
        model.model, tokens, model.context, batch_size, stride=stride, on_progress=on_progress
    )
    scored_bytes = None if tokens.num_bytes is None else tokens.num_bytes * count / tokens.num_tokens
    return _result(total, count, scored_bytes)


@torch.inference_mode()
def score(
    model: Transformer,
    tokens: TokenDataset,
    context: int,
    batch_size: int,
    *,
    stride: int | None = None,
    on_progress: Progress | None = None,
) -> tuple[float, int]:
    """Sum of losses in nats, and the number of tokens predicted: all of the stream but its first."""
    if batch_size < 1:
        raise UsageError(f"batch_size {batch_size} is below 1")
    spans = list(windows_over(tokens.num_tokens - 1, context, stride))
    objective, device = NextToken(), model.wte.weight.device
    total, count = 0.0, 0
    for first in range(0, len(spans), batch_size):
        part = spans[first : first + batch_size]
        loss = objective(model, _batch(tokens, part).to(device))
        total += float(loss.total)
        count += int(loss.tokens)
        if on_progress is not None:
            on_progress(first + len(part), len(spans))
    return total, count


def windows_over(predicted: int, context: int, stride: int | None = None) -> Iterator[Window]:
    """Windows of at most `context` positions that score each of `predicted` tokens once."""
    step = context if stride is None else stride
    if not 1 <= step <= context:
        raise UsageError(
            f"stride {step} is not between 1 and the context of {context}; tokens between windows would go unscored"
        )
    scored = 0
    for begin in range(0, predicted, step):
        end = min(begin + context, predicted)
        yield Window(begin, end, scored)
        scored = end
        if end == predicted:
            return


def read_text(path: str | Path) -> str:
    """A utf-8 text file; raises DataError where it is missing, empty or something else."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not utf-8 text (byte {error.start}); convert it, for example with iconv"
        ) from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error
    if not text:
        raise DataError(f"{file} is empty; give a text to score")
    return text


def _batch(tokens: TokenDataset, spans: list[Window]) -> Batch:
    """One row a window, padded on the right with ids that nobody sees and nobody scores."""
    width = max(span.end - span.begin for span in spans)
    inputs = np.zeros((len(spans), width), dtype=np.int64)
    labels = np.full((len(spans), width), IGNORED, dtype=np.int64)
    begins = np.zeros((len(spans), width), dtype=np.int64)
    for row, span in enumerate(spans):
        size, scored = span.end - span.begin, span.scored_from - span.begin
        ids = tokens.read(span.begin, size + 1)
        inputs[row, :size] = ids[:-1]
        labels[row, scored:size] = ids[1 + scored :]
        _part_documents(tokens, span, labels[row], begins[row])
    documents = torch.from_numpy(begins.cumsum(axis=1)) if tokens.num_documents > 1 else None
    return Batch(
        torch.from_numpy(inputs), torch.from_numpy(labels), documents, int((labels != IGNORED).sum())
    )


def _part_documents(tokens: TokenDataset, span: Window, labels: np.ndarray, begins: np.ndarray) -> None:
    """Mark where documents begin as training does: at the end token before each; where there is none, its
    first id is not predicted.
    """
    if tokens.num_documents < 2:
        return
    size = span.end - span.begin
    places = tokens.document_starts_in(span.begin + 1, size)  # where the *label* is a document's first id
    if tokens.end_id is not None:
        begins[places] = 1
    else:
        labels[places] = IGNORED
        begins[places[places < size - 1] + 1] = 1
    begins[0] = 0


def _split(folder: str | Path, split: str | None) -> tuple[TokenDataset, Packing]:
    data = open_prepared(folder)
    named = {"train": data.train, "validation": data.validation, "val": data.validation, "test": data.test}
    if split is not None and split not in named:
        raise UsageError(f"split {split!r} is unknown; give train, validation or test")
    tokens = (data.test or data.validation) if split is None else named[split]
    if tokens is None:
        raise DataError(
            f"{folder} has no {split or 'test or validation'} split; prepare it with a share for it, or give a text file"
        )
    return tokens, data.packing


def _result(total: float, count: int, scored_bytes: float | None) -> ValidationResult:
    loss = total / count
    bits = total / math.log(2) / scored_bytes if scored_bytes else None
    return ValidationResult(loss, count, math.exp(loss) if loss < 700 else math.inf, bits)
