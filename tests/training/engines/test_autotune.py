"""Precision and compilation: chosen by rules that give the same answer every time, or measured if
asked to.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny_run import SHAPE, tiny_model, tiny_trainer, tokens

from llm_trainer import cpu_features
from llm_trainer.config import ModelConfig, TrainingConfig, UsageError
from llm_trainer.cpu_features import multiplies_bf16, multiplies_int8
from llm_trainer.data.sampling.window_sampler import WindowSampler
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.engines import autotune
from llm_trainer.training.engines.autotune import (
    CompilationRecord,
    Probe,
    TuneResult,
    WorkLeft,
    auto_precision,
    choose,
    measure,
)
from llm_trainer.training.engines.precision import PrecisionName
from llm_trainer.training.objectives.objective import ModelWithObjective, NextToken

CPU = torch.device("cpu")


def wide_model(width: int = 128) -> ModelConfig:
    return ModelConfig(**SHAPE | {"hidden_size": width})


# The rules of `auto`.


def test_bf16_is_chosen_where_the_processor_multiplies_it_and_the_model_is_wide(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(autotune, "multiplies_bf16", lambda: True)
    assert auto_precision(wide_model(128), CPU)[0] == "bf16"
    assert auto_precision(wide_model(64), CPU)[0] == "fp32"
    monkeypatch.setattr(autotune, "multiplies_bf16", lambda: False)
    assert auto_precision(wide_model(128), CPU)[0] == "fp32"


@pytest.mark.parametrize(
    ("features", "environment", "bf16", "int8"),
    [
        ({"amx_bf16": True, "avx512_bf16": True, "avx512_vnni": True}, {}, True, True),
        ({"avx512_bf16": True, "avx512_vnni": True}, {}, True, True),
        ({"avx512_vnni": True}, {}, False, True),
        ({"avx_vnni": True}, {}, False, True),
        ({}, {}, False, False),
        ({"amx_bf16": True, "avx512_vnni": True}, {"ATEN_CPU_CAPABILITY": "avx2"}, False, False),
        ({"avx512_bf16": True, "avx512_vnni": True}, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}, False, True),
        ({"amx_bf16": True, "avx512_bf16": True}, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, True, False),
        ({"amx_bf16": True, "avx512_vnni": True}, {"ONEDNN_MAX_CPU_ISA": "avx2"}, False, False),
        ({"amx_bf16": True}, {"ONEDNN_MAX_CPU_ISA": "DEFAULT"}, True, False),
    ],
)
def test_instructions_count_only_within_the_limits_that_the_user_sets(
    monkeypatch: pytest.MonkeyPatch,
    features: dict[str, bool],
    environment: dict[str, str],
    bf16: bool,
    int8: bool,
) -> None:
    monkeypatch.setattr(cpu_features, "_features", lambda: features)
    assert multiplies_bf16(environment) == bf16
    assert multiplies_int8(environment) == int8


def test_compilation_is_chosen_by_the_work_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "has_compiler", lambda: True)
    model = tiny_model(wide_model(16))
    training = TrainingConfig(precision="fp32")
    short = WorkLeft(micro_batches=100, tokens=64, context=8)
    long = WorkLeft(micro_batches=10**9, tokens=64, context=8)
    assert choose(model, training, CPU, short).compile == "off"
    assert choose(model, training, CPU, long).compile == "stack"
    assert choose(model, training, CPU, long) == choose(model, training, CPU, long)


def test_what_a_checkpoint_stores_takes_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "has_compiler", lambda: True)
    work = WorkLeft(micro_batches=1, tokens=64, context=8)
    choice = choose(
        tiny_model(wide_model(16)), TrainingConfig(), CPU, work, precision="bf16", compiled="blocks"
    )
    assert choice == TuneResult("bf16", "blocks", None)


def test_without_a_compiler_compilation_is_off_and_the_reason_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(autotune, "has_compiler", lambda: False)
    work = WorkLeft(micro_batches=10**9, tokens=64, context=8)
    choice = choose(tiny_model(wide_model(16)), TrainingConfig(compile="auto", precision="fp32"), CPU, work)
    assert choice.compile == "off"
    assert "no C++ compiler (install g++ to compile)" in str(choice)


@pytest.mark.parametrize("autotuned", [False, True])
def test_compile_on_without_a_compiler_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autotuned: bool
) -> None:
    monkeypatch.setattr(autotune, "has_compiler", lambda: False)
    trainer = tiny_trainer(tmp_path, compile="on", precision="fp32", autotune=autotuned)
    with pytest.raises(
        UsageError, match=r"compile is on, but there is no C\+\+ compiler.*--compile auto or off"
    ):
        trainer.train()


@pytest.mark.parametrize("setting", ["auto", "on"])
def test_a_compilation_that_fails_is_an_error_only_where_compile_is_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    monkeypatch.setattr(autotune, "has_compiler", lambda: True)
    monkeypatch.setattr(autotune, "compile_model", _cannot_compile)
    monkeypatch.setattr(autotune, "_auto_compile", lambda *_: ("blocks", "it pays"))
    trainer = tiny_trainer(tmp_path, compile=setting, precision="fp32")
    if setting == "auto":
        assert trainer.train().step > 0
    else:
        with pytest.raises(
            UsageError, match=r"compiling failed \(no room for a compiler\), and compile is on"
        ):
            trainer.train()


def _cannot_compile(model: Transformer, mode: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no room for a compiler")

    for block in model.blocks:
        block.forward = fail


def test_nothing_is_timed_unless_autotune_is_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(self: Probe, precision: PrecisionName, times: int = 2) -> float:
        raise AssertionError("a choice by rule needs no clock")

    monkeypatch.setattr(Probe, "seconds", timed)
    trainer = tiny_trainer(tmp_path, precision="auto", compile="auto", max_steps=2)
    trainer.train()
    assert trainer.run.state.compile == "off"
    with pytest.raises(AssertionError, match="needs no clock"):
        tiny_trainer(
            tmp_path / "measured", precision="fp32", autotune=True, max_steps=2, compile="auto"
        ).train()


# Measured choices.


class _Compilations:
    """Replaces the compiler: counts compilations, and returns what a clock would."""

    def __init__(self) -> None:
        self.seconds = {"fp32": 1.0, "bf16": 0.5, "compiled": 0.4}
        self.count = 0
        self.is_on = False


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> _Compilations:
    """A machine whose speeds a test sets."""
    made = _Compilations()

    def seconds(self: Probe, precision: PrecisionName, times: int = 2) -> float:
        self.rows = self.rows or len(self.batch)
        return made.seconds["compiled"] if made.is_on else made.seconds[precision]

    def compiles(model: object, mode: object) -> None:
        made.count += 1
        made.is_on = True

    class Uncompiled:
        def __init__(self, mode: object) -> None: ...

        def __enter__(self) -> None:
            self.was, made.is_on = made.is_on, False

        def __exit__(self, *_: object) -> None:
            made.is_on = self.was

    monkeypatch.setattr(Probe, "seconds", seconds)
    monkeypatch.setattr(autotune, "compile_model", compiles)
    monkeypatch.setattr(autotune, "undo_compile", lambda model: setattr(made, "is_on", False))
    monkeypatch.setattr(autotune, "uncompiled", Uncompiled)
    monkeypatch.setattr(autotune, "multiplies_bf16", lambda: True)
    monkeypatch.setattr(autotune, "has_compiler", lambda: True)
    return made


def _probe(micro_batches_left: int = 1000) -> Probe:
    model = tiny_model(ModelConfig(**SHAPE))
    batch = WindowSampler(tokens(), 8, seed=0).batch(0, 4)
    return Probe(
        model, ModelWithObjective(model, NextToken()), batch, torch.device("cpu"), micro_batches_left
    )


def _measured(
    probe: Probe,
    *,
    memory: Path | None = None,
    precision: str | None = None,
    compiled: str | None = None,
    **settings: str,
) -> TuneResult:
    return measure(
        probe, TrainingConfig(**settings), precision=precision, compiled=compiled, cache_dir=memory
    )


def test_the_faster_precision_is_chosen(machine: _Compilations) -> None:
    assert _measured(_probe(), compile="off").precision == "bf16"
    machine.seconds["bf16"] = 0.95  # not worth its rounding
    assert _measured(_probe(), compile="off").precision == "fp32"
    assert _measured(_probe(), compile="off", precision="bf16").precision == "bf16"


def test_compiling_is_tried_where_the_run_is_long_enough_and_kept_where_it_is_faster(
    machine: _Compilations,
) -> None:
    assert _measured(_probe(micro_batches_left=50)).compile == "off"
    assert machine.count == 0
    assert _measured(_probe()).compile == "stack"
    machine.is_on, machine.seconds["compiled"] = False, 0.6
    assert _measured(_probe()).compile == "off"
    assert (machine.count, machine.is_on) == (2, False)


def test_a_second_run_knows_what_the_first_found_out(machine: _Compilations, tmp_path: Path) -> None:
    assert _measured(_probe(), memory=tmp_path).compile == "stack"
    machine.is_on = False
    short = _probe(
        micro_batches_left=50
    )  # 25 s are left, a fifth of them to gain, and everything is in the compiler's cache
    assert _measured(short, memory=tmp_path).compile == "stack"
    machine.is_on = False
    assert _measured(short).compile == "off"
    machine.seconds["compiled"] = 0.6
    assert _measured(_probe(), memory=tmp_path / "slow").compile == "off"
    count = machine.count
    assert _measured(_probe(), memory=tmp_path / "slow").compile == "off"
    assert machine.count == count  # not even tried


def test_a_memory_that_cannot_be_read_or_written_is_no_error(machine: _Compilations, tmp_path: Path) -> None:
    (tmp_path / autotune.CACHE_FILE).write_text("{not json", encoding="utf-8")
    assert _measured(_probe(), memory=tmp_path).compile == "stack"
    (tmp_path / "file").write_text("", encoding="utf-8")
    machine.is_on = False
    assert _measured(_probe(), memory=tmp_path / "file" / "folder").compile == "stack"


def test_a_compilation_record_is_plain_numbers() -> None:
    assert dataclasses.asdict(CompilationRecord(1.0, 2.0, 3.0)) == {
        "eager": 1.0,
        "compiled": 2.0,
        "took": 3.0,
    }


def test_probing_leaves_weights_and_gradients_as_they_are() -> None:
    probe = _probe()
    before = [parameter.detach().clone() for parameter in probe.model.parameters()]
    assert probe.seconds("bf16") > 0
    assert all(torch.equal(one, other) for one, other in zip(before, probe.model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in probe.model.parameters())


def test_a_chosen_precision_gives_the_same_run_as_a_set_one(tmp_path: Path) -> None:
    chosen = tiny_trainer(tmp_path / "chosen", precision="auto")
    chosen.train()
    assert chosen.run.state.precision in ("fp32", "bf16")
    explicit = tiny_trainer(tmp_path / "set", precision=chosen.run.state.precision)
    explicit.train()
    for one, other in zip(chosen.model.parameters(), explicit.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_resumed_run_keeps_the_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "auto_precision", lambda config, device: ("bf16", "a test says so"))
    first = tiny_trainer(tmp_path, precision="auto", max_steps=10, save_interval=5)
    first.train()
    monkeypatch.setattr(autotune, "auto_precision", lambda config, device: ("fp32", "other hardware"))
    resumed = tiny_trainer(tmp_path / "again", precision="auto", resume_from=str(tmp_path / "checkpoint-5"))
    resumed.train()
    assert resumed.run.state.precision == "bf16"
    for one, other in zip(first.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
