"""The memory estimate counts what training allocates, divides it as the plan requires, and is printed."""

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
from llm_trainer.cli.setup.build_model import load_pretrained_model
from llm_trainer.config import ModelConfig, RunConfig, TrainingConfig, UsageError
from llm_trainer.config.param_count import parameter_count
from llm_trainer.config.resolve.batch_size import BatchPlan
from llm_trainer.config.resolve.parallelism import ParallelPlan
from llm_trainer.diagnostics.measure_memory import measure_step_memory
from llm_trainer.diagnostics.memory_plan import (
    MEMORY_RESERVE_FRACTION,
    checkpoint_bytes,
    communication_volume,
    rank_memory,
    recommend_plan,
    tensor_parallel_config,
)
from llm_trainer.distributed.tensor_parallel import apply_tensor_parallel
from llm_trainer.model.adapters.nf4 import is_quantized
from llm_trainer.model.hf.checkpoint import save_pretrained
from llm_trainer.model.kv_cache import KVCache
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.memory.memory_estimator import step_memory
from llm_trainer.training.optim.optimizers import build_optimizers
from llm_trainer.training.optim.param_groups import prepare_trainable

STEP = BatchPlan(8, 1)
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 128,
}


def _config(**changes: object) -> ModelConfig:
    return ModelConfig.model_validate({**SMALL, **changes})


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_and_optimizer_state_are_counted_exactly(optimizer: str) -> None:
    config, training = _config(), TrainingConfig.model_validate({"optimizer": optimizer, "precision": "fp32"})
    estimate = step_memory(config, training, sequences=2)
    model = Transformer(config)
    optimizers = build_optimizers(model, training)
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    for one in optimizers:
        one.step()
    allocated = sum(
        tensor.nbytes for one in optimizers for values in one.state.values() for tensor in values.values()
    )
    assert estimate.weights == 4 * parameter_count(config)
    assert estimate.optimizer == allocated


@pytest.mark.slow
def test_a_deep_model_is_extrapolated_from_shallow_ones_as_if_it_were_run() -> None:
    training = TrainingConfig(precision="fp32")
    shallow = step_memory(_config(num_hidden_layers=12), training, sequences=2)  # extrapolated
    from llm_trainer.training.memory.memory_estimator import _run_two_steps

    full = _run_two_steps(_config(num_hidden_layers=12), training, 2, 1, "fp32")
    assert (shallow.weights, shallow.optimizer) == (full.weights, full.optimizer)
    assert shallow.peak() == pytest.approx(full.peak(), rel=0.02)


@pytest.mark.slow
def test_activation_checkpointing_needs_less_memory_and_selective_checkpointing_is_in_between() -> None:
    training = TrainingConfig(precision="fp32")

    def activations(**changes: object) -> int:
        return step_memory(_config(**changes), training, sequences=8).activations

    plain, full = activations(), activations(gradient_checkpointing=True)
    every_second = activations(gradient_checkpointing=True, activation_checkpoint_every=2)
    products = activations(gradient_checkpointing=True, activation_checkpoint_policy=["matmul"])
    assert full < every_second < plain
    assert full < products < plain


def test_a_plan_shards_weights_and_optimizer_state() -> None:
    training = TrainingConfig(precision="fp32")
    alone, sharded = (
        rank_memory(_config(), training, ParallelPlan(), BatchPlan(2, 1)),
        rank_memory(_config(), training, ParallelPlan(fsdp=4), BatchPlan(2, 1)),
    )
    assert sharded.weights == alone.weights // 4
    assert sharded.optimizer == alone.optimizer // 4
    assert sharded.checkpoint == alone.checkpoint
    split = tensor_parallel_config(_config(num_key_value_heads=2), 2)
    assert (split.num_attention_heads, split.kv_heads, split.mlp_width, split.head_width) == (2, 1, 128, 16)
    with pytest.raises(UsageError, match="tensor_parallel 3 does not divide num_attention_heads 4"):
        tensor_parallel_config(_config(), 3)


@pytest.fixture
def fake_ranks() -> Iterator[DeviceMesh]:
    """Two ranks, of which only this one runs: nothing is sent, so results must not depend on the other."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "changes", [{"model_type": "llama", "tie_word_embeddings": False}, {"model_type": "gpt2"}]
)
def test_a_tensor_parallel_rank_is_counted_as_training_shards_it(
    changes: dict[str, object], fake_ranks: DeviceMesh
) -> None:
    model = Transformer(_config(**changes))
    apply_tensor_parallel(model, fake_ranks)
    allocated = sum(
        (one.to_local() if isinstance(one, DTensor) else one).nbytes for one in model.parameters()
    )
    estimate = rank_memory(
        _config(**changes), TrainingConfig(precision="fp32"), ParallelPlan(tensor_parallel=2), BatchPlan(1, 1)
    )
    assert estimate.weights == allocated


def test_the_sizes_of_kv_cache_and_checkpoint_are_exact() -> None:
    memory = rank_memory(_config(), TrainingConfig(precision="fp32"), ParallelPlan(), BatchPlan(1, 1), "fp32")
    assert memory.kv_cache_per_sequence == KVCache(_config(), 1, 128).num_bytes
    assert checkpoint_bytes(_config(), TrainingConfig()) == 12 * parameter_count(_config())


def test_replicas_all_reduce_gradients_and_one_rank_sends_nothing() -> None:
    assert communication_volume(_config(), ParallelPlan(), STEP).total == 0
    allocated = 4 * parameter_count(_config())
    assert communication_volume(_config(), ParallelPlan(data_parallel=2), STEP).total == allocated
    assert communication_volume(_config(), ParallelPlan(fsdp=2), STEP).total == allocated // 2 + allocated


@pytest.mark.slow
def test_context_parallel_ranks_shard_state_and_activations_and_send_keys_and_values() -> None:
    training, batches = TrainingConfig(precision="fp32"), BatchPlan(4, 1)
    alone, shared = (
        rank_memory(_config(), training, ParallelPlan(), batches),
        rank_memory(_config(), training, ParallelPlan(context_parallel=2), batches),
    )
    assert shared.weights == alone.weights // 2
    assert shared.optimizer == alone.optimizer // 2
    assert alone.activations / 2 < shared.activations < alone.activations
    own = (
        2 * 2 * 4 * 128 // 2 * _config().kv_heads * _config().head_width
    )  # keys and values of its half, in bf16
    sent = communication_volume(_config(), ParallelPlan(context_parallel=2), batches)
    assert sent.context == 2 * _config().num_hidden_layers * own
    with pytest.raises(UsageError, match="max_position_embeddings 128 is not a multiple of 6"):
        rank_memory(_config(), training, ParallelPlan(context_parallel=3), STEP)
    found = recommend_plan(_config(), training, 4, int(alone.total * 0.9), batches, context_parallel=2)
    assert found is not None
    assert (found.plan.context_parallel, found.plan.ranks) == (2, 4)


@pytest.mark.parametrize(("sequences", "fraction"), [(8, 0.8), (9, 0.42)])
def test_a_recommended_plan_fits_and_keeps_the_step_and_is_none_if_nothing_fits(
    sequences: int, fraction: float
) -> None:
    training = TrainingConfig(precision="fp32")
    batches = BatchPlan(sequences, 1)
    needed = rank_memory(_config(), training, ParallelPlan(), batches).total
    found = recommend_plan(_config(), training, 1, int(needed * fraction), batches)
    assert found is not None
    assert found.memory.total <= needed * fraction
    assert found.batches.sequences_per_step(1) == sequences
    assert recommend_plan(_config(), training, 1, 1000, batches) is None


def test_a_quantized_base_that_is_trained_is_refused_as_in_training() -> None:
    training = TrainingConfig.model_validate({"precision": "fp32", "quantize_base": "nf4"})
    with pytest.raises(UsageError, match="quantize_base needs frozen weights"):
        rank_memory(_config(attn_lora_rank=2), training, ParallelPlan(), BatchPlan(1, 1))


@pytest.mark.slow
def test_a_quantized_base_gets_a_plan_that_fits_though_its_floats_would_not() -> None:
    config = _config(
        hidden_size=512, vocab_size=64, max_position_embeddings=16, attn_lora_rank=2, lora_train_base=False
    )
    training = TrainingConfig.model_validate({"precision": "fp32", "quantize_base": "nf4"})
    most, least = (
        rank_memory(config, training, ParallelPlan(), BatchPlan(size, 1)).total for size in (16, 1)
    )
    limit = int(least * 1.2 / (1 - MEMORY_RESERVE_FRACTION))
    assert limit < most
    assert limit < 4 * parameter_count(config)
    found = recommend_plan(config, training, 1, limit, BatchPlan(16, 1))
    assert found is not None
    assert found.memory.total <= limit
    assert found.batches.sequences_per_step(1) == 16


def test_preflight_prints_whether_a_step_fits(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [f"--{name}={value}" for name, value in SMALL.items()]
    assert main(["preflight", *flags, "--precision=fp32", "--memory_gb=4"]) == 0
    assert "It fits" in capsys.readouterr().out
    assert main(["preflight", *flags, "--precision=fp32", "--memory_gb=0.02"]) == 1
    assert "It does not fit" in capsys.readouterr().out


def test_preflight_uses_the_plan_of_the_settings_in_a_single_process(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = [f"--{name}={value}" for name, value in SMALL.items()]
    assert (
        main(
            [
                "preflight",
                *flags,
                "--precision=fp32",
                "--memory_gb=4",
                "--context_parallel=2",
                "--batch_size=2",
            ]
        )
        == 0
    )
    assert " 2 context ranks, " in capsys.readouterr().out
    assert (
        main(
            [
                "preflight",
                *flags,
                "--precision=fp32",
                "--memory_gb=4",
                "--fsdp=4",
                "--data_parallel=2",
                "--batch_size=2",
            ]
        )
        == 0
    )
    output = capsys.readouterr().out
    assert "2 replicas × 4 shards, " in output
    assert "Each rank sends" in output


def test_adapters_of_an_existing_model_are_counted_with_its_sizes_and_without_its_gradients(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pretrained(Transformer(_config(num_hidden_layers=3)), tmp_path)
    settings = {
        "attn_lora_rank": 4,
        "dropout": 0.1,
        "max_position_embeddings": 64,
        "use_adapter_modules": True,
    }
    flags = [f"--{name}={value}" for name, value in settings.items()]
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
    output = capsys.readouterr().out
    trained = load_pretrained_model(str(tmp_path), ModelConfig.model_validate(settings))
    prepare_trainable(trained, TrainingConfig())
    assert f"{sum(one.numel() for one in trained.parameters()):,} parameters" in output
    averages = 8 * sum(one.numel() for one in trained.parameters() if one.requires_grad)
    counted = float(re.search(r"optimizer +([\d.]+) MB", output)[1])  # type: ignore[index]
    assert counted == pytest.approx(averages / 1e6, abs=0.06)
    assert main(["preflight", f"--init_from={tmp_path}", "--vocab_size=32"]) == 2
    assert "vocab_size is set to 32, but" in capsys.readouterr().err


def test_activation_checkpointing_settings_are_accepted_in_the_section_of_the_manuals() -> None:
    config = RunConfig.model_validate(
        {"training": {"gradient_checkpointing": True, "activation_checkpoint_every": 2}}
    )
    assert (config.model.gradient_checkpointing, config.model.activation_checkpoint_every) == (True, 2)


def test_an_offloaded_optimizer_is_not_counted_on_the_device() -> None:
    on_device, offloaded = (
        rank_memory(
            _config(), TrainingConfig(precision="fp32", offload_optimizer=offload), ParallelPlan(), STEP
        )
        for offload in (False, True)
    )
    assert offloaded.on_host == on_device.optimizer > 0
    assert offloaded.total == on_device.total - on_device.optimizer


@pytest.mark.slow
def test_preflight_prints_the_micro_batch_size_that_auto_would_choose(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = [
        "preflight",
        *(f"--{name}={value}" for name, value in SMALL.items()),
        "--micro_batch_size=auto",
        "--batch_size=16",
    ]
    micro = {}
    for gigabytes in (0.02, 0.05, 1.0):
        main([*flags, f"--memory_gb={gigabytes}"])
        words = capsys.readouterr().out
        micro[gigabytes] = int(words.split(" sequences")[0].rsplit(" ", 1)[1])
    assert 1 <= micro[0.02] < micro[0.05] <= micro[1.0] == 16


@pytest.mark.parametrize(
    ("config", "training"),
    [
        ({"attn_lora_rank": 4, "mlp_lora_rank": 4, "lora_train_base": False}, {}),
        (
            {"num_hidden_layers": 8, "attn_lora_rank": 4, "lora_train_base": False},
            {},
        ),  # extrapolated from shallow models
        ({"num_hidden_layers": 8}, {"freeze_layers": ["wte", "attn.0-5", "mlp.3"]}),
    ],
)
def test_frozen_parameters_have_neither_gradients_nor_optimizer_state(
    config: dict[str, object], training: dict[str, object]
) -> None:
    settings = TrainingConfig.model_validate({"precision": "fp32", **training})
    estimate = step_memory(_config(**config), settings, sequences=1)
    model = Transformer(_config(**config))
    prepare_trainable(model, settings)
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    full = sum(parameter.nbytes for parameter in model.parameters())
    assert estimate.weights == full
    assert 2 * trained <= estimate.optimizer < 2 * trained + 1024, "two moments, and step counters"
    assert max(gradients for gradients, _ in estimate.moments) <= trained
    assert checkpoint_bytes(_config(**config), settings) == full + 2 * trained


def test_a_measured_step_trains_only_what_training_would() -> None:
    config = _config(attn_lora_rank=4, lora_train_base=False)
    model = Transformer(config)
    before = model.blocks[0].attn.q_proj.weight.detach().clone()
    training = TrainingConfig.model_validate({"precision": "fp32", "device": "cpu"})
    measure_step_memory(config, training, 1, model=model)
    assert model.blocks[0].attn.q_proj.weight.equal(before)


@pytest.mark.slow
def test_learning_rates_by_module_do_not_change_the_estimate() -> None:
    rates = TrainingConfig.model_validate(
        {"precision": "fp32", "lr_multipliers": {"attn.11": 0.1}, "layerwise_lr_decay": 0.9}
    )
    config = _config(num_hidden_layers=12)
    assert step_memory(config, rates, sequences=1) == step_memory(
        config, TrainingConfig(precision="fp32"), sequences=1
    )


@pytest.mark.slow
def test_a_quantized_base_is_counted_in_its_quantized_size() -> None:
    pytest.importorskip("torchao")
    config = _config(hidden_size=128, attn_lora_rank=4, mlp_lora_rank=4, lora_train_base=False)
    training = TrainingConfig.model_validate({"precision": "fp32", "quantize_base": "nf4"})
    model = Transformer(config)
    prepare_trainable(model, training)
    allocated = 0
    for parameter in model.parameters():
        inner = parameter.__tensor_flatten__()[0] if is_quantized(parameter) else []
        allocated += sum(getattr(parameter, name).nbytes for name in inner) or parameter.nbytes
    assert step_memory(config, training, sequences=1).weights == pytest.approx(allocated, rel=0.03)
    memory = rank_memory(config, training, ParallelPlan(), BatchPlan(1, 1))
    assert memory.async_save_copy == 4 * parameter_count(config) + memory.optimizer, (
        "checkpoints contain floats"
    )
