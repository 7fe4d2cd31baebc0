"""Will it fit: the estimate counts what it must, divides as the plan says, and is told by the commands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from llm_trainer.cli.main import main
from llm_trainer.cli.setup.build_model import pretrained_model
from llm_trainer.config import ModelConfig, RunConfig, TrainingConfig, UsageError
from llm_trainer.config.param_count import parameter_count
from llm_trainer.diagnostics.measure_memory import measured_step
from llm_trainer.diagnostics.memory_plan import (
    RESERVE,
    Plan,
    checkpoint_bytes,
    rank_memory,
    rank_shape,
    recommend,
    traffic,
)
from llm_trainer.distributed.tensor_parallel import cut_matrices
from llm_trainer.model.adapters.nf4 import is_quantized
from llm_trainer.model.hf.checkpoint import save_pretrained
from llm_trainer.model.kv_cache import KVCache
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.memory.memory_estimator import step_memory
from llm_trainer.training.optim.optimizers import build_optimizers
from llm_trainer.training.optim.param_groups import prepare_trainable

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 128,
}


def _shape(**changes: object) -> ModelConfig:
    return ModelConfig.model_validate({**SMALL, **changes})


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_and_optimizer_are_counted_as_the_real_ones_are(optimizer: str) -> None:
    shape, training = _shape(), TrainingConfig.model_validate({"optimizer": optimizer, "precision": "fp32"})
    estimate = step_memory(shape, training, sequences=2)
    model = Transformer(shape)
    optimizers = build_optimizers(model, training)
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    for one in optimizers:
        one.step()
    held = sum(
        tensor.nbytes for one in optimizers for values in one.state.values() for tensor in values.values()
    )
    assert estimate.weights == 4 * parameter_count(shape)
    assert estimate.optimizer == held


def test_a_deep_stack_is_carried_on_from_shallow_ones_as_if_it_were_run() -> None:
    training = TrainingConfig(precision="fp32")
    shallow = step_memory(_shape(num_hidden_layers=12), training, sequences=2)  # carried on
    from llm_trainer.training.memory.memory_estimator import _run_twice

    whole = _run_twice(_shape(num_hidden_layers=12), training, 2, 1, "fp32")
    assert (shallow.weights, shallow.optimizer) == (whole.weights, whole.optimizer)
    assert shallow.peak() == pytest.approx(whole.peak(), rel=0.02)


def test_recomputation_needs_less_and_keeping_products_lies_between() -> None:
    training = TrainingConfig(precision="fp32")

    def activations(**changes: object) -> int:
        return step_memory(_shape(**changes), training, sequences=8).activations

    plain, full = activations(), activations(gradient_checkpointing=True)
    every_second = activations(gradient_checkpointing=True, checkpoint_every=2)
    products = activations(gradient_checkpointing=True, checkpoint_keep=["products"])
    assert full < every_second < plain
    assert full < products < plain


def test_a_plan_divides_what_it_says_it_divides() -> None:
    training = TrainingConfig(precision="fp32")
    alone, sharded = (
        rank_memory(_shape(), training, Plan(sequences=2)),
        rank_memory(_shape(), training, Plan(shard=4, sequences=2)),
    )
    assert sharded.weights == alone.weights // 4
    assert sharded.optimizer == alone.optimizer // 4
    assert sharded.checkpoint == alone.checkpoint
    split = rank_shape(_shape(num_key_value_heads=2), 2)
    assert (split.num_attention_heads, split.kv_heads, split.mlp_width, split.head_width) == (2, 1, 128, 16)
    with pytest.raises(UsageError, match="tensor_parallel 3 does not divide num_attention_heads 4"):
        rank_shape(_shape(), 3)


@pytest.fixture
def pretended_ranks() -> Iterator[DeviceMesh]:
    """Two ranks of which only this one runs: nothing is sent, so nothing may depend on what the other one
    has.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "changes", [{"model_type": "llama", "tie_word_embeddings": False}, {"model_type": "gpt2"}]
)
def test_a_tensor_rank_is_counted_as_training_cuts_it(
    changes: dict[str, object], pretended_ranks: DeviceMesh
) -> None:
    model = Transformer(_shape(**changes))
    cut_matrices(model, pretended_ranks)
    held = sum((one.to_local() if isinstance(one, DTensor) else one).nbytes for one in model.parameters())
    estimate = rank_memory(_shape(**changes), TrainingConfig(precision="fp32"), Plan(tensor=2, sequences=1))
    assert estimate.weights == held


def test_cache_and_checkpoint_are_as_large_as_the_real_ones() -> None:
    memory = rank_memory(_shape(), TrainingConfig(precision="fp32"), Plan(sequences=1), "fp32")
    assert memory.cache_a_sequence == KVCache(_shape(), 1, 128).num_bytes
    assert checkpoint_bytes(_shape(), TrainingConfig()) == 12 * parameter_count(_shape())


def test_replicas_send_gradients_twice_around_and_one_rank_sends_nothing() -> None:
    assert traffic(_shape(), Plan()).total == 0
    held = 4 * parameter_count(_shape())
    assert traffic(_shape(), Plan(replicate=2)).total == held
    assert traffic(_shape(), Plan(shard=2)).total == held // 2 + held


def test_ranks_that_share_sequences_divide_the_state_and_the_activations_and_send_keys_and_values() -> None:
    training = TrainingConfig(precision="fp32")
    alone, shared = (
        rank_memory(_shape(), training, Plan(sequences=4)),
        rank_memory(_shape(), training, Plan(sequences=4, context=2)),
    )
    assert shared.weights == alone.weights // 2
    assert shared.optimizer == alone.optimizer // 2
    assert alone.activations / 2 < shared.activations < alone.activations
    own = (
        2 * 2 * 4 * 128 // 2 * _shape().kv_heads * _shape().head_width
    )  # keys and values of its half, in bf16
    assert traffic(_shape(), Plan(sequences=4, context=2)).context == 2 * _shape().num_hidden_layers * own
    with pytest.raises(UsageError, match="6 does not divide the context of 128 tokens"):
        rank_memory(_shape(), training, Plan(context=3))
    advice = recommend(_shape(), training, 4, int(alone.total * 0.9), Plan(sequences=4, context=2))
    assert advice is not None
    assert (advice.plan.context, advice.plan.ranks) == (2, 4)


@pytest.mark.parametrize(("sequences", "share"), [(8, 0.8), (9, 0.42)])
def test_advice_fits_keeps_the_step_and_is_none_where_nothing_can(sequences: int, share: float) -> None:
    training = TrainingConfig(precision="fp32")
    start = Plan(sequences=sequences)
    needed = rank_memory(_shape(), training, start).total
    advice = recommend(_shape(), training, 1, int(needed * share), start)
    assert advice is not None
    assert advice.memory.total <= needed * share
    assert advice.plan.sequences * advice.plan.micro_batches == sequences
    assert recommend(_shape(), training, 1, 1000, start) is None


def test_a_base_in_four_bits_that_is_trained_is_refused_as_training_refuses_it() -> None:
    training = TrainingConfig.model_validate({"precision": "fp32", "quantize_base": "nf4"})
    with pytest.raises(UsageError, match="quantize_base needs weights that are not trained"):
        rank_memory(_shape(attn_lora_rank=2), training, Plan(sequences=1))


def test_a_base_in_four_bits_is_advised_what_fits_though_its_floats_would_not() -> None:
    shape = _shape(
        hidden_size=512, vocab_size=64, max_position_embeddings=16, attn_lora_rank=2, lora_train_base=False
    )
    training = TrainingConfig.model_validate({"precision": "fp32", "quantize_base": "nf4"})
    most, least = (rank_memory(shape, training, Plan(sequences=size)).total for size in (16, 1))
    limit = int(least * 1.2 / (1 - RESERVE))
    assert limit < most
    assert limit < 4 * parameter_count(shape)
    advice = recommend(shape, training, 1, limit, Plan(sequences=16))
    assert advice is not None
    assert advice.memory.total <= limit
    assert advice.plan.sequences * advice.plan.micro_batches == 16


def test_the_command_says_whether_it_fits_and_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    said = [f"--{name}={value}" for name, value in SMALL.items()]
    assert main(["preflight", *said, "--precision=fp32", "--memory_gb=4"]) == 0
    assert "It fits" in capsys.readouterr().out
    assert main(["preflight", *said, "--precision=fp32", "--memory_gb=0.02"]) == 1
    assert "It does not fit" in capsys.readouterr().out


def test_the_plan_is_the_settings_own_though_one_process_runs(capsys: pytest.CaptureFixture[str]) -> None:
    said = [f"--{name}={value}" for name, value in SMALL.items()]
    assert (
        main(
            [
                "preflight",
                *said,
                "--precision=fp32",
                "--memory_gb=4",
                "--context_parallel=2",
                "--batch_size=2",
            ]
        )
        == 0
    )
    assert (
        "1 replicas × 1 shards × 1 tensor ranks × 2 ranks that share each sequence" in capsys.readouterr().out
    )
    assert (
        main(
            [
                "preflight",
                *said,
                "--precision=fp32",
                "--memory_gb=4",
                "--fsdp=4",
                "--data_parallel=2",
                "--batch_size=2",
            ]
        )
        == 0
    )
    told = capsys.readouterr().out
    assert "2 replicas × 4 shards × 1 tensor ranks" in told
    assert "each rank sends" in told


def test_adapters_over_a_model_that_is_there_are_counted_in_its_shape_and_without_its_gradients(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pretrained(Transformer(_shape(num_hidden_layers=3)), tmp_path)
    said = {"attn_lora_rank": 4, "dropout": 0.1, "max_position_embeddings": 64, "use_adapter_modules": True}
    flags = [f"--{name}={value}" for name, value in said.items()]
    assert (
        main(
            [
                "preflight",
                f"--init_from={tmp_path}",
                *flags,
                "--precision=fp32",
                "--batch_size=2",
                "--memory_gb=4",
            ]
        )
        == 0
    )
    told = capsys.readouterr().out
    trained = pretrained_model(str(tmp_path), ModelConfig.model_validate(said))
    prepare_trainable(trained, TrainingConfig())
    assert f"{sum(one.numel() for one in trained.parameters()):,} parameters" in told
    averages = 8 * sum(one.numel() for one in trained.parameters() if one.requires_grad)
    counted = float(re.search(r"optimizer +([\d.]+) MB", told)[1])  # type: ignore[index]
    assert counted == pytest.approx(averages / 1e6, abs=0.06)
    assert main(["preflight", f"--init_from={tmp_path}", "--vocab_size=32"]) == 2
    assert "vocab_size=32 was said, but" in capsys.readouterr().err


def test_settings_of_recomputation_stand_where_the_manuals_put_them() -> None:
    config = RunConfig.model_validate({"training": {"gradient_checkpointing": True, "checkpoint_every": 2}})
    assert (config.model.gradient_checkpointing, config.model.checkpoint_every) == (True, 2)


def test_an_optimizer_in_host_memory_is_not_counted_on_the_device() -> None:
    training = TrainingConfig(precision="fp32")
    here, offloaded = (rank_memory(_shape(), training, Plan(offload=offload)) for offload in (False, True))
    assert offloaded.on_host == here.optimizer > 0
    assert offloaded.total == here.total - here.optimizer


def test_preflight_tells_the_micro_batch_that_auto_would_take(capsys: pytest.CaptureFixture[str]) -> None:
    said = [
        "preflight",
        *(f"--{name}={value}" for name, value in SMALL.items()),
        "--micro_batch_size=auto",
        "--batch_size=16",
    ]
    micro = {}
    for gigabytes in (0.02, 0.05, 1.0):
        main([*said, f"--memory_gb={gigabytes}"])
        words = capsys.readouterr().out
        micro[gigabytes] = int(words.split(" sequences")[0].rsplit(" ", 1)[1])
    assert 1 <= micro[0.02] < micro[0.05] <= micro[1.0] == 16


@pytest.mark.parametrize(
    ("shape", "training"),
    [
        ({"attn_lora_rank": 4, "mlp_lora_rank": 4, "lora_train_base": False}, {}),
        (
            {"num_hidden_layers": 8, "attn_lora_rank": 4, "lora_train_base": False},
            {},
        ),  # carried on from shallow stacks
        ({"num_hidden_layers": 8}, {"freeze_layers": ["wte", "attn.0-5", "mlp.3"]}),
    ],
)
def test_what_is_frozen_has_neither_gradients_nor_averages(
    shape: dict[str, object], training: dict[str, object]
) -> None:
    settings = TrainingConfig.model_validate({"precision": "fp32", **training})
    estimate = step_memory(_shape(**shape), settings, sequences=1)
    model = Transformer(_shape(**shape))
    prepare_trainable(model, settings)
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    assert estimate.weights == whole
    assert 2 * trained <= estimate.optimizer < 2 * trained + 1024, "two averages, and counts of steps"
    assert max(gradients for gradients, _ in estimate.moments) <= trained
    assert checkpoint_bytes(_shape(**shape), settings) == whole + 2 * trained


def test_a_measured_step_trains_what_training_would() -> None:
    shape = _shape(attn_lora_rank=4, lora_train_base=False)
    model = Transformer(shape)
    before = model.blocks[0].attn.q_proj.weight.detach().clone()
    training = TrainingConfig.model_validate({"precision": "fp32", "device": "cpu"})
    measured_step(shape, training, 1, model=model)
    assert model.blocks[0].attn.q_proj.weight.equal(before)


def test_rates_by_part_are_no_matter_of_the_estimate() -> None:
    rates = TrainingConfig.model_validate(
        {"precision": "fp32", "learning_rate_factors": {"attn.11": 0.1}, "layer_rate_decay": 0.9}
    )
    shape = _shape(num_hidden_layers=12)
    assert step_memory(shape, rates, sequences=1) == step_memory(
        shape, TrainingConfig(precision="fp32"), sequences=1
    )


def test_a_base_in_four_bits_is_counted_as_it_is_held() -> None:
    pytest.importorskip("torchao")
    shape = _shape(hidden_size=128, attn_lora_rank=4, mlp_lora_rank=4, lora_train_base=False)
    training = TrainingConfig.model_validate({"precision": "fp32", "quantize_base": "nf4"})
    model = Transformer(shape)
    prepare_trainable(model, training)
    held = 0
    for parameter in model.parameters():
        inner = parameter.__tensor_flatten__()[0] if is_quantized(parameter) else []
        held += sum(getattr(parameter, name).nbytes for name in inner) or parameter.nbytes
    assert step_memory(shape, training, sequences=1).weights == pytest.approx(held, rel=0.03)
    memory = rank_memory(shape, training, Plan(sequences=1))
    assert memory.copies == 4 * parameter_count(shape) + memory.optimizer, "a save writes floats"
