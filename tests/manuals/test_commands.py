"""Every command that the five manuals tell a user to type, scaled down, in a clone of its own.

What is not implemented is a strict expected failure, and only for the refusal that says so: a crash in its
place fails the test, and so does a command that has begun to work, until its case is changed from owed.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from manuals.cases import CASES, Case, scaled
from manuals.extract import Command, commands
from manuals.stages import Stages, run

COMMANDS = commands()
REFUSAL = "not implemented"

pytestmark = pytest.mark.skipif(not COMMANDS, reason="the manuals are not beside the repository")


class NotBuiltYet(Exception):
    """The command refused with the one clear message."""


def _case(command: Command) -> Case:
    return CASES[command.manual][command.text]


def _parameters() -> list[object]:
    made = []
    for command in COMMANDS:
        case = CASES[command.manual].get(command.text)
        is_owed = case is not None and case.owed
        marks = (
            [pytest.mark.xfail(strict=True, raises=NotBuiltYet, reason=case.owed)]
            if is_owed
            else [pytest.mark.slow]
        )
        made.append(pytest.param(command, id=str(command), marks=marks))
    return made


@pytest.fixture(scope="session")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    """Folders in the states that earlier commands leave."""
    return Stages(tmp_path_factory.mktemp("manuals"))


@pytest.mark.parametrize("command", _parameters())
def test_the_command_runs(command: Command, stages: Stages, tmp_path: Path) -> None:
    case = _case(command)
    folder = stages.copy(case.stage, tmp_path / "clone")
    done = run(scaled(command.text, case), folder)
    said = done.stdout + done.stderr
    if done.returncode != 0 and REFUSAL in said and "Traceback" not in done.stdout:
        raise NotBuiltYet(said)
    assert done.returncode == 0, said
    for made in case.makes:
        assert (folder / made).exists(), f"{made} is missing\n{said}"
    for words in case.says:
        assert words in said


def test_every_case_is_a_command_of_the_manuals() -> None:
    known = {(command.manual, command.text) for command in COMMANDS}
    written = {(manual, text) for manual, cases in CASES.items() for text in cases}
    assert written == known


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "torchrun --standalone --nproc_per_node=1 scripts/train.py --config tiny/config.json",
        "python -m torch.distributed.launch --nproc_per_node=1 scripts/train.py --config tiny/config.json",
    ],
)
def test_a_launcher_with_one_process_trains(command: str, stages: Stages, tmp_path: Path) -> None:
    folder = stages.copy("clone", tmp_path / "clone")
    done = run(command, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "checkpoints/final_model/model.safetensors").exists()


@pytest.mark.slow
def test_the_library_as_the_manual_uses_it(stages: Stages, tmp_path: Path) -> None:
    folder = stages.copy("all in one", tmp_path / "clone")
    lines = (
        "from model import load_model",
        'model, tokenizer = load_model("models/final")',
        'output = model.generate("Explain quantum computing", max_tokens=8)',
        "print(type(output).__name__, len(tokenizer.encode(output)) >= 0)",
    )
    (folder / "use.py").write_text("\n".join(lines), encoding="utf-8")
    done = run("python use.py", folder)
    assert done.stdout.strip() == "str True", done.stderr
