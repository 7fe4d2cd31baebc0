"""Sections of features: they load whole; what is not built yet refuses to be switched on."""

from __future__ import annotations

from typing import Literal

from llm_trainer.config.schema.base import Section, setting

# Section → the field of `training` that switches it on.
SWITCHES = {
    "knowledge_distillation": "use_knowledge_distillation",
    "computational_efficiency": "use_computational_efficiency",
    "adaptive_reasoning": "use_adaptive_reasoning",
}


class DistillationConfig(Section):
    """Learning from a teacher."""

    alpha: float = setting(0.5, "weight of the teacher's part of the loss", ge=0, le=1)
    temperature: float = setting(2.0, "softening of both distributions", gt=0)
    distill_logits: bool = setting(True, "match the teacher's distribution")
    distill_hidden_states: bool = setting(False, "match the teacher's hidden states", owed=True)
    distill_attention: bool = setting(False, "match the teacher's attention maps", owed=True)
    adaptation_type: Literal["none", "domain_specific"] = setting(
        "none", "domain_specific: weight the loss by domain", owed=True
    )


class EfficiencyConfig(Section):
    """Memory and speed; applied with use_computational_efficiency."""

    use_efficient_attention: bool = setting(True, "fused attention kernels", owed=True)
    use_quantization: bool = setting(False, "quantise the trained model", owed=True)
    quantization_bits: Literal[4, 8] = setting(8, "bits a weight")
    use_kv_cache: bool = setting(True, "keep keys and values while generating", owed=True)
    use_adaptive_batch_size: bool = setting(
        False, "find the largest micro-batch that fits, as micro_batch_size auto does"
    )
    min_batch_size: int = setting(1, "smallest micro-batch it may choose", unit="sequences", gt=0)
    max_batch_size: int | None = setting(None, "largest micro-batch it may choose", unit="sequences", gt=0)


class AdaptiveReasoningConfig(Section):
    """How much computation a prompt gets."""

    low_complexity_threshold: float = setting(0.3, "below this a prompt is easy", ge=0, le=1)
    medium_complexity_threshold: float = setting(0.7, "above this a prompt is hard", ge=0, le=1)
    max_computation_budget: float = setting(1.0, "share of the layers that a hard prompt gets", gt=0, le=1)
    min_computation_budget: float = setting(0.5, "share of the layers that an easy prompt gets", gt=0, le=1)
    use_early_exit: bool = setting(False, "leave early when sure", owed=True)
