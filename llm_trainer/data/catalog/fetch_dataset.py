"""Fetches a dataset of the catalog: downloads it or takes a local copy, unpacks it, and saves it.

`<output>/<name>/` appears only when it is complete. A hidden `.source.json` in it records where its files
come from and how many documents were kept and rejected, so that a second call finds the set already there.
The downloaded originals stay in `<output>/.downloads/<name>/` until the set is saved, so that an interrupted
download can be resumed.
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
    """A dataset that is on the disk.

    Attributes:
        folder: Its folder.
        source: Where it comes from: an address, a commit on the hub, or a local path.
        saved: How many documents were saved; None if the set was already there.
    """

    folder: Path
    source: str
    saved: SaveSummary | None


def fetch_dataset(
    name: str,
    entry: DatasetEntry,
    output: Path,
    save_format: SaveFormat,
    *,
    local_copy: Path | None = None,
    console: Console | None = None,
) -> FetchedDataset:
    """Create `<output>/<name>/`, unless it is already there in this format.

    Args:
        name: The dataset's name in the catalog.
        entry: Its entry in the catalog.
        output: The folder of all datasets.
        save_format: The format of the files that are written.
        local_copy: A file or folder with the original files, which are then not downloaded.
        console: Where progress is shown.

    Raises:
        NoConnectionError: The server cannot be reached.
        DataError: The set cannot be downloaded or read. Both messages describe how to supply the set by hand.
    """
    target = output / name
    if local_copy is None and (source := _existing_source(target, save_format)) is not None:
        return FetchedDataset(target, source, None)
    downloads = output / _DOWNLOADS / name
    try:
        originals, source = (
            (local_copy, f"local: {local_copy.resolve().name}")
            if local_copy is not None
            else _download_originals(entry, downloads, console)
        )
    except DataError as error:  # re-raised as the same type, which shows whether other sets can be downloaded
        raise type(error)(
            f"the dataset {name!r} could not be downloaded: {error}. {manual_download_hint(name, entry)}"
        ) from None
    output.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=output))
    try:
        saved = _save(
            name,
            entry,
            _unpack(originals, entry, staging / "unpacked"),
            staging / "saved",
            save_format,
            console,
        )
        _write_source_file(staging / "saved", name, entry, source, save_format, saved)
        if target.exists():
            target.replace(staging / "before")
        (staging / "saved").replace(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    shutil.rmtree(downloads, ignore_errors=True)
    return FetchedDataset(target, source, saved)


def _existing_source(target: Path, save_format: SaveFormat) -> str | None:
    """The source of an existing set that is complete and in this format; else None."""
    try:
        facts = json.loads((target / SOURCE_FILE).read_text(encoding="utf-8"))
        is_complete = all((target / file).stat().st_size == size for file, size in facts["files"].items())
        return str(facts["source"]) if is_complete and facts["format"] == save_format else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _download_originals(entry: DatasetEntry, folder: Path, console: Console | None) -> tuple[Path, str]:
    """(folder with the original files, what identifies their version)."""
    files, source = list_remote_files(entry)
    token = None
    if entry.hub is not None:
        from huggingface_hub import get_token

        token = get_token()
    needed = sum(file.size or 0 for file in files)
    if console is not None:
        size = f", {needed / 1e6:.1f} MB" if needed else ""
        console.print(
            f"downloading {len(files)} {'file' if len(files) == 1 else 'files'}{size} from {source}",
            highlight=False,
            markup=False,
        )
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"its files have {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free in {folder}"
        )
    for file in files:
        download(file, folder, console, token)
    return folder, source


def _unpack(originals: Path, entry: DatasetEntry, folder: Path) -> Path:
    """The folder (or file) to read: archives are unpacked, and only their text files are kept."""
    if not originals.exists():
        raise DataError(f"the input {originals} does not exist; give the folder with the dataset's files")
    files = (
        [originals]
        if originals.is_file()
        else sorted(path for path in originals.rglob("*") if path.is_file())
    )
    archives = [file for file in files if entry.members and is_archive(file)]
    if not archives:
        return originals
    for number, archive in enumerate(archives):
        unpacked = extract(archive, folder / str(number))
        for file in [path for path in unpacked.rglob("*") if path.is_file()]:
            name = file.relative_to(unpacked).as_posix()
            if not any(fnmatch.fnmatchcase(name, pattern) for pattern in entry.members):
                file.unlink()
    return folder


def _save(
    name: str,
    entry: DatasetEntry,
    folder: Path,
    target: Path,
    save_format: SaveFormat,
    console: Console | None,
) -> SaveSummary:
    source = FileSource(folder, entry.text_column)
    target.mkdir()
    with ByteProgress(console, f"writing {name}", source.size()) as progress:
        if save_format == "txt" and all(file.suffix in TEXT_SUFFIXES for file in source.files()):
            saved = _copy(source, target, progress)  # they already are .txt files, with their line breaks
        else:
            saved = save_documents(source.read_chunks(), target, save_format, progress)
    if not saved.kept:
        counts = (
            ", ".join(f"{count} {reason}" for reason, count in saved.rejected.items())
            or "no documents at all"
        )
        examples = f" — {'; '.join(saved.examples)}" if saved.examples else ""
        raise DataError(f"no usable documents in the files of {name}: {counts}{examples}")
    return saved


def _copy(source: FileSource, target: Path, progress: ByteProgress) -> SaveSummary:
    """Copy text files unchanged, one document each, except for those that are rejected."""
    saved = SaveSummary()
    root = source.path.parent if source.path.is_file() else source.path
    for file in source.files():
        rejected = next((item for item in FileSource(file).read_chunks() if isinstance(item, Rejected)), None)
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


def _write_source_file(
    folder: Path, name: str, entry: DatasetEntry, source: str, save_format: SaveFormat, saved: SaveSummary
) -> None:
    facts = {
        "name": name,
        "source": source,
        "page": entry.page,
        "licence": entry.licence,
        "format": save_format,
        "documents": saved.kept,
        "rejected": dict(sorted(saved.rejected.items())),
        "files": {file: (folder / file).stat().st_size for file in saved.files},
    }
    (folder / SOURCE_FILE).write_text(
        json.dumps(facts, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
    )
