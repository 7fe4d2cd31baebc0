"""A model that answers in text: tokenizer, network and decoding loop behind `generate` and `stream`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

from llm_trainer.config.schema.generation import GenerationConfig
from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.errors import UsageError
from llm_trainer.inference.cpu.fused_decoder import FusedStep, is_fusible
from llm_trainer.inference.cpu.lm_head import Head
from llm_trainer.inference.generation_loop import decode
from llm_trainer.inference.model_runner import DecodingStep, ModelStep
from llm_trainer.inference.sequence import Answer, GrowingAnswer
from llm_trainer.model.transformer import Transformer

# More rows at once would cost memory for their caches and win little.
MAX_BATCH = 32


class LanguageModel:
    """Text in, text out.

    Without a tokenizer only `generate_ids` works. `end_ids` are the tokens that end a text; none: the
    tokenizer's own. `compile` is auto, on or off: compiling takes seconds that a few answers never win back,
    so auto leaves it off.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        end_ids: Iterable[int] | None = None,
        compile: str = "auto",
    ) -> None:
        if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
            raise UsageError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, but the model's embedding has {model.config.vocab_size} rows: "
                "they do not belong together; use the tokenizer that the model was trained with"
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.context = model.config.max_position_embeddings
        self.vocab_size = model.config.vocab_size if tokenizer is None else tokenizer.vocab_size
        own_end = [] if tokenizer is None or tokenizer.eos_id is None else [tokenizer.eos_id]
        self.end_ids = frozenset(own_end if end_ids is None else end_ids)
        self._step = choose_step(self.model, compile)
        self._head = Head(self.model, self.vocab_size)

    @overload
    def generate(self, prompt: str, settings: GenerationConfig | None = None, **changes: Any) -> str: ...
    @overload
    def generate(
        self, prompt: Sequence[str], settings: GenerationConfig | None = None, **changes: Any
    ) -> list[str]: ...
    def generate(
        self, prompt: str | Sequence[str], settings: GenerationConfig | None = None, **changes: Any
    ) -> str | list[str]:
        """The text that follows a prompt, or each of several; `changes` are settings by any of their names
        (`max_tokens=200`).

        One prompt and one sample give a string; else a list, all samples of the first prompt first. Raises
        UsageError for a setting that does not exist or a prompt longer than the context, DataError for
        characters that a character tokenizer lacks.
        """
        settled = settings_with(settings, changes)
        texts = [
            answer.text for answer in self.answers([prompt] if isinstance(prompt, str) else prompt, settled)
        ]
        return texts[0] if isinstance(prompt, str) and settled.num_samples == 1 else texts

    def stream(self, prompt: str, settings: GenerationConfig | None = None, **changes: Any) -> Iterator[str]:
        """The same text in pieces, as it becomes certain. Raises what `generate` raises, at once and not at
        the first piece.
        """
        settled = settings_with(settings, changes)
        if settled.num_samples != 1:
            raise UsageError(
                f"num_samples={settled.num_samples}: only one sample can be streamed; use generate, or stream one after another"
            )
        growing = self._grow(self.encode_prompt(prompt), settled, 0)
        return (delta for step in self._decode([growing]) for _, delta in step if delta)

    def answers(self, prompts: Sequence[str], settings: GenerationConfig) -> list[Answer]:
        """Text, ids and finish reason for each sample of each prompt, prompt by prompt."""
        return self.generate_ids([self.encode_prompt(prompt) for prompt in prompts], settings)

    def generate_ids(
        self, prompts: Sequence[Sequence[int]], settings: GenerationConfig | Sequence[GenerationConfig]
    ) -> list[Answer]:
        """Answers to prompts given as ids, with one setting for all or one each; `num_samples` answers for
        each prompt in turn.

        A sample depends on its prompt, its settings and its number alone, not on the batch that it is
        computed in.
        """
        each = [settings] * len(prompts) if isinstance(settings, GenerationConfig) else list(settings)
        if len(each) != len(prompts):
            raise UsageError(f"{len(prompts)} prompts, but settings for {len(each)}")
        growing = [
            self._grow(prompt, own, sample)
            for prompt, own in zip(prompts, each, strict=True)
            for sample in range(own.num_samples)
        ]
        for start in range(0, len(growing), MAX_BATCH):
            for _ in self._decode(growing[start : start + MAX_BATCH]):
                pass
        return [one.answer for one in growing]

    def encode_prompt(self, prompt: str) -> list[int]:
        """Ids of a prompt, nothing added. An empty one becomes the token that begins a text: bos, else eos,
        else a newline.
        """
        tokenizer = self._require_tokenizer()
        if prompt:
            return tokenizer.encode(prompt)
        start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        # Texts of character tokenizers have no such token; nanoGPT starts them at a newline too.
        return tokenizer.encode("\n") if start is None else [start]

    def _grow(self, prompt: Sequence[int], settings: GenerationConfig, sample: int) -> GrowingAnswer:
        if not prompt:
            raise UsageError("an empty list of ids has nothing to go on from; give at least one token")
        if not 0 <= min(prompt) <= max(prompt) < self.model.config.vocab_size:
            wrong = next(token for token in prompt if not 0 <= token < self.model.config.vocab_size)
            raise UsageError(
                f"token id {wrong} is outside the model's vocabulary of {self.model.config.vocab_size}"
            )
        token_bytes = None if self.tokenizer is None else self.tokenizer.token_bytes
        if settings.stop and token_bytes is None:
            raise UsageError("stop strings need a tokenizer, and this model has none")
        return GrowingAnswer(
            prompt, settings, self.context, sample=sample, end_ids=self.end_ids, token_bytes=token_bytes
        )

    def _decode(self, growing: Sequence[GrowingAnswer]) -> Iterator[list[tuple[GrowingAnswer, str]]]:
        return decode(self.model, growing, self._step, self._head)

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UsageError(
                "this model has no tokenizer and knows ids only; load a folder that holds tokenizer.json"
            )
        return self.tokenizer


def choose_step(model: Transformer, compile: str = "auto") -> DecodingStep:
    """The fastest decoding step that this model allows."""
    if compile not in ("auto", "on", "off"):
        raise UsageError(f"compile {compile!r} is unknown; give auto, on or off")
    if is_fusible(model):
        return FusedStep(model, compile=compile == "on")
    return ModelStep(model)


def settings_with(settings: GenerationConfig | None, changes: dict[str, Any]) -> GenerationConfig:
    """A copy of `settings` (none: the defaults) with some of them changed, by any name."""
    if settings is None:
        return GenerationConfig(**changes)
    settled = settings.model_copy(deep=True)
    for name, value in changes.items():
        setattr(settled, name, value)
    return settled
