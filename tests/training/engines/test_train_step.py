"""One step: accumulation changes nothing, non-finite values change nothing, dropout is a function of the
position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_run import CONTEXT, SHAPE, VOCABULARY, tiny_model, tiny_trainer
from torch import Tensor

from llm_trainer.config import ModelConfig
from llm_trainer.data.sampling.batch import Batch
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.engines.precision import Precision
from llm_trainer.training.engines.train_step import TrainingDivergedError, clip_gradients, forward_backward
from llm_trainer.training.objectives.cross_entropy import LossMode
from llm_trainer.training.objectives.objective import LossSum, ModelWithObjective, NextToken

CPU = torch.device("cpu")


def _batch(rows: int = 8, seed: int = 0) -> Batch:
    """Rows of which each has another number of labels, one of them none."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (rows, CONTEXT + 1), generator=generator)
    labels = ids[:, 1:].clone()
    for row in range(rows):
        labels[row, row:] = -100
    return Batch(ids[:, :-1].contiguous(), labels, None, int((labels != -100).sum()))


def _parts(batch: Batch, count: int) -> list[Batch]:
    pairs = zip(batch.input_ids.chunk(count), batch.labels.chunk(count), strict=True)
    return [Batch(ids, labels, None, int((labels != -100).sum())) for ids, labels in pairs]


def _gradients(
    batches: Sequence[Batch], *, dropout: float = 0.0, index: int = 0, loss: LossMode = "auto"
) -> list[Tensor]:
    model = tiny_model(ModelConfig(**SHAPE | {"dropout": dropout}))
    tokens = sum(batch.num_supervised for batch in batches)
    mean = forward_backward(
        ModelWithObjective(model, NextToken(loss)),
        batches,
        tokens,
        Precision("fp32", CPU),
        seed=1,
        index=index,
    )
    return [mean, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize("loss", ["dense", "chunked"])
@pytest.mark.parametrize("count", [2, 4])
def test_accumulation_over_ragged_labels_gives_the_full_batchs_gradient(count: int, loss: LossMode) -> None:
    batch = _batch()
    assert (
        len({part.num_supervised for part in _parts(batch, count)}) == count
    )  # a mean of means would differ
    for accumulated, whole in zip(
        _gradients(_parts(batch, count), loss=loss), _gradients([batch], loss=loss), strict=True
    ):
        torch.testing.assert_close(accumulated, whole, rtol=1e-5, atol=1e-7)


def test_dropout_depends_on_step_and_micro_batch_and_on_nothing_before() -> None:
    torch.manual_seed(123)
    first = _gradients(_parts(_batch(), 2), dropout=0.3, index=5)
    torch.manual_seed(456)
    torch.rand(7)
    again = _gradients(_parts(_batch(), 2), dropout=0.3, index=5)
    other_step = _gradients(_parts(_batch(), 2), dropout=0.3, index=6)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert not torch.equal(first[0], other_step[0])


def test_gradients_are_clipped_to_a_joint_norm_and_zero_means_never() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(4))]
    for limit, expected in ((1.0, 1.0), (0.0, 7.0**0.5 * 2)):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 2.0)
        assert clip_gradients(parameters, limit).item() == pytest.approx(7.0**0.5 * 2)
        norm = torch.cat([p.grad for p in parameters if p.grad is not None]).norm().item()
        assert norm == pytest.approx(expected, rel=1e-5)


class _PoisonedObjective(NextToken):
    """Not a number on the micro-batches numbered here, counted from 0 through the run."""

    def __init__(self, poisoned: set[int]) -> None:
        super().__init__()
        self.poisoned, self.seen = poisoned, 0

    def __call__(self, model: Transformer, batch: Batch) -> LossSum:
        loss = super().__call__(model, batch)
        if torch.is_grad_enabled():
            self.seen += 1
            if self.seen - 1 in self.poisoned:
                return LossSum(loss.total * float("nan"), loss.tokens)
        return loss


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_non_finite_batch_changes_nothing_and_is_named(tmp_path: Path, optimizer: str) -> None:
    output = StringIO()
    trainer = tiny_trainer(
        tmp_path,
        console=Console(file=output, width=200),
        max_steps=3,
        optimizer=optimizer,
        save_interval=None,
    )
    trainer.run.engine.objective = _PoisonedObjective({3})  # the second micro-batch of the second step
    trainer._prepare()
    trainer._train_step()
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer._train_step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    assert "step 2 skipped: loss nan" in output.getvalue()
    assert "samples 8 to 15" in output.getvalue()
    trainer._train_step()
    assert not all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    assert (trainer.current_step, trainer.run.state.samples, trainer.run.state.skipped_in_a_row) == (3, 24, 0)


def test_too_many_bad_steps_in_a_row_end_the_run_with_the_way_out(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, max_skipped_steps=3, gradient_accumulation_steps=1)
    trainer.run.engine.objective = _PoisonedObjective(
        {0, 1, 3, 4, 5}
    )  # two are tolerated, the third in a row is not
    with pytest.raises(
        TrainingDivergedError, match=r"3 steps in a row .* samples 20 to 23; lower learning_rate"
    ):
        trainer.train()
    assert trainer.current_step == 6


def test_a_step_without_supervised_tokens_is_skipped_and_divides_by_nothing(tmp_path: Path) -> None:
    output = StringIO()
    trainer = tiny_trainer(tmp_path, console=Console(file=output, width=200), gradient_accumulation_steps=1)
    trainer._prepare()
    empty = replace(_batch(4), labels=torch.full((4, CONTEXT), -100), num_supervised=0)
    trainer.run._micro_batches = iter([empty])  # type: ignore[assignment]
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer._train_step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    assert "no supervised token" in output.getvalue()


@pytest.mark.slow
def test_fp16_scales_the_loss_and_keeps_the_scale_in_the_checkpoint(tmp_path: Path) -> None:
    trainer = tiny_trainer(
        tmp_path / "straight", precision="fp16", max_steps=6, save_interval=3, eval_interval=6, eval_iters=1
    )
    result = trainer.train()
    assert result.loss is not None
    assert result.loss == result.loss
    assert trainer.run.engine.precision.state_dict()["_growth_tracker"] == 6
    resumed = tiny_trainer(
        tmp_path / "resumed",
        precision="fp16",
        max_steps=6,
        eval_interval=6,
        eval_iters=1,
        resume_from=str(tmp_path / "straight/checkpoint-3"),
    )
    resumed.train()
    assert resumed.run.engine.precision.state_dict() == trainer.run.engine.precision.state_dict()
    for one, other in zip(resumed.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(one, other)
