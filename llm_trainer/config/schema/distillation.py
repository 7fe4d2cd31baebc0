"""Settings of knowledge distillation."""

from __future__ import annotations

from typing import ClassVar, Literal

from llm_trainer.config.schema.base import Section, setting


class DistillationConfig(Section):
    """Knowledge distillation: learning from a teacher model."""

    help_heading: ClassVar[str] = "Knowledge distillation"

    alpha: float = setting(0.5, "Weight of the distillation loss.", ge=0, le=1)
    temperature: float = setting(2.0, "Temperature of both distributions in the distillation loss.", gt=0)
    distill_logits: bool = setting(True, "Match the teacher's output distribution.")
    distill_hidden_states: bool = setting(False, "Match the teacher's hidden states.", not_implemented=True)
    distill_attention: bool = setting(False, "Match the teacher's attention maps.", not_implemented=True)
    adaptation_type: Literal["none", "domain_specific"] = setting(
        "none", "domain_specific: weight the loss by domain.", not_implemented=True
    )
