"""One answer in the making: its ids, its text, and when it ends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from llm_trainer.config.errors import UsageError
from llm_trainer.config.generation import GenerationConfig
from llm_trainer.inference.sampling import SamplingRow
from llm_trainer.inference.text import TextStream

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Answer:
    """What came of one prompt. `finish_reason`: `stop` at the end of text or at a stop string, `length` at a limit.

    `ids` holds every token drawn but the one that ends a text; `text` ends before a stop string, whose tokens are still in `ids`.
    """

    ids: list[int]
    text: str
    finish_reason: FinishReason


class GrowingAnswer:
    """A row of the batch, from its prompt to its end.

    It ends at an end-of-text token, at a stop string, after `max_new_tokens`, or where prompt and answer fill the model's context.
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
        """`sample` numbers the answers to one prompt; `token_bytes` turns ids to text, and without it there is none."""
        if len(prompt_ids) > context:
            raise UsageError(f"the prompt has {len(prompt_ids)} tokens, but the model's context is {context}; shorten it")
        self.prompt_ids = list(prompt_ids)
        self.settings = settings
        self.sampling = SamplingRow(settings, prompt_ids, sample)
        self.ids: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self._room = min(settings.max_new_tokens, context - len(prompt_ids))
        self._end_ids = frozenset() if settings.ignore_eos else frozenset(end_ids)
        self._stream = TextStream(settings.stop)
        self._token_bytes = token_bytes
        if self._room == 0:
            self.finish_reason = "length"

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt_ids) + len(self.ids)

    @property
    def longest(self) -> int:
        """Tokens of prompt and answer when it goes on to its limit."""
        return len(self.prompt_ids) + self._room

    @property
    def last_id(self) -> int:
        """The token that the next step reads."""
        return self.ids[-1] if self.ids else self.prompt_ids[-1]

    def accept(self, token: int) -> str:
        """Take the next token; return the text that is now certain, and set `finish_reason` if this was the end."""
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
        # What was held back may have completed a stop string only with the half character that the end made whole.
        self.finish_reason = "stop" if self._stream.stopped else reason
        return rest

    @property
    def answer(self) -> Answer:
        """The result, once finished."""
        assert self.finish_reason is not None, "the answer is still growing"
        return Answer(self.ids, self.text, self.finish_reason)
