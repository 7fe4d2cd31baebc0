"""What a run is: the typed schema and the ways to say it."""

from llm_trainer.config.duration import Duration
from llm_trainer.config.schema.data import DataConfig
from llm_trainer.config.schema.features import AdaptiveReasoningConfig, DistillationConfig, EfficiencyConfig
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
