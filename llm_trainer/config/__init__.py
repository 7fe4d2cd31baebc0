"""What a run is: the typed schema and the ways to say it."""

from llm_trainer.config.data import DataConfig
from llm_trainer.config.durations import Duration
from llm_trainer.config.errors import CheckpointError, DataError, LLMTrainerError, UsageError
from llm_trainer.config.features import AdaptiveReasoningConfig, DistillationConfig, EfficiencyConfig
from llm_trainer.config.generation import GenerationConfig, InferenceConfig
from llm_trainer.config.model import ModelConfig, RopeScaling
from llm_trainer.config.run import RunConfig
from llm_trainer.config.training import TrainingConfig

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
