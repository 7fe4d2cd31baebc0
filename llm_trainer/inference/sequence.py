"""One answer in the making: its ids, its text, and when it ends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from llm_trainer.config.schema.generation import GenerationConfig
from llm_trainer.errors import UsageError
from llm_trainer.inference.detokenizer import TextStream
from llm_trainer.inference.sampling import SamplingRow

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Answer:
    """What came of one prompt. `finish_reason`: `stop` at the end of text or at a stop string, `length` at a
    limit.

    `ids` holds every token drawn but the one that ends a text; `text` ends before a stop string, whose tokens are still in `ids`.
    """

    ids: list[int]
    text: str
    finish_reason: FinishReason


class GrowingAnswer:
    """A row of the batch, from its prompt to its end.

    It ends at an end-of-text token, at a stop string, after `max_new_tokens`, or where prompt and answer fill
    the model's context, unless it slides: then the model goes on from the latter half of what it saw
    (nanoGPT's sample.py drops one token a step instead, and reads the whole context anew for each).
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
        """`sample` numbers the answers to one prompt; `token_bytes` turns ids to text, and without it there
        is none.
        """
        if len(prompt_ids) > context and not settings.slide:
            raise UsageError(
                f"the prompt has {len(prompt_ids)} tokens, but the model's context is {context}; shorten it, or set slide"
            )
        self.prompt_ids = list(prompt_ids)
        self.settings = settings
        self.sampling = SamplingRow(settings, prompt_ids, sample)
        self.ids: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self._context = context
        self._first_seen = max(0, len(prompt_ids) - context)
        self._room = (
            settings.max_new_tokens
            if settings.slide
            else min(settings.max_new_tokens, context - len(prompt_ids))
        )
        self._end_ids = frozenset() if settings.ignore_eos else frozenset(end_ids)
        self._stream = TextStream(settings.stop)
        self._token_bytes = token_bytes
        if self._room == 0:
            self.finish_reason = "length"

    @property
    def seen_ids(self) -> list[int]:
        """The tokens of prompt and answer that the model looks back on."""
        return (self.prompt_ids + self.ids)[self._first_seen :]

    @property
    def length(self) -> int:
        """How many tokens those are; the next one has this position."""
        return len(self.prompt_ids) + len(self.ids) - self._first_seen

    @property
    def longest(self) -> int:
        """How many they may become."""
        return min(len(self.prompt_ids) + self._room, self._context)

    def slide(self) -> bool:
        """Forget the first half of the context if it is full; whether it was."""
        if self.length <= self._context:
            return False
        self._first_seen += self.length - max(1, self._context // 2)
        return True

    @property
    def last_id(self) -> int:
        """The token that the next step reads."""
        return self.ids[-1] if self.ids else self.prompt_ids[-1]

    def accept(self, token: int) -> str:
        """Take the next token; return the text that is now certain, and set `finish_reason` if this was the
        end.
        """
        if token in self._end_ids:
            return self._finish("stop")
        self.ids.append(token)
        delta = self._stream.push(self._token_bytes(token)) if self._token_bytes else ""
        self.text += delta
        if self._stream.stopped:
            self.finish_reason = "stop"
        elif len(self.ids) >= self._room:
            return delta + self._finish("length")
        return delta

    def _finish(self, reason: FinishReason) -> str:
        rest = self._stream.finish()
        self.text += rest
        # What was held back may have completed a stop string only with the half character that the end made
        # whole.
        self.finish_reason = "stop" if self._stream.stopped else reason
        return rest

    @property
    def answer(self) -> Answer:
        """The result, once finished."""
        assert self.finish_reason is not None, "the answer is still growing"
        return Answer(self.ids, self.text, self.finish_reason)
