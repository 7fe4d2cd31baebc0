"""Which instructions this process may use: what the processor has, within the limits that the user has set.

PyTorch's own kernels obey ATEN_CPU_CAPABILITY and oneDNN's products obey ONEDNN_MAX_CPU_ISA. A choice made
from the processor's features alone would expect instructions that the libraries then do not use.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

# oneDNN's names for instruction sets, weakest first (oneDNN's documentation, "CPU Dispatcher Control").
_ONEDNN_ORDER = (
    "SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_BF16",
    "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX512_CORE_AMX_FP16",
)  # fmt: skip


def multiplies_bf16(environment: Mapping[str, str] | None = None) -> bool:
    """Whether matrix products in bf16 have instructions of their own here (AVX512-BF16 or AMX).

    Args:
        environment: Environment variables (default: the process's).

    Returns:
        False where the processor has none, or where ATEN_CPU_CAPABILITY or ONEDNN_MAX_CPU_ISA rule them out.
    """
    features = _features()
    has_amx = bool(features.get("amx_bf16")) and _allows("AVX512_CORE_AMX", environment)
    has_avx512 = bool(features.get("avx512_bf16")) and _allows("AVX512_CORE_BF16", environment)
    return _has_onednn() and (has_amx or has_avx512)


def multiplies_int8(environment: Mapping[str, str] | None = None) -> bool:
    """Whether products of bytes have instructions of their own here (VNNI).

    Without them, sums of two products of bytes saturate at 16 bits.

    Args:
        environment: Environment variables (default: the process's).
    """
    features = _features()
    has_avx512 = bool(features.get("avx512_vnni")) and _allows("AVX512_CORE_VNNI", environment)
    has_avx2 = bool(features.get("avx_vnni")) and _allows("AVX2_VNNI", environment)
    return _has_onednn() and (has_avx512 or has_avx2)


def _features() -> Mapping[str, object]:
    found: Mapping[str, object] = torch.cpu.get_capabilities()
    return found


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def _allows(needed: str, environment: Mapping[str, str] | None) -> bool:
    """Whether both limits leave oneDNN's instruction set `needed`."""
    variables = os.environ if environment is None else environment
    if needed.startswith("AVX512") and variables.get("ATEN_CPU_CAPABILITY", "").lower() in (
        "default",
        "avx2",
    ):
        return False
    limit = (variables.get("ONEDNN_MAX_CPU_ISA") or variables.get("DNNL_MAX_CPU_ISA") or "").upper()
    if limit not in _ONEDNN_ORDER:  # unset, DEFAULT, or a name that this oneDNN does not know: no limit
        return True
    return _ONEDNN_ORDER.index(needed) <= _ONEDNN_ORDER.index(limit)
