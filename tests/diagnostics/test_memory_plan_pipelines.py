"""The memory estimate of a pipeline agrees with the full model, with torch's schedules, and with itself."""

from __future__ import annotations

import pytest
from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B

from llm_trainer.cli.main import main
from llm_trainer.config import ModelConfig, TrainingConfig, UsageError
from llm_trainer.config.param_count import parameter_count, params_per_module
from llm_trainer.config.resolve.batch_size import BatchPlan
from llm_trainer.config.resolve.parallelism import ParallelPlan
from llm_trainer.diagnostics.memory_plan import communication_volume, rank_memories, recommend_plan
from llm_trainer.training.memory.memory_estimator import step_memory
from llm_trainer.training.memory.pipeline_memory import (
    PipelineRankMemory,
    pipeline_rank_memories,
    schedule_order,
)

TWO_STAGES = ParallelPlan(pipeline_parallel=2)
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 128,
}


def config_of(**changes: object) -> ModelConfig:
    return ModelConfig.model_validate({**SMALL, **changes})


def settings(schedule: str = "1f1b", **more: object) -> TrainingConfig:
    return TrainingConfig.model_validate({"precision": "fp32", "pipeline_schedule": schedule, **more})


def rank_steps(
    schedule: str, micro_batches: int, ranks: int = 2, **changes: object
) -> list[PipelineRankMemory]:
    return pipeline_rank_memories(
        config_of(**changes), settings(schedule), ranks=ranks, sequences=2, micro_batches=micro_batches
    )


def highest(step: PipelineRankMemory) -> int:
    return max(gradients + others for gradients, others in step.moments)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved"])
def test_the_stages_have_the_whole_model_and_a_tied_embedding_twice(schedule: str) -> None:
    weights = [step.weights for step in rank_steps(schedule, 2, tie_word_embeddings=False)]
    assert sum(weights) == 4 * parameter_count(config_of(tie_word_embeddings=False))
    tied = config_of(tie_word_embeddings=True)
    twice = sum(step.weights for step in rank_steps(schedule, 2, tie_word_embeddings=True))
    assert twice == 4 * (parameter_count(tied) + tied.vocab_size * tied.hidden_size)


def test_a_pipeline_of_one_rank_needs_as_much_as_the_full_model() -> None:
    full = step_memory(config_of(), settings(), sequences=2, micro_batches=2)
    (alone,) = rank_steps("1f1b", 4, ranks=1)
    assert (alone.weights, alone.optimizer, alone.buffers) == (full.weights, full.optimizer, 0)
    assert highest(alone) == pytest.approx(full.peak(), rel=0.02)


@pytest.mark.slow
def test_gpipe_keeps_all_micro_batches_and_1f1b_as_many_as_stages_follow() -> None:
    few, many = ([highest(step) for step in rank_steps("gpipe", count)] for count in (4, 8))
    assert many[0] > 1.7 * few[0]
    all_at_once = few[0]
    few, many = ([highest(step) for step in rank_steps("1f1b", count)] for count in (4, 8))
    assert few == many
    assert few[0] > 1.1 * few[1]
    assert few[0] < 0.7 * all_at_once


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 4, 8, 12])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_the_order_of_interleaved_stages_is_that_of_torch(micro_batches: int, rank: int) -> None:
    ranks, own = 4, 2
    theirs = object.__new__(ScheduleInterleaved1F1B)
    theirs.pp_group_size, theirs.n_local_stages, theirs._n_microbatches = ranks, own, micro_batches
    theirs.number_of_rounds = max(1, micro_batches // ranks)
    theirs.microbatches_per_round = micro_batches // theirs.number_of_rounds
    actions = [action for action in theirs._calculate_single_rank_operations(rank) if action is not None]
    wanted = [
        (action.computation_type.name.removeprefix("FULL_").lower(), action.stage_index // ranks)
        for action in actions
    ]
    assert schedule_order("interleaved", ranks, rank, micro_batches) == wanted


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_every_micro_batch_passes_a_stage_once_forward_and_once_backward(schedule: str) -> None:
    for rank in range(3):
        order = [what for what, _ in schedule_order(schedule, 3, rank, 5)]
        assert order.count("forward") == order.count("backward") == 5
        assert all(order[:end].count("forward") >= order[:end].count("backward") for end in range(11))


@pytest.mark.slow
def test_a_deep_stage_is_extrapolated_from_shallow_ones_as_if_it_were_run() -> None:
    from llm_trainer.training.memory.pipeline_memory import _like, _run_stage, _stage_memory

    for ends in ((True, False), (False, True)):
        carried = _stage_memory(config_of(), settings(), (*ends, 9), 2, "fp32")
        run = _run_stage(_like(config_of(), (*ends, 9)), settings(), 2, "fp32")
        assert (carried.weights, carried.optimizer, carried.waiting) == (
            run.weights,
            run.optimizer,
            run.waiting,
        )
        assert max(map(sum, carried.later)) == pytest.approx(max(map(sum, run.later)), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_frozen_parameters_are_counted_on_their_stage(schedule: str) -> None:
    config, frozen = config_of(num_hidden_layers=8), ["attn.1", "mlp.6"]
    run = {"ranks": 2, "sequences": 2, "micro_batches": 2}
    plain = pipeline_rank_memories(config, settings(schedule), **run)
    some = pipeline_rank_memories(config, settings(schedule, freeze_layers=frozen), **run)
    sizes = params_per_module(config)
    for one, other, part in zip(plain, some, frozen, strict=True):
        assert other.weights == one.weights
        assert 8 * sizes[part] <= one.optimizer - other.optimizer <= 8 * sizes[part] + 64, (
            "two moments, and step counters"
        )


def test_a_stage_without_trainable_parameters_is_refused_and_not_recommended() -> None:
    frozen = settings(freeze_layers=["w?e", "attn.0-1", "mlp.0-1", "ln_1.0-1", "ln_2.0-1"])
    untied = config_of(tie_word_embeddings=False, num_attention_heads=1, num_key_value_heads=1, head_dim=64)
    with pytest.raises(UsageError, match="a pipeline stage has no trainable parameters"):
        rank_memories(untied, frozen, TWO_STAGES, BatchPlan(1, 2))
    frozen = frozen.model_copy(update={"offload_optimizer": True})  # no shards
    recomputed = untied.model_copy(update={"gradient_checkpointing": True})
    needed = rank_memories(recomputed, frozen, ParallelPlan(), BatchPlan(1, 1), "fp32")[0].total
    limit = int(needed * 0.95 / 0.9)
    assert recommend_plan(untied, frozen, 2, limit, BatchPlan(1, 1), precision="fp32") is None


@pytest.mark.slow
def test_the_shards_of_a_stage_are_all_gathered_during_the_step() -> None:
    unsharded, sharded = (
        rank_memories(config_of(), settings(), plan, BatchPlan(2, 4), "fp32")
        for plan in (TWO_STAGES, ParallelPlan(fsdp=2, pipeline_parallel=2))
    )
    for one, other in zip(unsharded, sharded, strict=True):
        assert other.weights == one.weights // 2
        assert other.gathered == one.weights
        assert other.gradients == one.gradients


def test_stages_send_the_residual_stream_across_their_boundaries() -> None:
    stream = 4 * 2 * 128 * 64
    batches = BatchPlan(2, 3)
    assert communication_volume(config_of(), TWO_STAGES, batches).total == 2 * 3 * stream
    interleaved = communication_volume(config_of(), TWO_STAGES, batches, "interleaved")
    assert interleaved.total == 2 * 2 * 3 * stream


@pytest.mark.slow
def test_stages_are_recommended_where_nothing_else_fits_and_keep_the_step() -> None:
    odd = config_of(num_attention_heads=1, num_key_value_heads=1, head_dim=64)  # no tensor ranks
    training, batches = settings(offload_optimizer=True), BatchPlan(1, 1)  # no shards
    recomputed = odd.model_copy(update={"gradient_checkpointing": True})
    needed = rank_memories(recomputed, training, ParallelPlan(), batches, "fp32")[0].total
    found = recommend_plan(odd, training, 2, int(needed * 0.95 / 0.9), batches, precision="fp32")
    assert found is not None
    assert (found.plan.pipeline_parallel, found.plan.data_parallel) == (2, 1)
    assert found.batches.gradient_accumulation_steps == 2


def test_unequal_rounds_of_an_interleaved_schedule_are_refused() -> None:
    with pytest.raises(UsageError, match="use 4 or 6"):
        rank_memories(config_of(), settings("interleaved"), TWO_STAGES, BatchPlan(1, 5))


def test_preflight_prints_the_peak_of_each_pipeline_rank(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "preflight",
        *(f"--{name}={value}" for name, value in SMALL.items()),
        "--precision=fp32",
        "--memory_gb=4",
    ]
    assert (
        main(
            [*flags, "--pipeline_parallel=2", "--batch_size=16", "--micro_batch_size=2", "--data_parallel=2"]
        )
        == 0
    )
    output = capsys.readouterr().out
    assert "2 replicas × 2 pipeline ranks, 4 micro-batches of 2 sequences" in output
    assert "(1f1b)" in output
