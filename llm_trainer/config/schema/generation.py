"""How text is drawn from a model, and how a model is evaluated."""

from __future__ import annotations

from typing import Literal

from llm_trainer.config.schema.base import LARGEST_SEED, Section, setting

# Logits divided by much less are no numbers in single precision; at this temperature all the weight is on one
# token already.
GREEDY_BELOW = 1e-6


class GenerationConfig(Section):
    """One draw of text. Temperature 0 is greedy."""

    max_new_tokens: int = setting(
        200, "at most so many new tokens", unit="tokens", aliases=("max_tokens",), ge=0
    )
    temperature: float = setting(0.8, "0: always the likeliest token", ge=0)
    top_k: int | None = setting(None, "only the k likeliest tokens", unit="tokens", gt=0)
    top_p: float | None = setting(
        None, "only the likeliest tokens that together have this probability", gt=0, le=1
    )
    min_p: float | None = setting(
        None, "only tokens at least this likely relative to the likeliest", ge=0, le=1
    )
    repetition_penalty: float = setting(
        1.0, "tokens seen before are made less likely by this factor (Keskar 2019, arXiv:1909.05858)", gt=0
    )
    stop: list[str] = setting(
        list, "texts that end the answer; they are left out", aliases=("stop_strings",), splits=False
    )
    seed: int | None = setting(
        None,
        "of the draw; the same seed gives the same text whatever else is in the batch",
        ge=0,
        le=LARGEST_SEED,
    )
    num_samples: int = setting(1, "answers a prompt", aliases=("n",), gt=0)
    ignore_eos: bool = setting(False, "go on past the end of text")
    sliding_context: bool = setting(
        False, "where the context is full, forget its first half and go on; false: the answer ends there"
    )
    stream: bool = setting(True, "print as it is drawn")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < GREEDY_BELOW


class InferenceConfig(Section):
    """Which model is used and on what."""

    model: str | None = setting(
        None, "a model folder, a run folder, a checkpoint or a hub name", aliases=("model_path", "checkpoint")
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto", "type of the weights", aliases=("dtype",)
    )
    compile: Literal["auto", "on", "off"] = setting("auto", "torch.compile of the decoding step")
    adapter: str | None = setting(
        None,
        "adapters to answer with: a name in the model, or a PEFT folder; none: the model's own; base: none",
    )
    domain: str | None = setting(None, "whose domain adapter answers, by its name; none: no domain's")
    prompt: str | None = setting(
        None, "text to go on from; FILE:path reads it from a file", aliases=("start",)
    )
