"""The typed schema of all settings, and the ways to set them: files, flags, presets and Python."""

from llm_trainer.config.duration import Duration
from llm_trainer.config.schema.adaptive_reasoning import AdaptiveReasoningConfig
from llm_trainer.config.schema.data import DataConfig
from llm_trainer.config.schema.distillation import DistillationConfig
from llm_trainer.config.schema.efficiency import EfficiencyConfig
from llm_trainer.config.schema.generation import GenerationConfig, InferenceConfig
from llm_trainer.config.schema.model import ModelConfig, RopeScaling
from llm_trainer.config.schema.run_config import RunConfig
from llm_trainer.config.schema.training import TrainingConfig
from llm_trainer.errors import CheckpointError, DataError, LLMTrainerError, UsageError

__all__ = [
    "AdaptiveReasoningConfig",
    "CheckpointError",
    "DataConfig",
    "DataError",
    "DistillationConfig",
    "Duration",
    "EfficiencyConfig",
    "GenerationConfig",
    "InferenceConfig",
    "LLMTrainerError",
    "ModelConfig",
    "RopeScaling",
    "RunConfig",
    "TrainingConfig",
    "UsageError",
]
