"""From a folder of text to a served language model.

The public names are imported when they are first used (PEP 562), so that `import llm_trainer` does not import
torch:

    from llm_trainer import DataConfig, ModelConfig, Trainer, TrainingConfig
    from llm_trainer import load_dataset, load_model, prepare_dataset
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_trainer.config import DataConfig, GenerationConfig, ModelConfig, RunConfig, TrainingConfig
    from llm_trainer.data.pipeline.pipeline import prepare_dataset
    from llm_trainer.data.prepared_dataset import load_dataset
    from llm_trainer.data.tokenization.tokenizer import Tokenizer
    from llm_trainer.inference.load_model import LanguageModel, load_model
    from llm_trainer.model.transformer import Transformer
    from llm_trainer.training.callbacks.callback import Callback
    from llm_trainer.training.callbacks.early_stopping import EarlyStopping
    from llm_trainer.training.trainer import Trainer

__version__ = "0.1.0"

_MODULES = {
    "Callback": "llm_trainer.training.callbacks.callback",
    "DataConfig": "llm_trainer.config",
    "EarlyStopping": "llm_trainer.training.callbacks.early_stopping",
    "GenerationConfig": "llm_trainer.config",
    "LanguageModel": "llm_trainer.inference.load_model",
    "ModelConfig": "llm_trainer.config",
    "RunConfig": "llm_trainer.config",
    "Tokenizer": "llm_trainer.data.tokenization.tokenizer",
    "Trainer": "llm_trainer.training.trainer",
    "TrainingConfig": "llm_trainer.config",
    "Transformer": "llm_trainer.model.transformer",
    "load_dataset": "llm_trainer.data.prepared_dataset",
    "load_model": "llm_trainer.inference.load_model",
    "prepare_dataset": "llm_trainer.data.pipeline.pipeline",
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
    "load_dataset",
    "load_model",
    "prepare_dataset",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
