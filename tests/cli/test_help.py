"""What `--help` shows of settings: their choices, and which of two settings with one name a flag sets."""

from __future__ import annotations

import contextlib
import typing
from types import NoneType
from typing import Literal

import pytest

from llm_trainer.cli import specs
from llm_trainer.cli.main import COMMANDS, main
from llm_trainer.config.describe import help_text
from llm_trainer.config.parse.command import CommandSpec
from llm_trainer.config.parse.loader import load_run

SPECS = [spec for spec in vars(specs).values() if isinstance(spec, CommandSpec)]


def choices(annotation: object) -> set[str]:
    """Every word of the Literals in an annotation."""
    if typing.get_origin(annotation) is Literal:
        return {str(value) for value in typing.get_args(annotation)}
    return set().union(*(choices(part) for part in typing.get_args(annotation)), set())


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_help_shows_the_choices_of_every_enumeration(spec: CommandSpec) -> None:
    text = help_text(spec, show_all=True)
    names = spec.names()
    for section, name in names.fields():
        field = names.section_class(section).model_fields[name]
        for choice in choices(field.annotation):
            assert choice in text, (section, name, choice)
    assert str(NoneType) not in text


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_no_flag_is_shown_twice(spec: CommandSpec) -> None:
    flags = [
        line.split()[0] for line in help_text(spec, show_all=True).splitlines() if line.startswith("  --")
    ]
    assert len(flags) == len(set(flags))


def test_a_flat_name_of_two_settings_is_shown_with_the_section_of_the_one_that_it_does_not_set() -> None:
    text = help_text(specs.TRAIN, show_all=True)
    for name in ("seed", "vocab_size", "output_dir", "num_workers"):
        assert f"  --{name} " in text
        assert f"  --data.{name} " in text
    loaded = load_run(specs.TRAIN, ["--seed=1", "--data.seed=2"])
    assert (loaded.config.training.seed, loaded.config.data.seed) == (1, 2)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_names_it_in_its_usage(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        assert main(["help", command]) == 0
    assert capsys.readouterr().out.startswith(f"usage: llm-trainer {command}")


def test_help_of_an_unknown_command_suggests_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "trian"]) == 2
    assert "did you mean train?" in capsys.readouterr().err
