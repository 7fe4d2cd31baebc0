"""Settings of adaptive computation: how many layers a prompt gets."""

from __future__ import annotations

from typing import ClassVar

from llm_trainer.config.schema.base import Section, setting


class AdaptiveReasoningConfig(Section):
    """Amount of computation by difficulty of the prompt."""

    help_heading: ClassVar[str] = "Adaptive reasoning"

    low_complexity_threshold: float = setting(0.3, "Complexity below which a prompt is easy.", ge=0, le=1)
    medium_complexity_threshold: float = setting(0.7, "Complexity above which a prompt is hard.", ge=0, le=1)
    max_computation_budget: float = setting(
        1.0, "Fraction of the layers that a hard prompt gets.", gt=0, le=1
    )
    min_computation_budget: float = setting(
        0.5, "Fraction of the layers that an easy prompt gets.", gt=0, le=1
    )
    use_early_exit: bool = setting(False, "Exit early when the prediction is certain.", not_implemented=True)
