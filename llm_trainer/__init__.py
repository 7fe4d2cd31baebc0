"""From a folder of text to a served language model.

The names below are imported when first asked for (PEP 562), so that `import llm_trainer` costs no torch:

    from llm_trainer import Trainer, load_model
    from llm_trainer.config import ModelConfig, TrainingConfig, DataConfig
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_trainer.config import DataConfig, GenerationConfig, ModelConfig, RunConfig, TrainingConfig
    from llm_trainer.data.tokenization.tokenizer import Tokenizer
    from llm_trainer.inference.load_model import LanguageModel, load_model
    from llm_trainer.model.transformer import Transformer
    from llm_trainer.training.callbacks import Callback, EarlyStopping
    from llm_trainer.training.trainer import Trainer

__version__ = "0.1.0"

_HOMES = {
    "Callback": "llm_trainer.training.callbacks",
    "DataConfig": "llm_trainer.config",
    "EarlyStopping": "llm_trainer.training.callbacks",
    "GenerationConfig": "llm_trainer.config",
    "LanguageModel": "llm_trainer.inference.load_model",
    "ModelConfig": "llm_trainer.config",
    "RunConfig": "llm_trainer.config",
    "Tokenizer": "llm_trainer.data.tokenization.tokenizer",
    "Trainer": "llm_trainer.training.trainer",
    "TrainingConfig": "llm_trainer.config",
    "Transformer": "llm_trainer.model.transformer",
    "load_model": "llm_trainer.inference.load_model",
}

__all__ = [
    "Callback",
    "DataConfig",
    "EarlyStopping",
    "GenerationConfig",
    "LanguageModel",
    "ModelConfig",
    "RunConfig",
    "Tokenizer",
    "Trainer",
    "TrainingConfig",
    "Transformer",
    "load_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
