"""The model sizes of the manuals by name, each with its true parameter count next to the manual's figure.

A preset is only a shape: each setting in it can be overridden (`--preset framework-tiny --num_layers 4`).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from llm_trainer.config.param_count import parameter_count
from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.errors import UsageError


@dataclass(frozen=True)
class Preset:
    """A named model shape. `nominal_size` is the parameter count as the manual writes it, empty where it has
    none.
    """

    name: str
    settings: Mapping[str, object]
    nominal_size: str = ""

    def model(self) -> ModelConfig:
        """The shape as a `ModelConfig`."""
        return ModelConfig.model_validate(self.settings)

    def parameters(self) -> int:
        """The true number of parameters; a tied embedding counts once."""
        return parameter_count(self.model())


def _gpt2(
    name: str, figure: str, hidden: int, layers: int, heads: int, vocabulary: int = 50257, context: int = 1024
) -> Preset:
    shape = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
    }
    return Preset(
        name,
        {"model_type": "gpt2", "vocab_size": vocabulary, "max_position_embeddings": context, **shape},
        figure,
    )


def _llama(
    name: str, figure: str, hidden: int, layers: int, heads: int, kv_heads: int | None = None
) -> Preset:
    shape = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }
    return Preset(
        name, {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 2048, **shape}, figure
    )


PRESETS: Mapping[str, Preset] = {
    made.name: made
    for made in (
        _gpt2("enhanced-nano", "125M", 768, 12, 12),
        _gpt2("enhanced-small", "350M", 1024, 24, 16),
        _gpt2("enhanced-medium", "760M", 1536, 24, 16),
        _gpt2("enhanced-large", "1.3B", 2048, 24, 16),
        _gpt2("enhanced-xl", "2.7B", 2560, 32, 32),
        _llama("framework-tiny", "~20M", 256, 6, 8),
        _llama("framework-small", "~125M", 768, 12, 12),
        _llama("framework-medium", "~350M", 1024, 24, 16, 8),
        _llama("framework-large", "~800M", 1536, 24, 16, 8),
        _llama("framework-xl", "~1.5B", 2048, 32, 32, 8),
        _gpt2("trainer-small", "", 256, 4, 4, vocabulary=50000, context=512),
        _gpt2("trainer-medium", "", 768, 12, 12, vocabulary=50000),
        _gpt2("trainer-large", "", 1024, 24, 16, vocabulary=50000, context=2048),
        _gpt2("l1-tiny", "", 128, 2, 4),
        _gpt2("l1-base", "", 768, 12, 12),
    )
}


# What a preset only suggests: the vocabulary and context of a new run come from its data, those of a resumed
# run from its checkpoint.
_SUGGESTED = ("model.vocab_size", "model.max_position_embeddings", "data.vocab_size")


def is_suggested(dotted: str, origins: Mapping[str, str]) -> bool:
    """Whether the value of a setting is only a preset's suggestion, which data and checkpoints override.

    Args:
        dotted: The setting, such as `model.vocab_size`.
        origins: Dotted name → where its value came from.
    """
    origin = origins.get(dotted, "")
    return dotted in _SUGGESTED and origin.startswith(("preset ", "as model.vocab_size (preset "))


def get_preset(name: str) -> Preset:
    """Look up a preset by name; raises UsageError with the closest names for an unknown one."""
    key = name.lower().replace("_", "-")
    if key not in PRESETS:
        close = difflib.get_close_matches(key, PRESETS, n=3, cutoff=0.4)
        raise UsageError(
            f"there is no preset {name!r}; "
            + (f"did you mean {' or '.join(close)}? " if close else "")
            + "`llm-trainer presets` lists them"
        )
    return PRESETS[key]
