"""A model that completes text: tokenizer, network and decoding loop behind `generate` and `stream`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

from llm_trainer.config.environment import is_cpu_decoder_enabled
from llm_trainer.config.schema.generation import GenerationConfig
from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.errors import UsageError
from llm_trainer.inference.cpu.fused_decoder import FusedDecoder, can_fuse
from llm_trainer.inference.cpu.lm_head import LMHead
from llm_trainer.inference.generation_loop import decode
from llm_trainer.inference.model_runner import EagerModelRunner, ModelRunner
from llm_trainer.inference.sequence import Completion, GenerationSequence
from llm_trainer.model.transformer import Transformer

# More rows at once would cost memory for their caches and gain little.
MAX_BATCH_SIZE = 32


class LanguageModel:
    """Text in, text out."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        end_ids: Iterable[int] | None = None,
        compile: str = "auto",
    ) -> None:
        """Prepare a model for generation.

        Args:
            model: The network; it is put into evaluation mode.
            tokenizer: Its tokenizer. None: only `generate_ids` works.
            end_ids: Tokens that end a text. None: the tokenizer's own.
            compile: `auto`, `on` or `off`. Compiling takes seconds that a few completions never win back, so
                `auto` does not compile.

        Raises:
            UsageError: The tokenizer's vocabulary is larger than the model's embedding, or `compile` is
                invalid. Added tokens past the embedding are allowed; a prompt that uses one is an error.
        """
        if tokenizer is not None and tokenizer.plain_vocab_size > model.config.vocab_size:
            raise UsageError(
                f"the tokenizer has {tokenizer.plain_vocab_size} tokens, but the model's embedding has "
                f"{model.config.vocab_size} rows, so they do not belong together; use the tokenizer that the "
                "model was trained with"
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.context = model.config.max_position_embeddings
        rows = model.config.vocab_size
        self.vocab_size = rows if tokenizer is None else min(rows, tokenizer.vocab_size)
        own_end = [] if tokenizer is None or tokenizer.eos_id is None else [tokenizer.eos_id]
        self.end_ids = frozenset(own_end if end_ids is None else end_ids)
        self._runner = select_runner(self.model, compile)
        self._head = LMHead(self.model, self.vocab_size)

    @overload
    def generate(self, prompt: str, settings: GenerationConfig | None = None, **changes: Any) -> str: ...
    @overload
    def generate(
        self, prompt: Sequence[str], settings: GenerationConfig | None = None, **changes: Any
    ) -> list[str]: ...
    def generate(
        self, prompt: str | Sequence[str], settings: GenerationConfig | None = None, **changes: Any
    ) -> str | list[str]:
        """Generate the text that follows a prompt, or each of several.

        Args:
            prompt: One prompt, or several.
            settings: How to generate. None: the defaults.
            **changes: Settings that differ, by any of their names (`max_tokens=200`).

        Returns:
            A string for one prompt and one sample; otherwise a list, with all samples of the first prompt
            first.

        Raises:
            UsageError: A setting does not exist, or a prompt is longer than the context.
            DataError: A prompt has characters that a character tokenizer lacks.
        """
        config = override(settings, changes)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        texts = [completion.text for completion in self.complete(prompts, config)]
        return texts[0] if isinstance(prompt, str) and config.num_samples == 1 else texts

    def stream(self, prompt: str, settings: GenerationConfig | None = None, **changes: Any) -> Iterator[str]:
        """Generate the same text in pieces, as it becomes certain.

        Args:
            prompt: The prompt.
            settings: How to generate. None: the defaults.
            **changes: Settings that differ, by any of their names.

        Returns:
            An iterator over the pieces.

        Raises:
            UsageError: As `generate`, at once and not at the first piece; also for several samples.
            DataError: As `generate`.
        """
        config = override(settings, changes)
        if config.num_samples != 1:
            raise UsageError(
                f"num_samples={config.num_samples}: only one sample can be streamed; use generate, or stream "
                "one after another"
            )
        sequence = self._sequence(self.encode_prompt(prompt), config, 0)
        return (delta for step in self._decode([sequence]) for _, delta in step if delta)

    def complete(self, prompts: Sequence[str], settings: GenerationConfig) -> list[Completion]:
        """Text, ids and finish reason of each sample, prompt by prompt; raises as `generate`."""
        return self.generate_ids([self.encode_prompt(prompt) for prompt in prompts], settings)

    def generate_ids(
        self, prompts: Sequence[Sequence[int]], settings: GenerationConfig | Sequence[GenerationConfig]
    ) -> list[Completion]:
        """Complete prompts that are given as ids.

        A sample depends on its prompt, its settings and its number alone, not on the batch that it is
        computed in.

        Args:
            prompts: Ids of each prompt.
            settings: One for all prompts, or one per prompt.

        Returns:
            `num_samples` completions for each prompt in turn.

        Raises:
            UsageError: A prompt is empty, too long or has ids outside the vocabulary, or the numbers of
                prompts and settings differ.
        """
        each = [settings] * len(prompts) if isinstance(settings, GenerationConfig) else list(settings)
        if len(each) != len(prompts):
            raise UsageError(f"{len(prompts)} prompts, but settings for {len(each)}; give one per prompt")
        sequences = [
            self._sequence(prompt, own, sample)
            for prompt, own in zip(prompts, each, strict=True)
            for sample in range(own.num_samples)
        ]
        for start in range(0, len(sequences), MAX_BATCH_SIZE):
            for _ in self._decode(sequences[start : start + MAX_BATCH_SIZE]):
                pass
        return [sequence.completion for sequence in sequences]

    def encode_prompt(self, prompt: str) -> list[int]:
        """Ids of a prompt, with the tokens that its tokenizer begins every text with.

        Args:
            prompt: The text. An empty one becomes these tokens; where there are none, the token that begins a
                text: bos, else eos, else a newline.

        Returns:
            Its ids.

        Raises:
            UsageError: The model has no tokenizer.
            DataError: The text has characters that a character tokenizer lacks.
        """
        tokenizer = self._require_tokenizer()
        if prompt:
            return tokenizer.encode(prompt, begins=True)
        if tokenizer.prefix_ids:
            return list(tokenizer.prefix_ids)
        start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        # Character tokenizers have no such token; nanoGPT starts their texts at a newline too.
        return tokenizer.encode("\n") if start is None else [start]

    def _sequence(self, prompt: Sequence[int], settings: GenerationConfig, sample: int) -> GenerationSequence:
        if not prompt:
            raise UsageError("an empty list of ids cannot be continued; give at least one token")
        if not 0 <= min(prompt) <= max(prompt) < self.model.config.vocab_size:
            wrong = next(token for token in prompt if not 0 <= token < self.model.config.vocab_size)
            raise UsageError(
                f"token id {wrong}{self._name_of(wrong)} is outside the model's vocabulary of "
                f"{self.model.config.vocab_size}"
            )
        token_bytes = None if self.tokenizer is None else self.tokenizer.token_bytes
        if settings.stop and token_bytes is None:
            raise UsageError("stop strings need a tokenizer, and this model has none")
        return GenerationSequence(
            prompt, settings, self.context, sample=sample, end_ids=self.end_ids, token_bytes=token_bytes
        )

    def _decode(
        self, sequences: Sequence[GenerationSequence]
    ) -> Iterator[list[tuple[GenerationSequence, str]]]:
        return decode(self.model, sequences, self._runner, self._head)

    def _name_of(self, token_id: int) -> str:
        """The name of an added token, for an error."""
        name = None if self.tokenizer is None else self.tokenizer.id_to_token(token_id)
        return "" if name is None else f" ({name!r})"

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UsageError(
                "this model has no tokenizer and takes ids only; load a folder with a tokenizer.json"
            )
        return self.tokenizer


def select_runner(model: Transformer, compile: str = "auto") -> ModelRunner:
    """The fastest way to run decoding steps that this model allows.

    Args:
        model: The network.
        compile: `auto`, `on` or `off`; without the fused decoder it has no effect.

    Returns:
        The fused decoder where the model allows it and LLM_TRAINER_CPU_DECODER is not 0, else the model as it
        is.

    Raises:
        UsageError: `compile` is something else.
    """
    if compile not in ("auto", "on", "off"):
        raise UsageError(f"invalid value for compile: {compile!r}; choose auto, on or off")
    if can_fuse(model) and is_cpu_decoder_enabled():
        return FusedDecoder(model, compile=compile == "on")
    return EagerModelRunner(model)


def override(settings: GenerationConfig | None, changes: dict[str, Any]) -> GenerationConfig:
    """A copy of the settings with some of them changed.

    Args:
        settings: The settings. None: the defaults.
        changes: New values, by any name of a setting.

    Returns:
        The changed copy.

    Raises:
        UsageError: A setting does not exist, or a value is invalid.
    """
    if settings is None:
        return GenerationConfig(**changes)
    changed = settings.model_copy(deep=True)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed
