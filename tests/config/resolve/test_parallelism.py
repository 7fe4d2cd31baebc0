"""The plan is settled with the settings, and a product that does not fit says which one."""

from __future__ import annotations

import pytest

from llm_trainer.config import ModelConfig, RunConfig, TrainingConfig, UsageError
from llm_trainer.config.parse.validation import check_whole
from llm_trainer.config.resolve.parallelism import ParallelPlan, check_shape, resolve_plan


@pytest.mark.parametrize(
    ("said", "ranks", "plan"),
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
def test_replicas_are_what_shards_leave(said: dict[str, int], ranks: int, plan: ParallelPlan) -> None:
    assert resolve_plan(TrainingConfig(**said), ranks) == plan
    assert plan.ranks == ranks


@pytest.mark.parametrize(
    ("said", "ranks", "words"),
    [
        ({"fsdp": 3}, 4, "fsdp 3 does not fit: 4 processes were started"),
        ({"fsdp": 2}, 1, "fsdp 2 does not fit: 1 process was started"),
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
def test_a_product_that_does_not_fit_is_named(said: dict[str, int], ranks: int, words: str) -> None:
    with pytest.raises(UsageError, match=words.replace("(", "\\(")):
        resolve_plan(TrainingConfig(**said), ranks)


@pytest.mark.parametrize("plan", [ParallelPlan(2, 2, 2, 2), ParallelPlan(1, 2, 1, 3), ParallelPlan(3, 1, 4)])
def test_each_group_of_ranks_with_its_own_samples_is_heard_once(plan: ParallelPlan) -> None:
    speakers = [rank for rank in range(plan.ranks) if plan.speaks(rank)]
    assert sorted(plan.data_rank(rank) for rank in speakers) == list(range(plan.data_ranks))
    for group in range(plan.data_ranks):
        members = [rank for rank in range(plan.ranks) if plan.data_rank(rank) == group]
        assert len(members) == plan.tensor_parallel * plan.pipeline_parallel
        assert {plan.stage(rank) for rank in members} == set(range(plan.pipeline_parallel))


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (ParallelPlan(tensor_parallel=4), "tensor_parallel 4 does not divide num_key_value_heads 2"),
        (ParallelPlan(tensor_parallel=3), "tensor_parallel 3 does not divide num_attention_heads 4"),
        (ParallelPlan(pipeline_parallel=3), "pipeline_parallel 3 is more stages than the model has layers"),
        (ParallelPlan(context_parallel=3), "context_parallel 3 .* 6 does not divide the context of 8 tokens"),
        (
            ParallelPlan(pipeline_parallel=2, context_parallel=2),
            "context_parallel 2 and pipeline_parallel 2 do not go together",
        ),
    ],
)
def test_a_model_that_cannot_be_cut_so_is_refused_by_what_does_not_divide(
    plan: ParallelPlan, words: str
) -> None:
    model = ModelConfig(
        hidden_size=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=8,
    )
    with pytest.raises(UsageError, match=words):
        check_shape(plan, model)


def test_ranks_that_share_sequences_have_one_groups_samples_and_are_all_heard() -> None:
    plan = ParallelPlan(data_parallel=2, tensor_parallel=2, context_parallel=3)
    assert plan.ranks == 12
    for group in range(2):
        members = [rank for rank in range(plan.ranks) if plan.data_rank(rank) == group]
        assert [plan.context_rank(rank) for rank in members if plan.speaks(rank)] == [0, 1, 2]
        assert [plan.token_rank(rank) - 3 * group for rank in members] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("name", ["fsdp", "tensor_parallel", "context_parallel"])
def test_an_offloaded_optimizer_is_refused_where_state_is_divided(name: str) -> None:
    config = RunConfig(training={"offload_optimizer": True, name: 2})
    with pytest.raises(UsageError, match=f"is for whole replicas; training.{name}"):
        check_whole(config, {}, {"training"}, 2)


@pytest.mark.parametrize("name", ["tensor_parallel", "pipeline_parallel"])
def test_fp16_is_refused_where_ranks_hold_unlike_parts_of_a_layer_or_of_the_layers(name: str) -> None:
    check_whole(RunConfig(training={"precision": "fp16", "fsdp": 2}), {}, {"training"}, 2)
    with pytest.raises(UsageError, match=f"precision fp16 does not go with {name} 2.*bf16"):
        check_whole(RunConfig(training={"precision": "fp16", name: 2}), {}, {"training"}, 2)


@pytest.mark.parametrize("unknown", ["init_from", "resume_from"])
@pytest.mark.parametrize(
    "said", [{"tensor_parallel": 8}, {"pipeline_parallel": 16, "batch_size": 1}, {"context_parallel": 3}]
)
def test_a_shape_that_comes_with_the_weights_is_not_judged_before_they_are_there(
    unknown: str, said: dict[str, int]
) -> None:
    ranks = next(iter(said.values()))
    check_whole(RunConfig(training={**said, unknown: "somewhere"}), {}, {"training"}, ranks)
    with pytest.raises(UsageError):
        check_whole(RunConfig(training=said), {}, {"training"}, ranks)


def test_stages_are_as_equal_as_can_be() -> None:
    from llm_trainer.distributed.pipeline import stage_bounds

    assert stage_bounds(4, 2) == [(0, 2), (2, 4)]
    assert stage_bounds(5, 2) == [(0, 3), (3, 5)]
    assert [last - first for first, last in stage_bounds(7, 4)] == [2, 2, 2, 1]
