"""The tokens that can have the largest logits, found with an int8 copy of the head: a quarter of the bytes of
fp32, half of those of bf16.

What: the product of one row with the head takes as long as reading the head, and greedy or top-k decoding
looks at a few of the resulting logits. So the product is first taken with a copy of the head in eight bits,
whose error is bounded row by row. Only the tokens that may still be among the largest by that bound (about 4
of 32,000 for greedy decoding, 150 for top-50) are then computed from the weights themselves. The sampled
token is the one that the full product gives. (Maximum inner product search by scan and rescoring, as with
compressed vectors in Jégou et al. 2011, doi:10.1109/TPAMI.2010.57, but with a bound instead of a guess.)

With w = s·q + e and x = y + r, where s·q and y are what was kept of w and x, and e and r what was lost, |w·x
− s·q·y| ≤ ‖e‖‖x‖ + ‖s·q‖‖r‖ by Cauchy and Schwarz. The vector is kept in two digits of eight bits, so that r
hardly counts. Both digits are rows of one product, which oneDNN takes exactly, in integers. The rest is
numpy, because passes over a vocabulary are too short to be worth waking a second thread.

Why: with 32,000 tokens, the full product takes 2.6 ms of a step in fp32 and 1.6 in bf16; the search takes 0.9
to 1.0 ms for the int8 product and 0.15 for the passes after it (docs/explanation/decisions.md). Check:
tests/inference/cpu/test_int8_candidates.py compares it with the full product, also for ties, and compares
generated ids with and without it. Switch: LLM_TRAINER_CPU_DECODER=0 (see the package's docstring).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from llm_trainer.cpu_features import multiplies_int8
from llm_trainer.torch_compat import int8_linear, pack_int8_weight

Vector = np.ndarray[tuple[int], np.dtype[np.float32]]

# With fewer weights the product is done before the search would pay.
MIN_WEIGHTS = 4_000_000
# The largest fraction of the tokens that may remain to be computed exactly; with more, the full product is
# faster.
MAX_FRACTION = 0.05
# Rows quantized at once: their copies in fp32 should stay within a core's cache.
ROWS_AT_ONCE = 512
LARGEST_DIGIT, ZERO_POINT = 127, 128
# Rounding of sums of products in fp32, relative to the product of the two norms; generous for any order of
# summation.
ROUNDING = 1e-5


class Int8Candidates:
    """An int8 copy of a head's rows (V, C), and the bound of what each row lost."""

    def __init__(self, weight: Tensor) -> None:
        """Quantize the head; this takes V × C bytes, and some tenths of a second for 16 million weights.

        Args:
            weight: (V, C), fp32 or bf16, on the CPU.
        """
        rows, width = weight.shape
        self._digit = torch.finfo(weight.dtype).eps
        self._scale = torch.empty(rows)
        lost = torch.empty(rows)
        self._largest_norm = 0.0
        quantized = torch.empty(rows, width, dtype=torch.int8)
        for start in range(0, rows, ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            exact = weight[part].float()
            scale = (exact.abs().amax(dim=1) / LARGEST_DIGIT).clamp_min(torch.finfo(torch.float32).tiny)
            digits = (exact / scale[:, None]).round_()
            quantized[part] = digits.to(torch.int8)
            digits *= scale[:, None]
            self._scale[part] = scale
            lost[part] = (exact - digits).norm(dim=1)
            self._largest_norm = max(self._largest_norm, float(digits.norm(dim=1).amax()))
        self._lost: Vector = lost.numpy()
        self._packed = pack_int8_weight(quantized)
        self._zero_points = torch.zeros(rows, dtype=torch.int32)
        # Bounds say nothing about rows that are not finite; the full product shows them.
        self._max_count = int(MAX_FRACTION * rows) if bool(lost.isfinite().all()) else 0

    def __call__(self, x: Tensor, count: int) -> Tensor | None:
        """Find the rows that can have the largest products with a vector.

        Args:
            x: The vector, (C,).
            count: How many of the largest products are wanted.

        Returns:
            Ids of rows, ascending, among them those of the `count` largest products and all that are equal to
            one of them. None where so many rows remain that the full product is faster.
        """
        if count > self._max_count:
            return None
        vector = x.float().numpy()
        length = float(np.linalg.norm(vector))
        if not 0 < length < float("inf"):
            return None
        digits, (coarse, fine), lost = in_two_digits(vector)
        products = self._products(torch.from_numpy(digits)).numpy()
        found = products[0] * coarse
        found += products[1] * fine
        likely = [int(found.argmax())] if count == 1 else torch.from_numpy(found).topk(count).indices.numpy()
        # The last of the `count` largest products is at least what any `count` rows surely reach.
        least = found[likely] - self._lost[likely] * length
        bar = float(least.min())
        # Sums in fp32, and the full product's rounding to its own type, which may also make products equal.
        rounding = ROUNDING * self._largest_norm * length + 2 * self._digit * abs(bar)
        found += self._lost * length
        ids = np.flatnonzero(found >= bar - 2 * (self._largest_norm * lost + rounding))
        return torch.from_numpy(ids) if ids.size <= self._max_count else None

    def _products(self, digits: Tensor) -> Tensor:
        """Digits (2, C), 128 above the numbers that they mean → (2, V)."""
        return int8_linear(digits, ZERO_POINT, self._packed, self._scale, self._zero_points)


def in_two_digits(
    vector: Vector,
) -> tuple[np.ndarray[tuple[int, int], np.dtype[np.uint8]], tuple[float, float], float]:
    """Write a vector in two digits of eight bits.

    Args:
        vector: (C,).

    Returns:
        The digits, (2, C), 128 above the numbers that they mean; their two scales; and the norm of what was
        lost.
    """
    coarse_scale = float(np.abs(vector).max()) / LARGEST_DIGIT
    coarse = np.rint(vector / coarse_scale)
    rest = vector - coarse * coarse_scale
    fine_scale = coarse_scale / (2 * LARGEST_DIGIT)
    fine = np.clip(np.rint(rest / fine_scale), -LARGEST_DIGIT, LARGEST_DIGIT)
    lost = float(np.linalg.norm(rest - fine * fine_scale))
    digits = (np.stack((coarse, fine)) + ZERO_POINT).astype(np.uint8)
    return digits, (coarse_scale, fine_scale), lost


def is_worthwhile(weight: Tensor) -> bool:
    """Whether a head (V, C) is large enough for the search, and has a device and type that the search
    supports.
    """
    is_supported = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
    return is_supported and weight.numel() >= MIN_WEIGHTS and has_exact_int8_products()


def has_exact_int8_products() -> bool:
    """Whether oneDNN uses VNNI here. Without it, sums of two int8 products saturate at 16 bits."""
    return multiplies_int8()
