"""What is trained and how fast: frozen modules, adapters, learning rates by module and depth, resuming."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_run import SHAPE, tiny_config, tiny_model, tokens
from torch import Tensor

from llm_trainer.config import ModelConfig, TrainingConfig, UsageError
from llm_trainer.config.param_count import parameter_count
from llm_trainer.inference.load_model import load_transformer
from llm_trainer.model.adapters.lora import is_adapter_parameter, merge_lora
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.optim.optimizers import build_optimizers
from llm_trainer.training.optim.param_groups import prepare_trainable, trainable_sizes
from llm_trainer.training.trainer import Trainer

LORA = {"attn_lora_rank": 2, "mlp_lora_rank": 2, "lora_train_base": False, "lora_dropout": 0.1}


def trained(output_dir: Path, model: dict[str, object], **training: object) -> Trainer:
    config = tiny_config(output_dir, model, **training)
    trainer = Trainer(tiny_model(config.model), config, tokens(), tokens(seed=1), console=Console(quiet=True))
    trainer.train()
    return trainer


def weights(model: Transformer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_frozen_modules_do_not_change_and_the_others_are_trained(tmp_path: Path, optimizer: str) -> None:
    model = tiny_model(ModelConfig(**SHAPE))
    before = weights(model)
    config = tiny_config(tmp_path, freeze_layers=["attn.0", "ln_*.1"], optimizer=optimizer, max_steps=3)
    Trainer(model, config, tokens(), console=Console(quiet=True)).train()
    stayed = {name for name, value in weights(model).items() if torch.equal(value, before[name])}
    assert stayed == {name for name in before if name.startswith(("blocks.0.attn", "blocks.1.ln_"))}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_adapters_alone_are_trained_over_a_frozen_base_and_lower_the_loss(
    tmp_path: Path, optimizer: str
) -> None:
    model = tiny_model(ModelConfig(**SHAPE | LORA))
    before = weights(model)
    trainer = Trainer(
        model,
        tiny_config(
            tmp_path, LORA, optimizer=optimizer, max_steps=20, eval_at_start=True, learning_rate=3e-2
        ),
        tokens(),
        tokens(seed=1),
        console=Console(quiet=True),
    )
    first = trainer.evaluate().loss
    trainer.train()
    assert all(
        torch.equal(value, before[name]) != is_adapter_parameter(name)
        for name, value in weights(model).items()
    )
    assert trainer.evaluate().loss < first - 0.02


def test_inactive_adapters_are_not_trained() -> None:
    sets = {"one": {"ranks": {"attn.0": 2}}, "other": {"ranks": {"attn.0": 2, "wte": 3}}}
    shape = ModelConfig(**SHAPE, lora=sets, active_adapters=["other"], lora_train_base=True)
    model = tiny_model(shape)
    prepare_trainable(model, TrainingConfig())
    assert {
        name.split(".lora.")[1].split(".")[0]
        for name, one in model.named_parameters()
        if not one.requires_grad
    } == {"one"}
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    assert sum(trainable_sizes(shape, TrainingConfig()).values()) == trained < parameter_count(shape)


def test_a_resumed_adapter_run_equals_the_uninterrupted_one_bit_exactly(tmp_path: Path) -> None:
    uninterrupted = trained(tmp_path / "uninterrupted", LORA)
    trained(tmp_path / "interrupted", LORA, max_steps=6, lr_decay_steps=10)
    resumed = trained(tmp_path / "interrupted", LORA, resume_from="auto", max_steps=10, lr_decay_steps=10)
    assert resumed.current_step == 10
    for name, value in weights(trained(tmp_path / "again", LORA, lr_decay_steps=10).model).items():
        assert torch.equal(value, weights(resumed.model)[name]), name
        assert torch.equal(value, weights(uninterrupted.model)[name]), name


def test_a_checkpoint_with_adapters_is_merged_into_a_plain_model(tmp_path: Path) -> None:
    trainer = trained(tmp_path, LORA)
    ids = torch.arange(8)[None]
    plain = load_transformer(tmp_path / "final_model")
    expected = plain(ids)
    merge_lora(plain, restart=False)
    assert set(weights(plain)) == set(weights(tiny_model(ModelConfig(**SHAPE))))
    torch.testing.assert_close(plain(ids), expected)
    trainer.model.eval()
    torch.testing.assert_close(trainer.model(ids), expected)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_learning_rates_depend_on_module_and_depth(optimizer: str) -> None:
    model = tiny_model(ModelConfig(**SHAPE))
    training = TrainingConfig(
        optimizer=optimizer,
        learning_rate=1.0,
        muon_learning_rate=1.0,
        layerwise_lr_decay=0.5,
        lr_multipliers={"mlp.*": 3.0, "mlp.0": 4},
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {
        names[id(one)]: group["lr"]
        for optimizer in build_optimizers(model, training)
        for group in optimizer.param_groups
        for one in group["params"]
    }
    assert rates["wte.weight"] == rates["wpe.weight"] == 0.125
    assert rates["blocks.0.attn.q_proj.weight"] == rates["blocks.0.ln_1.weight"] == 0.25
    assert rates["blocks.1.attn.o_proj.weight"] == 0.5
    assert rates["blocks.0.mlp.up_proj.weight"] == 1.0
    assert rates["blocks.1.mlp.up_proj.bias"] == 1.5
    assert rates["ln_f.weight"] == 1.0


def test_a_multiplier_or_freeze_of_an_unknown_module_is_refused(tmp_path: Path) -> None:
    model = tiny_model(ModelConfig(**SHAPE))
    with pytest.raises(UsageError, match=r"attn\.9"):
        build_optimizers(model, TrainingConfig(lr_multipliers={"attn.9": 2.0}))
    with pytest.raises(UsageError, match="heads"):
        Trainer(model, tiny_config(tmp_path, freeze_layers=["heads"]), tokens(), console=Console(quiet=True))
