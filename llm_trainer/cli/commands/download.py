"""`llm-trainer download` and `scripts/download_datasets.py`: data sets of the catalogue onto the disk."""

from __future__ import annotations

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
    """Which data sets, and how they are kept."""

    datasets: list[str] = setting(list, "names from the list, or all; none: the small ones, 1.5 GB together")
    show_list: bool = setting(False, "print what there is, and leave", aliases=("list",))
    save_format: Literal["parquet", "jsonl", "txt"] = setting(
        "parquet",
        "of the files that are written; txt: a document a line, its own line breaks as spaces",
        aliases=("format",),
    )
    output_dir: str = setting(
        "data/raw", "each data set gets a folder of its name in it", aliases=("output",)
    )
    input: str | None = setting(
        None,
        "a folder with the original files, in place of the network; for several data sets, one that has a folder of each one's name",
    )


DOWNLOAD = CommandSpec(
    "scripts/download_datasets.py",
    "Fetch data sets of the catalogue, to parquet, jsonl or txt. What breaks off goes on from there the next time.",
    (),
    options=DownloadOptions,
)


def run(argv: list[str]) -> int:
    """Fetch what was named; data sets that cannot be had are told at the end, with exit status 1."""
    loaded = parse_command(DOWNLOAD, argv)
    if loaded is None:
        return 0
    options = loaded.options
    assert isinstance(options, DownloadOptions)
    from llm_trainer.data.catalog.registry import select_datasets

    rows = select_datasets(options.datasets)
    if options.show_list:
        print(
            "\n".join(
                described(name, row)
                for name, row in (rows if options.datasets else select_datasets(["all"])).items()
            )
        )
        return 0
    _fetch(rows, options, new_console())
    return 0


def described(name: str, row: DatasetEntry) -> str:
    """A data set in two lines."""
    size = f"{row.gigabytes:.0f} GB" if row.gigabytes >= 1 else f"{row.gigabytes * 1000:.0f} MB"
    return f"{name} ({size}, {row.licence}){', fetched where none is named' if row.is_small else ''}\n  {row.about}; {row.page}"


def _fetch(rows: dict[str, DatasetEntry], options: DownloadOptions, console: Console) -> None:
    from llm_trainer.data.catalog.fetch_dataset import fetch_dataset
    from llm_trainer.data.catalog.http_download import NoConnectionError

    output = Path(options.output_dir)
    failed: list[str] = []
    for name, row in rows.items():
        try:
            given = _given(name, options, len(rows))
            _tell(
                name,
                fetch_dataset(name, row, output, options.save_format, local_copy=given, console=console),
                console,
            )
        except NoConnectionError as error:
            raise DataError("\n".join([*failed, str(error)])) from None  # nor will the others be reached
        except DataError as error:
            failed.append(str(error))
    if failed:
        raise DataError("\n".join(failed))
    console.print(
        f"next: python scripts/prepare_data.py --data_root {output} --output_root data/processed",
        markup=False,
    )


def _given(name: str, options: DownloadOptions, number: int) -> Path | None:
    """Where the originals of one data set lie, if a folder was given."""
    if options.input is None:
        return None
    place = Path(options.input)
    if (place / name).is_dir():
        return place / name
    if number > 1:
        raise DataError(
            f"{place} has no folder {name}; with several data sets each has one there, with one the folder itself is read"
        )
    return place


def _tell(name: str, collected: FetchedDataset, console: Console) -> None:
    saved = collected.saved
    if saved is None:
        console.print(
            f"{name}: {collected.folder} is there already (from {collected.source}); remove it to fetch it again",
            markup=False,
        )
        return
    rejected = ", ".join(f"{count} {reason}" for reason, count in sorted(saved.rejected.items()))
    documents = f"{saved.kept + saved.rejected.total()} documents in = {saved.kept} kept + {saved.rejected.total()} rejected"
    console.print(
        f"{name}: {documents}{f' ({rejected})' if rejected else ''}, {saved.size / 1e6:.2f} MB of text",
        markup=False,
    )
    for example in saved.examples:
        console.print(f"  rejected: {example}", markup=False)
    if saved.broken_lines:
        lost = f"{saved.broken_lines} documents had line breaks, which a line of txt cannot hold: they are spaces now"
        console.print(f"  {lost}; parquet and jsonl keep them", markup=False)
    files = f"{len(saved.files)} files" if len(saved.files) > 1 else saved.files[0]
    console.print(f"  wrote {collected.folder}: {files}, from {collected.source}", markup=False)
