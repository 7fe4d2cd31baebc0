"""`llm-trainer prepare`, `data_prep_tool.py`, `scripts/prepare_data.py`: turn text into prepared data."""

from __future__ import annotations

from collections.abc import Sequence

from llm_trainer.cli.setup.build_dataset import prepared_dir
from llm_trainer.cli.setup.parse_command import new_console, parse_command
from llm_trainer.cli.specs import PREPARE, PREPARE_FRAMEWORK, PREPARE_SPLITS
from llm_trainer.config.parse.command import CommandSpec


def run(argv: list[str]) -> int:
    """`llm-trainer prepare`."""
    return prepare(PREPARE, argv)


def framework(argv: list[str]) -> int:
    """`data_prep_tool.py`."""
    return prepare(PREPARE_FRAMEWORK, argv)


def splits(argv: list[str]) -> int:
    """`scripts/prepare_data.py`."""
    return prepare(PREPARE_SPLITS, argv, with_texts=True)


def prepare(spec: CommandSpec, argv: Sequence[str], *, with_texts: bool = False) -> int:
    """Prepare data, and print a summary and the next command.

    Args:
        spec: The command or script.
        argv: Its arguments.
        with_texts: Also write the splits as text files.

    Returns:
        The exit code.
    """
    loaded = parse_command(spec, argv)
    if loaded is None:
        return 0
    from llm_trainer.data.pipeline.pipeline import prepare_dataset
    from llm_trainer.data.sources.presplit_source import find_split_files

    data = loaded.config.data
    if data.dataset_name is not None and not data.is_set("input"):
        data = data.model_copy(update={"input": None})  # a dataset that is named overrides the default folder
    folder = prepared_dir(data)
    console = new_console()
    summary = prepare_dataset(data, folder, console=console, with_texts=with_texts)
    for line in summary.lines():
        console.print(line, markup=False)
    if with_texts:
        for path in find_split_files(folder):
            console.print(f"wrote {path}", markup=False)
    console.print(f"next: llm-trainer train --data_dir {folder}", markup=False)
    return 0
