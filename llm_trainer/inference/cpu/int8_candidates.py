"""Which tokens can have the largest logits, found from an int8 copy of the head: a quarter of the bytes of
fp32, half of bf16.

One row's product with the head takes as long as reading it, and greedy or top-k decoding looks at a few of
the logits that come of it. So the product is first taken with a copy of the head in eight bits, whose error
is bounded row by row; only the tokens that may still be among the largest by that bound (some ten of 32,000)
are then computed from the weights themselves. What is drawn is what the whole product gives. (Maximum inner
product search by scan and rescoring, as with compressed vectors in Jégou et al. 2011,
doi:10.1109/TPAMI.2010.57, but with a bound instead of a guess.)

With w = s·q + e and x = y + r, where s·q and y are what was kept of them and e and r what was lost, |w·x −
s·q·y| ≤ ‖e‖‖x‖ + ‖s·q‖‖r‖ by Cauchy and Schwarz. The vector is kept in two digits of eight bits, so r hardly
counts; both digits are rows of one product, which oneDNN takes exactly, in integers. What follows it is
numpy's: passes over a vocabulary are too short to be worth waking a second thread for.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Vector = np.ndarray[tuple[int], np.dtype[np.float32]]

# Below so many weights a product is done before the search would pay.
FEWEST_WEIGHTS = 4_000_000
# Of the tokens, at most so large a share may be left to compute exactly; with more, the whole product is the
# faster one.
LARGEST_SHARE = 0.05
# Rows quantised at once: their copies in fp32 should stay within a core's cache.
ROWS_AT_ONCE = 512
LARGEST_DIGIT, ZERO_POINT = 127, 128
# Rounding of sums of products in fp32, relative to the product of the two norms; generous for any order of
# summation.
ROUNDING = 1e-5


class Shortlist:
    """An int8 copy of a head's rows (V, C), and the bound of what each row lost."""

    def __init__(self, weight: Tensor) -> None:
        """Weight (V, C) of fp32 or bf16 on the CPU; takes V × C bytes, and some tenths of a second for 16
        million weights.
        """
        rows, width = weight.shape
        self._digit = torch.finfo(weight.dtype).eps
        self._scale = torch.empty(rows)
        lost = torch.empty(rows)
        self._longest = 0.0
        quantised = torch.empty(rows, width, dtype=torch.int8)
        for start in range(0, rows, ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            exact = weight[part].float()
            scale = (exact.abs().amax(dim=1) / LARGEST_DIGIT).clamp_min(torch.finfo(torch.float32).tiny)
            digits = (exact / scale[:, None]).round_()
            quantised[part] = digits.to(torch.int8)
            digits *= scale[:, None]
            self._scale[part] = scale
            lost[part] = (exact - digits).norm(dim=1)
            self._longest = max(self._longest, float(digits.norm(dim=1).amax()))
        self._lost: Vector = lost.numpy()
        self._packed = torch.ops.onednn.qlinear_prepack(quantised, None)
        self._zero_points = torch.zeros(rows, dtype=torch.int32)
        self._most = int(LARGEST_SHARE * rows)

    def __call__(self, x: Tensor, count: int) -> Tensor | None:
        """Ids in ascending order, among them those of the `count` largest products of x (C,) with the rows
        and all that tie with them.

        None where so many rows come into question that the whole product is done sooner.
        """
        if count > self._most:
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
        # What any `count` rows surely reach, the last of the `count` largest reaches too.
        least = found[likely] - self._lost[likely] * length
        bar = float(least.min())
        # Sums in fp32, and the whole product's rounding to its own type, which may also make ties.
        rounding = ROUNDING * self._longest * length + 2 * self._digit * abs(bar)
        found += self._lost * length
        ids = np.flatnonzero(found >= bar - 2 * (self._longest * lost + rounding))
        return torch.from_numpy(ids) if ids.size <= self._most else None

    def _products(self, digits: Tensor) -> Tensor:
        """Digits (2, C), 128 above what they mean → (2, V)."""
        products: Tensor = torch.ops.onednn.qlinear_pointwise(
            digits,
            1.0,
            ZERO_POINT,
            self._packed,
            self._scale,
            self._zero_points,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return products


def in_two_digits(
    vector: Vector,
) -> tuple[np.ndarray[tuple[int, int], np.dtype[np.uint8]], tuple[float, float], float]:
    """A vector (C,) as two digits (2, C), 128 above what they mean, their scales, and the length of what is
    left of the vector.
    """
    coarse_scale = float(np.abs(vector).max()) / LARGEST_DIGIT
    coarse = np.rint(vector / coarse_scale)
    rest = vector - coarse * coarse_scale
    fine_scale = coarse_scale / (2 * LARGEST_DIGIT)
    fine = np.clip(np.rint(rest / fine_scale), -LARGEST_DIGIT, LARGEST_DIGIT)
    lost = float(np.linalg.norm(rest - fine * fine_scale))
    digits = (np.stack((coarse, fine)) + ZERO_POINT).astype(np.uint8)
    return digits, (coarse_scale, fine_scale), lost


def shortlist_pays(weight: Tensor) -> bool:
    """Whether a head (V, C) is large enough, and in a place and type that the search is made for."""
    fits = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
    return fits and weight.numel() >= FEWEST_WEIGHTS and multiplies_bytes_exactly()


def multiplies_bytes_exactly() -> bool:
    """Whether oneDNN is there and the processor has VNNI; without it, sums of two products of bytes saturate
    at 16 bits.
    """
    able = torch.cpu.get_capabilities()
    return torch.backends.mkldnn.is_available() and bool(able.get("avx512_vnni") or able.get("avx_vnni"))  # type: ignore[no-untyped-call]
