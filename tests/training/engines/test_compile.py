"""Compiled training is training: the same losses, one graph for all layers and for validation none, names as
before.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_run import SHAPE, tiny_model, tiny_run, tiny_trainer

from llm_trainer.config import ModelConfig
from llm_trainer.training.engines import compile as compilation
from llm_trainer.training.engines.compile import (
    CompileMode,
    best_mode,
    compile_model,
    has_compiler,
    undo_compile,
)
from llm_trainer.training.logging.metrics import read_metrics

needs_compiler = pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler")


def test_small_models_are_compiled_as_one_graph_and_deep_ones_by_block() -> None:
    shape = {"vocab_size": 8, "num_heads": 1, "max_seq_len": 8}
    assert best_mode(tiny_model(ModelConfig(**shape, hidden_size=16, num_layers=4)), 64) == "stack"
    assert best_mode(tiny_model(ModelConfig(**shape, hidden_size=16, num_layers=12)), 64) == "blocks"
    assert best_mode(tiny_model(ModelConfig(**shape, hidden_size=16, num_layers=4)), 1 << 20) == "blocks"


@pytest.mark.parametrize("mode", ["stack", "blocks"])
def test_compiling_can_be_undone_and_does_not_rename_weights(mode: CompileMode) -> None:
    model = tiny_model(ModelConfig(**SHAPE))
    names = list(model.state_dict())
    forwards = [type(model).hidden_states, *(type(block).forward for block in model.blocks)]
    compile_model(model, mode)
    assert list(model.state_dict()) == names
    undo_compile(model)
    assert [model.hidden_states.__func__, *(block.forward.__func__ for block in model.blocks)] == forwards  # type: ignore[attr-defined]


@pytest.mark.parametrize("mode", ["stack", "blocks"])
def test_one_graph_serves_all_layers_and_ragged_validation_adds_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: CompileMode
) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    compiler = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: compiler(function, backend=counter, **options)
    )
    monkeypatch.setattr(compilation, "has_compiler", lambda: True)
    monkeypatch.setattr("llm_trainer.training.engines.autotune.best_mode", lambda model, tokens: mode)
    monkeypatch.setattr("llm_trainer.training.engines.autotune.has_compiler", lambda: True)
    # 8 validation windows in batches of 3: two full ones and a ragged one.
    result = tiny_run(
        tmp_path, compile="on", model={"num_layers": 5, "dropout": 0.0}, eval_batch_size=3, eval_interval=2
    )
    assert result.step == 10
    assert counter.frame_count == 1
    torch._dynamo.reset()


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["stack", "blocks"])
def test_compiled_losses_are_the_eager_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: CompileMode, precision: str
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr("llm_trainer.training.engines.autotune.best_mode", lambda model, tokens: mode)
    losses = {}
    for compile_ in ("off", "on"):
        trainer = tiny_trainer(
            tmp_path / compile_, compile=compile_, precision=precision, model={"dropout": 0.0}, max_steps=30
        )
        trainer.train()
        assert trainer.run.state.compile == (mode if compile_ == "on" else "off")
        losses[compile_] = [line["loss"] for line in read_metrics(tmp_path / compile_) if "loss" in line]
    assert losses["on"] == pytest.approx(losses["off"], abs=1e-4 if precision == "fp32" else 0.05)


@needs_compiler
@pytest.mark.slow
def test_a_compiled_run_resumes_bit_exactly(tmp_path: Path) -> None:
    torch._dynamo.reset()
    straight = tiny_trainer(tmp_path / "straight", compile="on", save_interval=5)
    straight.train()
    resumed = tiny_trainer(
        tmp_path / "resumed", compile="on", resume_from=str(tmp_path / "straight" / "checkpoint-5")
    )
    resumed.train()
    for one, other in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
