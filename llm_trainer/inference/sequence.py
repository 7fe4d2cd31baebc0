"""One sequence while it is generated: its ids, its text, and when it ends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from llm_trainer.config.schema.generation import GenerationConfig
from llm_trainer.errors import UsageError
from llm_trainer.inference.detokenizer import Detokenizer
from llm_trainer.inference.sampling import SamplingState

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Completion:
    """What was generated for one prompt.

    `ids` are all sampled tokens but the one that ends a text. `text` ends before a stop string, whose tokens
    are still in `ids`. `finish_reason` is `stop` at the end of text or at a stop string, and `length` at a
    limit.
    """

    ids: list[int]
    text: str
    finish_reason: FinishReason


class GenerationSequence:
    """A row of the batch, from its prompt to its end.

    It ends at an end-of-text token, at a stop string, after `max_new_tokens`, or where prompt and completion
    fill the model's context. With `sliding_context` it does not end there: the model continues from the
    second half of what it saw. (nanoGPT's sample.py drops one token per step instead, and reads the complete
    context again for each.)

    The name is not `Sequence`, so that it does not hide `collections.abc.Sequence`.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        settings: GenerationConfig,
        context: int,
        *,
        sample: int = 0,
        end_ids: Collection[int] = (),
        token_bytes: Callable[[int], bytes] | None = None,
    ) -> None:
        """Start a sequence.

        Args:
            prompt_ids: The prompt, at least one token.
            settings: How to sample, and when to stop.
            context: The model's context, in tokens.
            sample: The number of this completion among those of one prompt.
            end_ids: Tokens that end a text.
            token_bytes: The bytes of a token. None: there is no text, only ids.

        Raises:
            UsageError: The prompt is longer than the context, and `sliding_context` is off.
        """
        if len(prompt_ids) > context and not settings.sliding_context:
            raise UsageError(
                f"the prompt has {len(prompt_ids)} tokens, but the model's context is {context}; shorten it, "
                "or set sliding_context"
            )
        self.prompt_ids = list(prompt_ids)
        self.settings = settings
        self.sampling = SamplingState(settings, prompt_ids, sample)
        self.ids: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self._context = context
        self._first_visible = max(0, len(prompt_ids) - context)
        self._max_new_tokens = settings.max_new_tokens
        if not settings.sliding_context:
            self._max_new_tokens = min(settings.max_new_tokens, context - len(prompt_ids))
        self._end_ids = frozenset() if settings.ignore_eos else frozenset(end_ids)
        self._detokenizer = Detokenizer(settings.stop)
        self._token_bytes = token_bytes
        if self._max_new_tokens == 0:
            self.finish_reason = "length"

    @property
    def visible_ids(self) -> list[int]:
        """The tokens of prompt and completion that the model attends to."""
        return (self.prompt_ids + self.ids)[self._first_visible :]

    @property
    def length(self) -> int:
        """How many tokens are visible; the next one has this position."""
        return len(self.prompt_ids) + len(self.ids) - self._first_visible

    @property
    def max_length(self) -> int:
        """How many tokens may become visible."""
        return min(len(self.prompt_ids) + self._max_new_tokens, self._context)

    @property
    def last_id(self) -> int:
        """The token that the next step reads."""
        return self.ids[-1] if self.ids else self.prompt_ids[-1]

    @property
    def completion(self) -> Completion:
        """The result, once the sequence has ended."""
        assert self.finish_reason is not None, "the sequence has not ended yet"
        return Completion(self.ids, self.text, self.finish_reason)

    def slide_context(self) -> bool:
        """Drop the first half of the visible tokens if the context is full.

        Returns:
            Whether it was full.
        """
        if self.length <= self._context:
            return False
        self._first_visible += self.length - max(1, self._context // 2)
        return True

    def accept(self, token: int) -> str:
        """Add the next token, and set `finish_reason` if it is the last one.

        Args:
            token: Its id.

        Returns:
            The text that is now certain.
        """
        if token in self._end_ids:
            return self._finish("stop")
        self.ids.append(token)
        delta = self._detokenizer.push(self._token_bytes(token)) if self._token_bytes else ""
        self.text += delta
        if self._detokenizer.stopped:
            self.finish_reason = "stop"
        elif len(self.ids) >= self._max_new_tokens:
            return delta + self._finish("length")
        return delta

    def _finish(self, reason: FinishReason) -> str:
        rest = self._detokenizer.finish()
        self.text += rest
        # An incomplete character that the end completes may have completed a stop string.
        self.finish_reason = "stop" if self._detokenizer.stopped else reason
        return rest
