"""Products with a weight matrix as decoding needs them: for a single row on a CPU, `torch.mv`.

What and why: `torch.mv` reads fp32 weights a little faster than `F.linear` does for one row (3.9 to 4.2 ms
per token against 4.2 to 4.4, 56 M parameters on two cores) and bf16 weights 1.4 times faster (2.5 ms against
3.2 to 3.6). Under compilation it is a custom operator, which Inductor does not know and therefore calls; it
would rewrite `torch.mv` to a multiply-and-sum, which takes 10.2 and 3.3 ms.

Check: tests/inference/cpu/test_fused_decoder.py compares it with `F.linear`.
Switch: LLM_TRAINER_CPU_DECODER=0 (see the package's docstring).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# x (B, in), weight (out, in), bias (out,) or None → (B, out)
LinearFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def select_linear(weight: Tensor, rows: int) -> LinearFunction:
    """The fastest product with a matrix.

    Args:
        weight: A matrix of the type and on the device of those to multiply with.
        rows: How many rows the input has.

    Returns:
        `matvec` or `F.linear`.
    """
    single = rows == 1 and weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
    return matvec if single else F.linear


def matvec(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x·Wᵀ + bias for one row: x (1, in) → (1, out)."""
    y: Tensor = (
        torch.ops.llm_trainer.matrix_vector(weight, x[0])
        if torch.compiler.is_compiling()
        else torch.mv(weight, x[0])
    )
    return (y if bias is None else y + bias)[None]


_LIBRARY = torch.library.Library("llm_trainer", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("matrix_vector(Tensor weight, Tensor vector) -> Tensor")  # type: ignore[no-untyped-call]
_LIBRARY.impl("matrix_vector", torch.mv, "CPU")  # type: ignore[no-untyped-call]


@torch.library.register_fake("llm_trainer::matrix_vector")  # type: ignore[untyped-decorator]
def _matrix_vector_shape(weight: Tensor, vector: Tensor) -> Tensor:
    return weight.new_empty(weight.size(0))
