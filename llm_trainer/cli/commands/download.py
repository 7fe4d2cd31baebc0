"""`llm-trainer download` and `scripts/download_datasets.py`: download datasets of the catalog."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llm_trainer.cli.setup.parse_command import new_console, parse_command
from llm_trainer.config.parse.command import CommandSpec
from llm_trainer.config.schema.base import Section, setting
from llm_trainer.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console

    from llm_trainer.data.catalog.fetch_dataset import FetchedDataset
    from llm_trainer.data.catalog.registry import DatasetEntry


class DownloadOptions(Section):
    """Which datasets, and in which format."""

    datasets: list[str] = setting(
        list, "Names of datasets, or all (default: the small ones, 1.5 GB in total)."
    )
    show_list: bool = setting(False, "Print the list of datasets and exit.", aliases=("list",))
    save_format: Literal["parquet", "jsonl", "txt"] = setting(
        "parquet",
        "Format of the files. txt has one document per line, with its line breaks as spaces.",
        aliases=("format",),
    )
    output_dir: str = setting(
        "data/raw", "Folder in which each dataset gets a folder of its name.", aliases=("output",)
    )
    input: str | None = setting(
        None,
        "Folder with the original files, to use instead of the network. For several datasets it "
        "has a folder for each.",
    )


DOWNLOAD = CommandSpec(
    "llm-trainer download",
    "Download datasets of the catalog as parquet, jsonl or txt. An interrupted download is resumed.",
    (),
    options=DownloadOptions,
)


DOWNLOAD_SCRIPT = replace(DOWNLOAD, name="scripts/download_datasets.py")


def run(argv: list[str]) -> int:
    """`llm-trainer download`."""
    return download(DOWNLOAD, argv)


def script(argv: list[str]) -> int:
    """`scripts/download_datasets.py`."""
    return download(DOWNLOAD_SCRIPT, argv)


def download(spec: CommandSpec, argv: Sequence[str]) -> int:
    """Download datasets, or list them. Those that fail are reported at the end.

    Args:
        spec: The command or script.
        argv: Its arguments.

    Returns:
        The exit code.

    Raises:
        DataError: If a dataset cannot be downloaded.
    """
    loaded = parse_command(spec, argv)
    if loaded is None:
        return 0
    options = loaded.options
    assert isinstance(options, DownloadOptions)
    from llm_trainer.data.catalog.registry import select_datasets

    rows = select_datasets(options.datasets)
    if options.show_list:
        print(
            "\n".join(
                format_dataset(name, row)
                for name, row in (rows if options.datasets else select_datasets(["all"])).items()
            )
        )
        return 0
    _fetch(rows, options, new_console())
    return 0


def format_dataset(name: str, row: DatasetEntry) -> str:
    """A dataset in two lines, as `--list` prints it."""
    size = f"{row.gigabytes:.0f} GB" if row.gigabytes >= 1 else f"{row.gigabytes * 1000:.0f} MB"
    default = ", downloaded by default" if row.is_small else ""
    return f"{name} ({size}, {row.licence}){default}\n  {row.about}; {row.page}"


def _fetch(rows: dict[str, DatasetEntry], options: DownloadOptions, console: Console) -> None:
    from llm_trainer.data.catalog.fetch_dataset import fetch_dataset
    from llm_trainer.data.catalog.http_download import NoConnectionError

    output = Path(options.output_dir)
    failed: list[str] = []
    for name, row in rows.items():
        try:
            given = _given(name, options, len(rows))
            _print_result(
                name,
                fetch_dataset(name, row, output, options.save_format, local_copy=given, console=console),
                console,
            )
        except NoConnectionError as error:
            raise DataError("\n".join([*failed, str(error)])) from None  # the others cannot be reached either
        except DataError as error:
            failed.append(str(error))
    if failed:
        raise DataError("\n".join(failed))
    console.print(
        f"next: python scripts/prepare_data.py --data_root {output} --output_root data/processed",
        markup=False,
    )


def _given(name: str, options: DownloadOptions, number: int) -> Path | None:
    """The folder with the original files of a dataset, if one was given."""
    if options.input is None:
        return None
    place = Path(options.input)
    if (place / name).is_dir():
        return place / name
    if number > 1:
        raise DataError(
            f"{place} has no folder {name}; with several datasets each needs a folder of its name there, "
            "with one dataset "
            f"the files are read from {place} itself"
        )
    return place


def _print_result(name: str, collected: FetchedDataset, console: Console) -> None:
    saved = collected.saved
    if saved is None:
        console.print(
            f"{name}: {collected.folder} exists already (from {collected.source}); remove it to download it "
            "again",
            markup=False,
        )
        return
    rejected = ", ".join(f"{count} {reason}" for reason, count in sorted(saved.rejected.items()))
    lost = saved.rejected.total()
    documents = f"{saved.kept + lost} documents in = {saved.kept} kept + {lost} rejected"
    console.print(
        f"{name}: {documents}{f' ({rejected})' if rejected else ''}, {saved.size / 1e6:.2f} MB of text",
        markup=False,
    )
    for example in saved.examples:
        console.print(f"  rejected: {example}", markup=False)
    if saved.broken_lines:
        note = f"{saved.broken_lines} documents had line breaks, which became spaces"
        console.print(f"  {note}; parquet and jsonl keep them", markup=False)
    files = f"{len(saved.files)} files" if len(saved.files) > 1 else saved.files[0]
    console.print(f"  wrote {collected.folder}: {files}, from {collected.source}", markup=False)
