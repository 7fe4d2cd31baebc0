"""Choosing precision and compilation: by measurement, without touching the run, once for all of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny_run import SHAPE, tiny_model, tiny_trainer, tokens

from llm_trainer.config import ModelConfig, TrainingConfig
from llm_trainer.data.sampling.samplers import WindowSampler
from llm_trainer.training.engines import autotune
from llm_trainer.training.engines.autotune import Choice, Probe, Remembered, choose
from llm_trainer.training.engines.precision import PrecisionName
from llm_trainer.training.objectives.objective import NextToken, TrainingStep


class _Compilations:
    """Stands for the compiler: counts, and says what the clock would."""

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
    monkeypatch.setattr(autotune, "_bf16_products_ratio", lambda: made.seconds["fp32"] / made.seconds["bf16"])
    monkeypatch.setattr(autotune, "has_compiler", lambda: True)
    return made


def _probe(micro_batches_left: int = 1000) -> Probe:
    model = tiny_model(ModelConfig(**SHAPE))
    batch = WindowSampler(tokens(), 8, seed=0).batch(0, 4)
    return Probe(model, TrainingStep(model, NextToken()), batch, torch.device("cpu"), micro_batches_left)


def _choose(
    probe: Probe,
    *,
    memory: Path | None = None,
    precision: str | None = None,
    compiled: str | None = None,
    **settings: str,
) -> Choice:
    return choose(
        probe,
        TrainingConfig(**settings),
        precision=precision,
        compiled=compiled,
        memory=memory,
        say=lambda line: None,
    )


def test_the_faster_precision_is_chosen(machine: _Compilations) -> None:
    assert _choose(_probe(), compile="off").precision == "bf16"
    machine.seconds["bf16"] = 0.95  # not worth its rounding
    assert _choose(_probe(), compile="off").precision == "fp32"
    assert _choose(_probe(), compile="off", precision="bf16").precision == "bf16"


def test_compiling_is_tried_where_the_run_is_long_enough_and_kept_where_it_is_faster(
    machine: _Compilations,
) -> None:
    assert _choose(_probe(micro_batches_left=50)).compile == "off"
    assert machine.count == 0
    assert _choose(_probe()).compile == "stack"
    machine.is_on, machine.seconds["compiled"] = False, 0.6
    assert _choose(_probe()).compile == "off"
    assert (machine.count, machine.is_on) == (2, False)


def test_a_second_run_knows_what_the_first_found_out(machine: _Compilations, tmp_path: Path) -> None:
    assert _choose(_probe(), memory=tmp_path).compile == "stack"
    machine.is_on = False
    short = _probe(
        micro_batches_left=50
    )  # 25 s are left, a fifth of them to gain, and everything is in the compiler's cache
    assert _choose(short, memory=tmp_path).compile == "stack"
    machine.is_on = False
    assert _choose(short).compile == "off"
    machine.seconds["compiled"] = 0.6
    assert _choose(_probe(), memory=tmp_path / "slow").compile == "off"
    count = machine.count
    assert _choose(_probe(), memory=tmp_path / "slow").compile == "off"
    assert machine.count == count  # not even tried


def test_a_memory_that_cannot_be_read_or_written_is_no_error(machine: _Compilations, tmp_path: Path) -> None:
    (tmp_path / autotune.MEMORY_FILE).write_text("{not json", encoding="utf-8")
    assert _choose(_probe(), memory=tmp_path).compile == "stack"
    (tmp_path / "file").write_text("", encoding="utf-8")
    machine.is_on = False
    assert _choose(_probe(), memory=tmp_path / "file" / "folder").compile == "stack"


def test_what_a_checkpoint_says_holds(machine: _Compilations) -> None:
    machine.seconds |= {"compiled": 9.0, "bf16": 9.0}
    choice = _choose(_probe(), precision="bf16", compiled="blocks")
    assert (choice.precision, choice.compile, choice.reason) == ("bf16", "blocks", None)


def test_without_a_compiler_compilation_is_off_and_says_so(
    machine: _Compilations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autotune, "has_compiler", lambda: False)
    for said in ("auto", "on"):
        told: list[str] = []
        choice = choose(_probe(), TrainingConfig(compile=said, precision="fp32"), say=told.append)
        assert choice.compile == "off"
        assert "no C++ compiler (install g++ to compile)" in told[0]


def test_remembered_facts_are_plain_numbers() -> None:
    assert dataclasses.asdict(Remembered(1.0, 2.0, 3.0)) == {"eager": 1.0, "compiled": 2.0, "took": 3.0}


def test_probing_leaves_weights_and_gradients_as_they_are() -> None:
    probe = _probe()
    before = [parameter.detach().clone() for parameter in probe.model.parameters()]
    assert probe.seconds("bf16") > 0
    assert all(torch.equal(one, other) for one, other in zip(before, probe.model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in probe.model.parameters())


def test_a_run_that_measured_is_the_run_that_was_told(tmp_path: Path) -> None:
    measured = tiny_trainer(tmp_path / "measured", precision="auto")
    measured.train()
    assert measured.state.precision in ("fp32", "bf16")
    told = tiny_trainer(tmp_path / "told", precision=measured.state.precision)
    told.train()
    for one, other in zip(measured.model.parameters(), told.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_resumed_run_keeps_the_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "_choose_precision", lambda probe: ("bf16", None, "a test says so"))
    first = tiny_trainer(tmp_path, precision="auto", max_steps=10, save_interval=5)
    first.train()
    monkeypatch.setattr(
        autotune, "_choose_precision", lambda probe: ("fp32", None, "the machine is busy now")
    )
    resumed = tiny_trainer(tmp_path / "again", precision="auto", resume_from=str(tmp_path / "checkpoint-5"))
    resumed.train()
    assert resumed.state.precision == "bf16"
    for one, other in zip(first.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
