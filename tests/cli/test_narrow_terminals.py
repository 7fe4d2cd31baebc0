"""Text that the terminal's encoding lacks is replaced, and nothing ends because of it."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest

from llm_trainer.cli.main import main
from llm_trainer.cli.scripts import script

TRAIN = [
    "--data_dir=data/prepared/text",
    "--hidden_size=32",
    "--num_layers=1",
    "--num_heads=2",
    "--max_length=32",
    "--batch_size=4",
]


def narrow(errors: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors=errors, write_through=True)


@pytest.mark.parametrize(
    ("errors", "arguments", "shown"),
    [
        ("strict", ["presets"], "M        ?"),
        ("surrogateescape", ["presets"], "M        ?"),
        ("strict", ["generate", "--model=checkpoints", "--prompt=caf\u00e9", "--max_new_tokens=2"], "caf?"),
        (
            "strict",
            ["train", *TRAIN, "--max_steps=1", "--compile=off", "--output_dir=narrow", "--report_to=none"],
            "1 layers ? 32",
        ),
    ],
)
def test_text_outside_the_terminals_encoding_is_replaced(
    place: Path, monkeypatch: pytest.MonkeyPatch, errors: str, arguments: list[str], shown: str
) -> None:
    stream = narrow(errors)
    monkeypatch.setattr("sys.stdout", stream)
    with contextlib.suppress(SystemExit):  # as --help leaves
        assert main(arguments) == 0
    assert isinstance(stream.buffer, io.BytesIO)
    assert shown in stream.buffer.getvalue().decode("ascii")


def test_a_script_tells_a_narrow_terminal_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = narrow("strict")
    monkeypatch.setattr("sys.stderr", stream)
    assert script("train.py", ["--config=caf\u00e9.yaml"]) == 2
    assert isinstance(stream.buffer, io.BytesIO)
    assert b"caf?.yaml" in stream.buffer.getvalue()
