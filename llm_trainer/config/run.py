"""A whole run: every section under one roof. Saved resolved with each checkpoint as run.json."""

from __future__ import annotations

from llm_trainer.config.data import DataConfig
from llm_trainer.config.features import AdaptiveReasoningConfig, DistillationConfig, EfficiencyConfig
from llm_trainer.config.fields import Section, setting
from llm_trainer.config.generation import GenerationConfig, InferenceConfig
from llm_trainer.config.model import ModelConfig
from llm_trainer.config.training import TrainingConfig


class RunConfig(Section):
    """Every section."""

    model: ModelConfig = setting(ModelConfig, "the network's shape")
    training: TrainingConfig = setting(TrainingConfig, "how it is trained")
    data: DataConfig = setting(DataConfig, "what it is trained on")
    generation: GenerationConfig = setting(GenerationConfig, "how text is drawn")
    inference: InferenceConfig = setting(InferenceConfig, "which model is used, on what")
    knowledge_distillation: DistillationConfig = setting(DistillationConfig, "learning from a teacher")
    computational_efficiency: EfficiencyConfig = setting(EfficiencyConfig, "memory and speed")
    adaptive_reasoning: AdaptiveReasoningConfig = setting(AdaptiveReasoningConfig, "computation by prompt")
