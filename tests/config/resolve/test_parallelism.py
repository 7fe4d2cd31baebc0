"""Parallel dimensions are resolved from the settings, and sizes that do not fit are errors."""

from __future__ import annotations

import pytest

from llm_trainer.config import ModelConfig, RunConfig, TrainingConfig, UsageError
from llm_trainer.config.parse.validation import check_complete
from llm_trainer.config.resolve.parallelism import ParallelPlan, check_shape, resolve_plan
from llm_trainer.config.resolve.settings import resolve_settings


def check(ranks: int, **training: object) -> None:
    """Resolve and check a run's settings for this many ranks."""
    config = RunConfig(training=training)
    settings = resolve_settings(config, resolve_plan(config.training, ranks))
    check_complete(settings, {}, {"training"})


@pytest.mark.parametrize(
    ("training", "ranks", "plan"),
    [
        ({}, 1, ParallelPlan(1, 1)),
        ({}, 4, ParallelPlan(4, 1)),
        ({"fsdp": 2}, 4, ParallelPlan(2, 2)),
        ({"fsdp": 4}, 4, ParallelPlan(1, 4)),
        ({"data_parallel": 2, "fsdp": 4}, 8, ParallelPlan(2, 4)),
        ({"tensor_parallel": 2}, 4, ParallelPlan(2, 1, 2)),
        ({"tensor_parallel": 2, "pipeline_parallel": 2, "fsdp": 2}, 16, ParallelPlan(2, 2, 2, 2)),
        ({"context_parallel": 4, "tensor_parallel": 2}, 16, ParallelPlan(2, 1, 2, 1, 4)),
    ],
)
def test_unset_data_parallel_is_what_the_other_dimensions_leave(
    training: dict[str, int], ranks: int, plan: ParallelPlan
) -> None:
    assert resolve_plan(TrainingConfig(**training), ranks) == plan
    assert plan.ranks == ranks


@pytest.mark.parametrize(
    ("training", "ranks", "message"),
    [
        ({"fsdp": 3}, 4, "fsdp 3 does not fit: 4 processes were started"),
        ({"fsdp": 2}, 1, "fsdp 2 does not fit: 1 process was started"),
        ({"tensor_parallel": 2}, 1, "start 2 or a multiple (torchrun --nproc_per_node=2"),
        ({"data_parallel": 3, "fsdp": 2}, 4, "data_parallel 3 × fsdp 2 = 6, but 4 processes were started"),
        (
            {"tensor_parallel": 2, "pipeline_parallel": 3},
            8,
            "tensor_parallel 2 × pipeline_parallel 3 = 6 does not fit: 8 proc",
        ),
        ({"data_parallel": 2}, 1, "data_parallel 2 × fsdp 1 = 2, but 1 process was started"),
        ({"fsdp": 2, "context_parallel": 3}, 8, "fsdp 2 × context_parallel 3 = 6 does not fit: 8 proc"),
    ],
)
def test_sizes_whose_product_is_not_the_number_of_ranks_are_an_error(
    training: dict[str, int], ranks: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message.replace("(", "\\(")):
        resolve_plan(TrainingConfig(**training), ranks)


@pytest.mark.parametrize("plan", [ParallelPlan(2, 2, 2, 2), ParallelPlan(1, 2, 1, 3), ParallelPlan(3, 1, 4)])
def test_one_rank_per_data_rank_owns_the_loss(plan: ParallelPlan) -> None:
    owners = [rank for rank in range(plan.ranks) if plan.owns_loss(rank)]
    assert sorted(plan.data_rank(rank) for rank in owners) == list(range(plan.data_ranks))
    for group in range(plan.data_ranks):
        members = [rank for rank in range(plan.ranks) if plan.data_rank(rank) == group]
        assert len(members) == plan.tensor_parallel * plan.pipeline_parallel
        assert {plan.stage(rank) for rank in members} == set(range(plan.pipeline_parallel))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (ParallelPlan(tensor_parallel=4), "num_key_value_heads 2 is not divisible by tensor_parallel 4"),
        (ParallelPlan(tensor_parallel=3), "num_attention_heads 4 is not divisible by tensor_parallel 3"),
        (ParallelPlan(pipeline_parallel=3), "pipeline_parallel 3 is more stages than the model has layers"),
        (
            ParallelPlan(context_parallel=3),
            "context_parallel 3 .*max_position_embeddings 8 is not a multiple of 6",
        ),
        (
            ParallelPlan(pipeline_parallel=2, context_parallel=2),
            "context_parallel 2 is not supported with pipeline_parallel 2",
        ),
    ],
)
def test_a_shape_that_cannot_be_sharded_is_an_error_with_the_number(plan: ParallelPlan, message: str) -> None:
    model = ModelConfig(
        hidden_size=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=8,
    )
    with pytest.raises(UsageError, match=message):
        check_shape(plan, model)


def test_context_ranks_read_the_same_samples_and_all_own_the_loss_of_their_tokens() -> None:
    plan = ParallelPlan(data_parallel=2, tensor_parallel=2, context_parallel=3)
    assert plan.ranks == 12
    for group in range(2):
        members = [rank for rank in range(plan.ranks) if plan.data_rank(rank) == group]
        assert [plan.context_rank(rank) for rank in members if plan.owns_loss(rank)] == [0, 1, 2]
        assert [plan.token_rank(rank) - 3 * group for rank in members] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("name", ["fsdp", "tensor_parallel", "context_parallel"])
def test_offload_optimizer_is_not_supported_with_sharded_state(name: str) -> None:
    with pytest.raises(UsageError, match=rf"offload_optimizer .*cannot be combined with training.{name}"):
        check(2, offload_optimizer=True, **{name: 2})


@pytest.mark.parametrize("name", ["tensor_parallel", "pipeline_parallel"])
def test_fp16_is_not_supported_with_tensor_and_pipeline_parallelism(name: str) -> None:
    check(2, precision="fp16", fsdp=2)
    with pytest.raises(UsageError, match=f"precision fp16 is not supported with {name} 2.*bf16"):
        check(2, precision="fp16", **{name: 2})


@pytest.mark.parametrize("unknown", ["init_from", "resume_from"])
@pytest.mark.parametrize(
    "training", [{"tensor_parallel": 8}, {"pipeline_parallel": 16, "batch_size": 1}, {"context_parallel": 3}]
)
def test_a_shape_that_comes_with_the_weights_is_not_checked_before_they_are_loaded(
    unknown: str, training: dict[str, int]
) -> None:
    ranks = next(iter(training.values()))
    check(ranks, **{**training, unknown: "somewhere"})
    with pytest.raises(UsageError):
        check(ranks, **training)


def test_pipeline_stages_are_balanced() -> None:
    from llm_trainer.distributed.pipeline import stage_bounds

    assert stage_bounds(4, 2) == [(0, 2), (2, 4)]
    assert stage_bounds(5, 2) == [(0, 3), (3, 5)]
    assert [last - first for first, last in stage_bounds(7, 4)] == [2, 2, 2, 1]
