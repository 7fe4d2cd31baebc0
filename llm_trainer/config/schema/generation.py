"""How text is sampled from a model, and which model is used."""

from __future__ import annotations

from typing import ClassVar, Literal

from llm_trainer.config.schema.base import MAX_SEED, Section, setting

# Logits divided by a much smaller temperature overflow in single precision. At this temperature all the
# probability is on one token already.
GREEDY_BELOW = 1e-6


class GenerationConfig(Section):
    """How one text is sampled. Temperature 0 is greedy decoding."""

    help_heading: ClassVar[str] = "Generation"

    max_new_tokens: int = setting(
        200,
        "Largest number of tokens to generate.",
        unit="tokens",
        aliases=("max_tokens",),
        common=True,
        ge=0,
    )
    temperature: float = setting(
        0.8, "Sampling temperature. 0: always the most likely token.", common=True, ge=0
    )
    top_k: int | None = setting(
        None, "Sample from the k most likely tokens only.", unit="tokens", common=True, gt=0
    )
    top_p: float | None = setting(
        None,
        "Sample from the most likely tokens whose probabilities add up to this.",
        common=True,
        gt=0,
        le=1,
    )
    min_p: float | None = setting(
        None,
        "Sample from tokens whose probability is at least this fraction of the largest one.",
        common=True,
        ge=0,
        le=1,
    )
    repetition_penalty: float = setting(
        1.0,
        "Penalty on tokens that occurred before (Keskar 2019, arXiv:1909.05858). 1: none.",
        common=True,
        ge=0.01,
        le=100,
    )
    stop: list[str] = setting(
        list,
        "Texts at which generation stops; they are not part of the output.",
        aliases=("stop_strings",),
        split_commas=False,
        common=True,
    )
    seed: int | None = setting(
        None,
        "Random seed of the sampling. A seed gives the same text whatever else is in the batch.",
        common=True,
        ge=0,
        le=MAX_SEED,
    )
    num_samples: int = setting(1, "Number of completions per prompt.", aliases=("n",), common=True, gt=0)
    ignore_eos: bool = setting(False, "Continue after the end-of-text token.")
    sliding_context: bool = setting(
        False,
        "When the context is full, drop its first half and continue. False: generation ends there.",
    )
    stream: bool = setting(True, "Print the text while it is generated.", common=True)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < GREEDY_BELOW


class InferenceConfig(Section):
    """Which model is used, and on what."""

    help_heading: ClassVar[str] = "Model and prompt"

    model: str | None = setting(
        None,
        "Model: a model folder, a run folder, a checkpoint or a hub name.",
        aliases=("model_path", "checkpoint"),
        common=True,
    )
    device: str = setting("auto", "Device: auto, cpu, cuda, cuda:N or mps.", common=True)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto", "Data type of the weights.", aliases=("dtype",), common=True
    )
    compile: Literal["auto", "on", "off"] = setting("auto", "Compile the decoding step with torch.compile.")
    adapter: str | None = setting(
        None,
        "LoRA adapter to use: a name in the model, or a PEFT folder. Unset: the model's active ones. base: "
        "none.",
        common=True,
    )
    domain: str | None = setting(None, "Name of the domain whose adapter is used. Unset: none.")
    prompt: str | None = setting(
        None,
        "Text to continue; FILE:path reads it from a file.",
        aliases=("start",),
        common=True,
        none_is_text=True,
    )
