"""Provide `from model import load_model` in the root of a clone.

The network itself is in llm_trainer/model/transformer.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # use a clone without installation

from llm_trainer.config import ModelConfig
from llm_trainer.inference.load_model import LanguageModel, load_model
from llm_trainer.model.transformer import Transformer

__all__ = ["LanguageModel", "ModelConfig", "Transformer", "load_model"]
