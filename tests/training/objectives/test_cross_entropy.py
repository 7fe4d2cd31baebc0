"""The chunked loss equals the dense loss, with gradients, soft cap and ignored labels, in less memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llm_trainer.training.objectives import cross_entropy as losses
from llm_trainer.training.objectives.cross_entropy import LossMode, linear_cross_entropy_sum


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 rows, softmax 3 rows at a time, so that small tensors already cross every boundary."""
    monkeypatch.setattr(losses, "_CHUNK_BYTES", {"cpu": 16 * 97 * 2})
    monkeypatch.setattr(losses, "_CACHED_ELEMENTS", 3 * 97)


def _inputs(ignored: float = 0.2, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = (scale * torch.randn(53, 16, generator=generator)).requires_grad_()
    weight = torch.randn(97, 16, generator=generator).requires_grad_()
    labels = torch.randint(0, 97, (53,), generator=generator)
    labels[torch.rand(53, generator=generator) < ignored] = -100
    return hidden, weight, labels


def _loss_and_gradients(
    mode: LossMode, soft_cap: float | None = None, *, ignored: float = 0.2, scale: float = 1.0
) -> list[Tensor]:
    hidden, weight, labels = _inputs(ignored, scale)
    total = linear_cross_entropy_sum(hidden, weight, labels, mode=mode, soft_cap=soft_cap)
    (total / 7).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [total.detach(), hidden.grad, weight.grad]


@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("ignored", [0.0, 0.2, 1.0])
def test_chunked_loss_and_gradients_equal_the_dense_ones(soft_cap: float | None, ignored: float) -> None:
    dense = _loss_and_gradients("dense", soft_cap, ignored=ignored)
    chunked = _loss_and_gradients("chunked", soft_cap, ignored=ignored)
    for mine, reference in zip(chunked, dense, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)


def test_in_bf16_both_modes_are_equally_far_from_fp32() -> None:
    exact = _loss_and_gradients("dense")
    with torch.autocast("cpu", torch.bfloat16):
        dense, chunked = _loss_and_gradients("dense"), _loss_and_gradients("chunked")
    for reference, one, other in zip(exact, dense, chunked, strict=True):
        assert one.dtype == other.dtype == reference.dtype == torch.float32
        assert (other - reference).norm() <= 1.5 * (one - reference).norm() + 1e-6


def test_a_label_whose_probability_underflows_has_its_exact_loss() -> None:
    dense = _loss_and_gradients("dense", scale=60.0)
    chunked = _loss_and_gradients("chunked", scale=60.0)
    assert dense[0] / 53 > 110  # e^-110 is zero in fp32
    torch.testing.assert_close(chunked[0], dense[0], rtol=1e-5, atol=0)


def test_validation_computes_the_same_loss_without_gradients() -> None:
    hidden, weight, labels = _inputs()
    with torch.no_grad():
        evaluated = linear_cross_entropy_sum(hidden, weight, labels, mode="chunked")
    torch.testing.assert_close(
        evaluated, linear_cross_entropy_sum(hidden, weight, labels, mode="dense").detach(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_gets_no_gradient_and_the_other_its_own(frozen: int) -> None:
    reference = _loss_and_gradients("dense")[1 + 1 - frozen]
    tensors = [x.detach() for x in _inputs()[:2]]
    tensors[1 - frozen].requires_grad_()
    (linear_cross_entropy_sum(tensors[0], tensors[1], _inputs()[2], mode="chunked") / 7).backward()
    assert tensors[frozen].grad is None
    torch.testing.assert_close(tensors[1 - frozen].grad, reference, rtol=1e-5, atol=1e-5)


def test_a_second_backward_pass_raises_an_error() -> None:
    total = linear_cross_entropy_sum(*_inputs(), mode="chunked")
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated only once"):
        total.backward()


class _Largest(TorchDispatchMode):
    """Records the largest number of elements of any operation's result."""

    elements = 0

    def __torch_dispatch__(
        self, function: Callable[..., object], types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:  # type: ignore[type-arg]
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def _largest_result(mode: LossMode) -> int:
    hidden, weight, labels = _inputs()
    with _Largest() as largest:
        linear_cross_entropy_sum(hidden, weight, labels, mode=mode).backward()
    return largest.elements


def test_the_logits_are_never_all_in_memory() -> None:
    assert _largest_result("chunked") <= 16 * 97
    assert _largest_result("dense") == 53 * 97


def test_auto_is_dense_for_few_logits_and_chunked_for_many(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, chunked in ((53 * 97, False), (53 * 97 - 1, True)):
        monkeypatch.setattr(losses, "_MAX_DENSE_LOGITS", limit)
        total = linear_cross_entropy_sum(*_inputs(), mode="auto")
        assert ("ChunkedLoss" in type(total.grad_fn).__name__) == chunked
