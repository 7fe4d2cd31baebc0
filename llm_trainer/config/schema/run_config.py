"""All settings of a run, section by section. They are saved with each checkpoint as run.json."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from pydantic import model_validator

from llm_trainer.config.schema.adaptive_reasoning import AdaptiveReasoningConfig
from llm_trainer.config.schema.base import Section, setting
from llm_trainer.config.schema.data import DataConfig
from llm_trainer.config.schema.distillation import DistillationConfig
from llm_trainer.config.schema.efficiency import EfficiencyConfig
from llm_trainer.config.schema.generation import GenerationConfig, InferenceConfig
from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.config.schema.training import TrainingConfig
from llm_trainer.errors import UsageError

# Section → the field of `training` that enables it.
SWITCHES = {
    "knowledge_distillation": "use_knowledge_distillation",
    "computational_efficiency": "use_computational_efficiency",
    "adaptive_reasoning": "use_adaptive_reasoning",
}


class RunConfig(Section):
    """All sections. A setting may also be given in a section where a manual has it
    (`training.gradient_checkpointing`).
    """

    model: ModelConfig = setting(ModelConfig, "Shape of the network.")
    training: TrainingConfig = setting(TrainingConfig, "How the model is trained.")
    data: DataConfig = setting(DataConfig, "What the model is trained on.")
    generation: GenerationConfig = setting(GenerationConfig, "How text is sampled.")
    inference: InferenceConfig = setting(InferenceConfig, "Which model is used, and on what.")
    knowledge_distillation: DistillationConfig = setting(DistillationConfig, "Learning from a teacher.")
    computational_efficiency: EfficiencyConfig = setting(EfficiencyConfig, "Memory and speed.")
    adaptive_reasoning: AdaptiveReasoningConfig = setting(
        AdaptiveReasoningConfig, "Amount of computation by prompt."
    )

    @model_validator(mode="before")
    @classmethod
    def _resolve_dotted_aliases(cls, values: Any) -> Any:
        """Move settings that were given in another section (`dotted_aliases`) to their own section. Raises
        UsageError where both are given and differ.
        """
        if not isinstance(values, Mapping):
            return values
        moved = {
            name: dict(section) if isinstance(section, Mapping) else section
            for name, section in values.items()
        }
        for path, (home, name) in dotted_aliases().items():
            section, _, alias = path.partition(".")
            if not isinstance(moved.get(section), dict) or alias not in moved[section]:
                continue
            value = moved[section].pop(alias)
            if (
                section in SWITCHES
                and name not in SWITCHES.values()
                and not _is_enabled(moved.get("training", {}), SWITCHES[section])
            ):
                continue
            target = moved.setdefault(home, {})
            present = (
                section_class(home).normalize(target).get(name, value)
                if isinstance(target, dict)
                else getattr(target, name)
            )
            if present != section_class(home).normalize({name: value})[name]:
                raise UsageError(
                    f"{path}={value!r} and {home}.{name}={present!r} set the same option to different "
                    "values; give one "
                    "of them"
                )
            if isinstance(target, dict) and name not in section_class(home).normalize(target):
                target[name] = value
        return moved


def _is_enabled(training: object, switch: str) -> bool:
    values = (
        TrainingConfig.normalize(training)
        if isinstance(training, Mapping)
        else {switch: getattr(training, switch)}
    )
    return bool(values.get(switch))


@functools.cache
def section_types() -> Mapping[str, type[Section]]:
    """Section name → its class, in the order of `RunConfig`."""
    return {
        name: field.annotation
        for name, field in RunConfig.model_fields.items()
        if isinstance(field.annotation, type)
    }


def section_class(name: str) -> type[Section]:
    """The class of the section with this name."""
    return section_types()[name]


@functools.cache
def dotted_aliases() -> Mapping[str, tuple[str, str]]:
    """Dotted name in another section → (section, field) that it means."""
    return {
        path: (section, name)
        for section, kind in section_types().items()
        for name in kind.model_fields
        for path in kind.setting_of(name).dotted_aliases
    }
