"""The whole of a run's settings, section by section; this is what is saved with each checkpoint as run.json."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from pydantic import model_validator

from llm_trainer.config.schema.base import Section, setting
from llm_trainer.config.schema.data import DataConfig
from llm_trainer.config.schema.features import (
    SWITCHES,
    AdaptiveReasoningConfig,
    DistillationConfig,
    EfficiencyConfig,
)
from llm_trainer.config.schema.generation import GenerationConfig, InferenceConfig
from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.config.schema.training import TrainingConfig
from llm_trainer.errors import UsageError


class RunConfig(Section):
    """Every section. A setting may also stand in a section where some manual puts it
    (`training.gradient_checkpointing`).
    """

    model: ModelConfig = setting(ModelConfig, "the network's shape")
    training: TrainingConfig = setting(TrainingConfig, "how it is trained")
    data: DataConfig = setting(DataConfig, "what it is trained on")
    generation: GenerationConfig = setting(GenerationConfig, "how text is drawn")
    inference: InferenceConfig = setting(InferenceConfig, "which model is used, on what")
    knowledge_distillation: DistillationConfig = setting(DistillationConfig, "learning from a teacher")
    computational_efficiency: EfficiencyConfig = setting(EfficiencyConfig, "memory and speed")
    adaptive_reasoning: AdaptiveReasoningConfig = setting(AdaptiveReasoningConfig, "computation by prompt")

    @model_validator(mode="before")
    @classmethod
    def _bring_home(cls, values: Any) -> Any:
        """Move settings that stand in another section (`paths`) to their home; raises UsageError where both
        are said and differ.
        """
        if not isinstance(values, Mapping):
            return values
        moved = {
            name: dict(section) if isinstance(section, Mapping) else section
            for name, section in values.items()
        }
        for path, (home, name) in path_aliases().items():
            section, _, said = path.partition(".")
            if not isinstance(moved.get(section), dict) or said not in moved[section]:
                continue
            value = moved[section].pop(said)
            if (
                section in SWITCHES
                and name not in SWITCHES.values()
                and not _is_on(moved.get("training", {}), SWITCHES[section])
            ):
                continue
            target = moved.setdefault(home, {})
            present = (
                home_section(home).settle(target).get(name, value)
                if isinstance(target, dict)
                else getattr(target, name)
            )
            if present != home_section(home).settle({name: value})[name]:
                raise UsageError(
                    f"{path}={value!r} and {home}.{name}={present!r} are two places of one setting; give one value"
                )
            if isinstance(target, dict) and name not in home_section(home).settle(target):
                target[name] = value
        return moved


def _is_on(training: object, switch: str) -> bool:
    settled = (
        TrainingConfig.settle(training)
        if isinstance(training, Mapping)
        else {switch: getattr(training, switch)}
    )
    return bool(settled.get(switch))


@functools.cache
def section_types() -> Mapping[str, type[Section]]:
    """Section name → its class, in the order of RunConfig."""
    return {
        name: field.annotation
        for name, field in RunConfig.model_fields.items()
        if isinstance(field.annotation, type)
    }


def home_section(name: str) -> type[Section]:
    """The class of the section with this name."""
    return section_types()[name]


@functools.cache
def path_aliases() -> Mapping[str, tuple[str, str]]:
    """Dotted name in another section → (section, field) that it means."""
    return {
        path: (section, name)
        for section, kind in section_types().items()
        for name in kind.model_fields
        for path in kind.setting_of(name).paths
    }
