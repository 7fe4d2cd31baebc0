"""Measures how well a model predicts a text: loss, perplexity and bits per byte.

Every token of the text is scored exactly once. The first one is predicted from the beginning-of-sequence
token, if the tokenizer has one. The text is split into windows of the model's context. By default windows do
not overlap, as in validation, so a token has on average half a context before it. With a `stride` below the
context, each window scores only its last `stride` tokens, which then have at least context − stride tokens
before them. This costs context / stride times as much and gives a lower loss, so a comparison should state
which was used. Bits per byte compare models with different tokenizers; loss and perplexity do not.

Losses are summed over all windows and divided once, so the batch size does not change the result
(transformers#39241, mlx-lm#1855).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llm_trainer.data.prepared_dataset import check_vocabulary, open_prepared_dataset
from llm_trainer.data.sampling.batch import IGNORE_INDEX, Batch
from llm_trainer.data.sampling.packing import Packing
from llm_trainer.data.sampling.samplers import validation_row_count
from llm_trainer.data.token_shards import TokenDataset
from llm_trainer.errors import DataError, NotFiniteError, UsageError
from llm_trainer.inference.engine import LanguageModel
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.engines.validation import ValidationResult, validate
from llm_trainer.training.objectives.objective import NextToken

Progress = Callable[[int, int], None]  # windows done, windows in total


@dataclass(frozen=True)
class Window:
    """A window over the tokens of a text.

    Attributes:
        start: The first position of the model's input.
        end: The last position of the input, + 1.
        scored_from: The tokens that follow the positions `scored_from:end` are scored.
    """

    start: int
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
    """Evaluate a model on a text file, or on a split of a prepared folder.

    Args:
        model: The model and its tokenizer.
        source: A UTF-8 text file, or a prepared folder, whose test split is used, or its validation split if
            there is no test split.
        batch_size: Windows per forward pass.
        stride: Scored tokens per window; None for windows that do not overlap.
        on_progress: Called with the windows done and their number.

    Raises:
        NotFiniteError: The model's losses are not finite.
        DataError: The source cannot be read or does not fit the model.
        UsageError: The stride is above the context.
    """
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
    """Evaluate a model on a text: loss in nats per token, perplexity and bits per byte.

    The arguments are those of `evaluate_source`.

    Raises:
        DataError: The text has no token to predict, or a character that the tokenizer does not know.
        UsageError: The stride is above the context, or the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise UsageError(
            "the model has no tokenizer, so it cannot score a text; load a folder with tokenizer.json"
        )
    tokenizer = model.tokenizer
    start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if tokenizer.prefix_ids:
        text = tokenizer.without_prefix(text)
        ids = tokenizer.encode(text, begins=True)
    else:
        ids = ([] if start is None else [start]) + tokenizer.encode(text)
    if len(ids) < 2:
        raise DataError("the text has no token to predict; use a longer text")
    if max(ids) >= model.model.config.vocab_size:
        raise DataError(
            f"the text has the token {tokenizer.id_to_token(max(ids))!r} (id {max(ids)}), for which the "
            f"model's embedding of {model.model.config.vocab_size} rows has no row; remove it from the text"
        )
    stream = TokenDataset.from_ids(ids, vocab_size=tokenizer.vocab_size, tokenizer_hash=tokenizer.hash)
    total, count = sum_token_losses(
        model.model, stream, model.context, batch_size, stride=stride, on_progress=on_progress
    )
    # Without a beginning-of-sequence token the first token is not predicted, so its bytes do not count.
    scored_bytes = len(text.encode("utf-8")) - (
        0 if tokenizer.prefix_ids or start is not None else len(tokenizer.token_bytes(ids[0]))
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
    """Evaluate a model on a split of a prepared folder.

    Without a stride this is training's own `validate`, with rows packed as in the folder, and gives the
    same loss.

    Args:
        model: The model.
        folder: The prepared folder.
        split: "train", "validation" or "test"; None for the test split, or the validation split if there is
            no test split.
        batch_size: Windows per forward pass.
        stride: Scored tokens per window; None for windows that do not overlap.
        on_progress: Called with the windows done and their number.

    Raises:
        DataError: The split is missing, or the folder was prepared with another tokenizer.
        UsageError: The stride is above the context, or the split is unknown.
    """
    tokens, packing = _split(folder, split)
    check_vocabulary(tokens, model.model.config.vocab_size)
    if model.tokenizer is not None and tokens.tokenizer_hash != model.tokenizer.hash:
        raise DataError(
            f"{folder} was prepared with another tokenizer than the model's; "
            "prepare the data with the model's tokenizer, or evaluate on a text file"
        )
    if stride is None or stride == model.context:
        batches = math.ceil(validation_row_count(tokens, model.context, packing) / batch_size)
        on_batch = None if on_progress is None else (lambda done: on_progress(done, batches))
        return validate(model.model, tokens, model.context, batch_size, packing=packing, on_batch=on_batch)
    total, count = sum_token_losses(
        model.model, tokens, model.context, batch_size, stride=stride, on_progress=on_progress
    )
    scored_bytes = None if tokens.num_bytes is None else tokens.num_bytes * count / tokens.num_tokens
    return _result(total, count, scored_bytes)


@torch.inference_mode()
def sum_token_losses(
    model: Transformer,
    tokens: TokenDataset,
    context: int,
    batch_size: int,
    *,
    stride: int | None = None,
    on_progress: Progress | None = None,
) -> tuple[float, int]:
    """Sum the losses of all tokens but the first.

    Args:
        model: The model.
        tokens: The tokens to predict.
        context: Positions per window.
        batch_size: Windows per forward pass.
        stride: Scored tokens per window; None for windows that do not overlap.
        on_progress: Called with the windows done and their number.

    Returns:
        The sum of losses in nats, and the number of scored tokens.
    """
    if batch_size < 1:
        raise UsageError(f"invalid batch_size: {batch_size} is below 1")
    windows = list(scoring_windows(tokens.num_tokens - 1, context, stride))
    objective, device = NextToken(), model.wte.weight.device
    total, count = 0.0, 0
    for first in range(0, len(windows), batch_size):
        batch_windows = windows[first : first + batch_size]
        loss = objective(model, _batch(tokens, batch_windows).to(device))
        total += float(loss.total)
        count += int(loss.tokens)
        if on_progress is not None:
            on_progress(first + len(batch_windows), len(windows))
    return total, count


def scoring_windows(num_predicted: int, context: int, stride: int | None = None) -> Iterator[Window]:
    """Yield windows of at most `context` positions that score each of `num_predicted` tokens once."""
    step = context if stride is None else stride
    if not 1 <= step <= context:
        raise UsageError(
            f"invalid stride: {step} is not in [1, {context}], the model's context; "
            "a larger stride would leave tokens between windows unscored"
        )
    scored = 0
    for start in range(0, num_predicted, step):
        end = min(start + context, num_predicted)
        yield Window(start, end, scored)
        scored = end
        if end == num_predicted:
            return


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file.

    Raises:
        DataError: The file is missing, empty or not UTF-8.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 text (invalid byte at {error.start}); convert it, for example with iconv"
        ) from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error
    if not text:
        raise DataError(f"{file} is empty; use a file with text")
    return text


def _batch(tokens: TokenDataset, windows: list[Window]) -> Batch:
    """One row per window, padded on the right with ids that are neither attended to nor scored."""
    width = max(window.end - window.start for window in windows)
    inputs = np.zeros((len(windows), width), dtype=np.int64)
    labels = np.full((len(windows), width), IGNORE_INDEX, dtype=np.int64)
    starts = np.zeros((len(windows), width), dtype=np.int64)
    for row, window in enumerate(windows):
        size, scored = window.end - window.start, window.scored_from - window.start
        ids = tokens.read(window.start, size + 1)
        inputs[row, :size] = ids[:-1]
        labels[row, scored:size] = ids[1 + scored :]
        _separate_documents(tokens, window, labels[row], starts[row])
    documents = torch.from_numpy(starts.cumsum(axis=1)) if tokens.num_documents > 1 else None
    return Batch(
        torch.from_numpy(inputs), torch.from_numpy(labels), documents, int((labels != IGNORE_INDEX).sum())
    )


def _separate_documents(tokens: TokenDataset, window: Window, labels: np.ndarray, starts: np.ndarray) -> None:
    """Mark the starts of documents as training does: at the end-of-text token before each.

    Without end-of-text tokens the first id of a document is not predicted.
    """
    if tokens.num_documents < 2:
        return
    size = window.end - window.start
    first_ids = tokens.document_starts_in(
        window.start + 1, size
    )  # where the *label* is a document's first id
    if tokens.eos_id is not None:
        starts[first_ids] = 1
    else:
        labels[first_ids] = IGNORE_INDEX
        starts[first_ids[first_ids < size - 1] + 1] = 1
    starts[0] = 0


def _split(folder: str | Path, split: str | None) -> tuple[TokenDataset, Packing]:
    data = open_prepared_dataset(folder)
    named = {"train": data.train, "validation": data.validation, "val": data.validation, "test": data.test}
    if split is not None and split not in named:
        raise UsageError(f"invalid split: {split!r}; choose train, validation or test")
    tokens = (data.test or data.validation) if split is None else named[split]
    if tokens is None:
        raise DataError(
            f"{folder} has no {split or 'test or validation'} split; "
            "prepare the data with a fraction for it, or evaluate on a text file"
        )
    return tokens, data.packing


def _result(total: float, count: int, scored_bytes: float | None) -> ValidationResult:
    if not math.isfinite(total):
        raise NotFiniteError
    loss = total / count
    bits = total / math.log(2) / scored_bytes if scored_bytes else None
    return ValidationResult(loss, count, math.exp(loss) if loss < 700 else math.inf, bits)
