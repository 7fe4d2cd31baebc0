"""A data set of the catalogue onto the disk: fetched or taken from a local folder, unpacked, read, and saved
in one format.

`<output>/<name>/` appears whole or not at all. Beside its files a hidden `.source.json` says where they are from and what became of the
documents, so that a second call finds the set there. Fetched originals lie in `<output>/.downloads/<name>/` until the set is saved: what
broke off goes on from there.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from llm_trainer.data.catalog.archives import extract, is_archive
from llm_trainer.data.catalog.http_download import download
from llm_trainer.data.catalog.registry import DatasetEntry, list_remote_files, manual_download_hint
from llm_trainer.data.catalog.writers import SaveFormat, SaveSummary, save_documents
from llm_trainer.data.progress import ByteProgress
from llm_trainer.data.sources.base import Rejected
from llm_trainer.data.sources.file_source import TEXT_SUFFIXES, FileSource
from llm_trainer.errors import DataError

SOURCE_FILE = ".source.json"
_DOWNLOADS = ".downloads"


@dataclass(frozen=True)
class FetchedDataset:
    """A set that is on the disk. `saved` is None where it was there already."""

    folder: Path
    source: str
    saved: SaveSummary | None


def fetch_dataset(
    name: str,
    row: DatasetEntry,
    output: Path,
    save_format: SaveFormat,
    *,
    given: Path | None = None,
    console: Console | None = None,
) -> FetchedDataset:
    """Make `<output>/<name>/`. `given` is a file or folder with the originals, in place of the network.

    Raises NoConnectionError without a network, and DataError for what cannot be had or used; both say how to
    supply the set by hand.
    """
    target = output / name
    if given is None and (source := _found(target, save_format)) is not None:
        return FetchedDataset(target, source, None)
    downloads = output / _DOWNLOADS / name
    try:
        originals, source = (
            (given, f"local: {given.resolve().name}")
            if given is not None
            else _fetched(row, downloads, console)
        )
    except DataError as error:  # of the same kind, so that the caller knows whether others can be had
        raise type(error)(
            f"the data set {name!r} could not be fetched: {error}. {manual_download_hint(name, row)}"
        ) from None
    output.mkdir(parents=True, exist_ok=True)
    workplace = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=output))
    try:
        saved = _save(
            name,
            row,
            _unpacked(originals, row, workplace / "unpacked"),
            workplace / "saved",
            save_format,
            console,
        )
        _describe(workplace / "saved", name, row, source, save_format, saved)
        if target.exists():
            target.replace(workplace / "before")
        (workplace / "saved").replace(target)
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
    shutil.rmtree(downloads, ignore_errors=True)
    return FetchedDataset(target, source, saved)


def _found(target: Path, save_format: SaveFormat) -> str | None:
    """Where a set that is there, whole and in this format, is from."""
    try:
        facts = json.loads((target / SOURCE_FILE).read_text(encoding="utf-8"))
        is_whole = all((target / file).stat().st_size == size for file, size in facts["files"].items())
        return str(facts["source"]) if is_whole and facts["format"] == save_format else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _fetched(row: DatasetEntry, folder: Path, console: Console | None) -> tuple[Path, str]:
    """(folder with the originals, what stands for their version)."""
    files, source = list_remote_files(row)
    token = None
    if row.hub is not None:
        from huggingface_hub import get_token

        token = get_token()
    needed = sum(file.size or 0 for file in files)
    if console is not None:
        size = f", {needed / 1e6:.1f} MB" if needed else ""
        console.print(
            f"fetching {len(files)} {'file' if len(files) == 1 else 'files'}{size} from {source}",
            highlight=False,
            markup=False,
        )
    folder.mkdir(parents=True, exist_ok=True)
    if needed > shutil.disk_usage(folder).free:
        raise DataError(
            f"its files have {needed / 1e9:.1f} GB, {shutil.disk_usage(folder).free / 1e9:.1f} GB are free"
        )
    for file in files:
        download(file, folder, console, token)
    return folder, source


def _unpacked(originals: Path, row: DatasetEntry, folder: Path) -> Path:
    """The folder (or file) to read: archives among the originals are opened, and of them only the files that
    are text are kept.
    """
    if not originals.exists():
        raise DataError(f"the input {originals} does not exist; give the folder with the data set's files")
    files = (
        [originals]
        if originals.is_file()
        else sorted(path for path in originals.rglob("*") if path.is_file())
    )
    archives = [file for file in files if row.members and is_archive(file)]
    if not archives:
        return originals
    for number, archive in enumerate(archives):
        unpacked = extract(archive, folder / str(number))
        for file in [path for path in unpacked.rglob("*") if path.is_file()]:
            name = file.relative_to(unpacked).as_posix()
            if not any(fnmatch.fnmatchcase(name, pattern) for pattern in row.members):
                file.unlink()
    return folder


def _save(
    name: str,
    row: DatasetEntry,
    folder: Path,
    target: Path,
    save_format: SaveFormat,
    console: Console | None,
) -> SaveSummary:
    source = FileSource(folder, row.text_column)
    target.mkdir()
    with ByteProgress(console, f"writing {name}", source.size()) as progress:
        if save_format == "txt" and all(file.suffix in TEXT_SUFFIXES for file in source.files()):
            saved = _copy(source, target, progress)  # they are what is asked for, line breaks and all
        else:
            saved = save_documents(source.read_chunks(), target, save_format, progress)
    if not saved.kept:
        counts = (
            ", ".join(f"{count} {reason}" for reason, count in saved.rejected.items())
            or "no documents at all"
        )
        raise DataError(
            f"nothing usable in the files of {name}: {counts}{' — ' + '; '.join(saved.examples) if saved.examples else ''}"
        )
    return saved


def _copy(source: FileSource, target: Path, progress: ByteProgress) -> SaveSummary:
    """Text files as they are, one document each; those that cannot be used are left out."""
    saved = SaveSummary()
    root = source.path.parent if source.path.is_file() else source.path
    for file in source.files():
        rejected = next(
            (reading for reading in FileSource(file).read_chunks() if isinstance(reading, Rejected)), None
        )
        progress.advance(file.stat().st_size)
        if rejected is not None:
            saved.reject(rejected)
            continue
        name = file.relative_to(root).with_suffix(".txt").as_posix()
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / name)
        saved.files.append(name)
        saved.kept, saved.size = saved.kept + 1, saved.size + file.stat().st_size
    return saved


def _describe(
    folder: Path, name: str, row: DatasetEntry, source: str, save_format: SaveFormat, saved: SaveSummary
) -> None:
    facts = {
        "name": name,
        "source": source,
        "page": row.page,
        "licence": row.licence,
        "format": save_format,
        "documents": saved.kept,
        "rejected": dict(sorted(saved.rejected.items())),
        "files": {file: (folder / file).stat().st_size for file in saved.files},
    }
    (folder / SOURCE_FILE).write_text(
        json.dumps(facts, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
    )
