"""What preflight says of a pipeline, against the whole model, torch's own order of work, and itself."""

from __future__ import annotations

import pytest
from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B

from llm_trainer.cli.main import main
from llm_trainer.config import ModelConfig, TrainingConfig, UsageError
from llm_trainer.config.param_count import parameter_count, part_sizes
from llm_trainer.diagnostics.memory_plan import Plan, rank_memories, recommend, traffic
from llm_trainer.training.memory.memory_estimator import step_memory
from llm_trainer.training.memory.pipeline_memory import PlaceMemory, place_memories, schedule_order

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 128,
}


def shape_of(**changes: object) -> ModelConfig:
    return ModelConfig.model_validate({**SMALL, **changes})


def settings(schedule: str = "1f1b", **more: object) -> TrainingConfig:
    return TrainingConfig.model_validate({"precision": "fp32", "pipeline_schedule": schedule, **more})


def places(schedule: str, micro_batches: int, ranks: int = 2, **changes: object) -> list[PlaceMemory]:
    return place_memories(
        shape_of(**changes), settings(schedule), ranks=ranks, sequences=2, micro_batches=micro_batches
    )


def highest(place: PlaceMemory) -> int:
    return max(gradients + others for gradients, others in place.moments)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved"])
def test_the_stages_hold_the_model_and_a_tied_embedding_twice(schedule: str) -> None:
    held = [place.weights for place in places(schedule, 2, tie_word_embeddings=False)]
    assert sum(held) == 4 * parameter_count(shape_of(tie_word_embeddings=False))
    tied = shape_of(tie_word_embeddings=True)
    twice = sum(place.weights for place in places(schedule, 2, tie_word_embeddings=True))
    assert twice == 4 * (parameter_count(tied) + tied.vocab_size * tied.hidden_size)


def test_a_pipeline_of_one_rank_needs_what_the_whole_model_needs() -> None:
    whole = step_memory(shape_of(), settings(), sequences=2, micro_batches=2)
    (alone,) = places("1f1b", 4, ranks=1)
    assert (alone.weights, alone.optimizer, alone.buffers) == (whole.weights, whole.optimizer, 0)
    assert highest(alone) == pytest.approx(whole.peak(), rel=0.02)


def test_gpipe_keeps_all_micro_batches_and_1f1b_at_most_as_many_as_stages_are_left() -> None:
    few, many = ([highest(place) for place in places("gpipe", count)] for count in (4, 8))
    assert many[0] > 1.7 * few[0]
    all_at_once = few[0]
    few, many = ([highest(place) for place in places("1f1b", count)] for count in (4, 8))
    assert few == many
    assert few[0] > 1.1 * few[1]
    assert few[0] < 0.7 * all_at_once


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 4, 8, 12])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_interleaved_stages_are_run_in_torchs_order(micro_batches: int, place: int) -> None:
    ranks, own = 4, 2
    theirs = object.__new__(ScheduleInterleaved1F1B)
    theirs.pp_group_size, theirs.n_local_stages, theirs._n_microbatches = ranks, own, micro_batches
    theirs.number_of_rounds = max(1, micro_batches // ranks)
    theirs.microbatches_per_round = micro_batches // theirs.number_of_rounds
    actions = [action for action in theirs._calculate_single_rank_operations(place) if action is not None]
    wanted = [
        (action.computation_type.name.removeprefix("FULL_").lower(), action.stage_index // ranks)
        for action in actions
    ]
    assert schedule_order("interleaved", ranks, place, micro_batches) == wanted


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_every_micro_batch_goes_through_a_stage_once_in_each_direction(schedule: str) -> None:
    for place in range(3):
        order = [what for what, _ in schedule_order(schedule, 3, place, 5)]
        assert order.count("forward") == order.count("backward") == 5
        assert all(order[:end].count("forward") >= order[:end].count("backward") for end in range(11))


def test_a_deep_stage_is_carried_on_from_shallow_ones_as_if_it_were_run() -> None:
    from llm_trainer.training.memory.pipeline_memory import _like, _run_stage, _stage_memory

    for ends in ((True, False), (False, True)):
        carried = _stage_memory(shape_of(), settings(), (*ends, 9), 2, "fp32")
        run = _run_stage(_like(shape_of(), (*ends, 9)), settings(), 2, "fp32")
        assert (carried.weights, carried.optimizer, carried.waiting) == (
            run.weights,
            run.optimizer,
            run.waiting,
        )
        assert max(map(sum, carried.later)) == pytest.approx(max(map(sum, run.later)), rel=0.02)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_what_is_frozen_is_counted_on_the_stage_that_holds_it(schedule: str) -> None:
    shape, frozen = shape_of(num_hidden_layers=8), ["attn.1", "mlp.6"]
    run = {"ranks": 2, "sequences": 2, "micro_batches": 2}
    plain = place_memories(shape, settings(schedule), **run)
    some = place_memories(shape, settings(schedule, freeze_layers=frozen), **run)
    sizes = part_sizes(shape)
    for one, other, part in zip(plain, some, frozen, strict=True):
        assert other.weights == one.weights
        assert 8 * sizes[part] <= one.optimizer - other.optimizer <= 8 * sizes[part] + 64, (
            "two averages, and counts of steps"
        )


def test_stages_of_which_one_would_train_nothing_are_refused_and_not_advised() -> None:
    frozen = settings(freeze_layers=["w?e", "attn.0-1", "mlp.0-1", "ln_1.0-1", "ln_2.0-1"])
    untied = shape_of(tie_word_embeddings=False, num_attention_heads=1, num_key_value_heads=1, head_dim=64)
    with pytest.raises(UsageError, match="a stage of the pipeline has nothing to train"):
        rank_memories(untied, frozen, Plan(sequences=1, micro_batches=2, pipeline=2))
    needed = rank_memories(
        untied.model_copy(update={"gradient_checkpointing": True}),
        frozen,
        Plan(sequences=1, offload=True),
        "fp32",
    )
    assert (
        recommend(
            untied,
            frozen,
            2,
            int(needed[0].total * 0.95 / 0.9),
            Plan(sequences=1, offload=True),
            precision="fp32",
        )
        is None
    )


def test_shards_of_a_stage_divide_what_is_kept_and_are_gathered_whole() -> None:
    plan = Plan(sequences=2, micro_batches=4, pipeline=2)
    whole, cut = (
        rank_memories(shape_of(), settings(), one, "fp32") for one in (plan, Plan(1, 2, 1, 2, 4, pipeline=2))
    )
    for one, other in zip(whole, cut, strict=True):
        assert other.weights == one.weights // 2
        assert other.gathered == one.weights
        assert other.gradients == one.gradients


def test_stages_send_the_stream_over_their_edges() -> None:
    stream = 4 * 2 * 128 * 64
    assert traffic(shape_of(), Plan(sequences=2, micro_batches=3, pipeline=2)).total == 2 * 3 * stream
    assert (
        traffic(shape_of(), Plan(sequences=2, micro_batches=3, pipeline=2), "interleaved").total
        == 2 * 2 * 3 * stream
    )


def test_stages_are_advised_where_nothing_else_does_and_keep_the_step() -> None:
    odd = shape_of(num_attention_heads=1, num_key_value_heads=1, head_dim=64)  # no tensor ranks
    alone = Plan(sequences=1, offload=True)  # no shards
    recomputed = odd.model_copy(update={"gradient_checkpointing": True})
    needed = rank_memories(recomputed, settings(), alone, "fp32")[0].total
    advice = recommend(odd, settings(), 2, int(needed * 0.95 / 0.9), alone, precision="fp32")
    assert advice is not None
    assert (advice.plan.pipeline, advice.plan.replicate, advice.plan.micro_batches) == (2, 1, 2)


def test_interleaved_rounds_that_are_unequal_are_refused_before_training() -> None:
    with pytest.raises(UsageError, match="take 4 or 6"):
        rank_memories(shape_of(), settings("interleaved"), Plan(sequences=1, micro_batches=5, pipeline=2))


def test_the_command_tells_each_rank_of_the_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    said = [
        "preflight",
        *(f"--{name}={value}" for name, value in SMALL.items()),
        "--precision=fp32",
        "--memory_gb=4",
    ]
    assert (
        main([*said, "--pipeline_parallel=2", "--batch_size=16", "--micro_batch_size=2", "--data_parallel=2"])
        == 0
    )
    told = capsys.readouterr().out
    assert (
        "2 replicas × 1 shards × 1 tensor ranks × 2 ranks of a pipeline, 4 micro-batches of 2 sequences"
        in told
    )
    assert "(1f1b)" in told
