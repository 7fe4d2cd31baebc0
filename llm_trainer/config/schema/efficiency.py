"""Settings of memory and speed, in the form of a manual's section `computational_efficiency`."""

from __future__ import annotations

from typing import ClassVar, Literal

from llm_trainer.config.schema.base import Section, setting


class EfficiencyConfig(Section):
    """Memory and speed. Applied only with `use_computational_efficiency`."""

    help_heading: ClassVar[str] = "Computational efficiency"

    use_efficient_attention: bool = setting(True, "Use fused attention kernels.", not_implemented=True)
    use_quantization: bool = setting(False, "Quantize the trained model.", not_implemented=True)
    quantization_bits: Literal[4, 8] = setting(8, "Bits per quantized weight.")
    use_kv_cache: bool = setting(True, "Cache keys and values in generation.", not_implemented=True)
    use_adaptive_batch_size: bool = setting(
        False, "Find the largest micro-batch size that fits in memory, as micro_batch_size auto does."
    )
    min_batch_size: int = setting(1, "Smallest micro-batch size that may be chosen.", unit="sequences", gt=0)
    max_batch_size: int | None = setting(
        None, "Largest micro-batch size that may be chosen.", unit="sequences", gt=0
    )
