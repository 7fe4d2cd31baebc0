"""Records with all their fields, from local files: what a domain loader reads in place of the hub.

`files.py` reads one column as documents; here a text is made of several fields, some of which are lists. The kinds are those that data
sets are downloaded in: JSON lines, JSON, CSV, parquet and arrow, the first three compressed or not.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from llm_trainer.data.sources import file_io as storage
from llm_trainer.data.sources.base import Rejected
from llm_trainer.data.sources.file_io import COMPRESSIONS, FileRange, compression_suffix
from llm_trainer.data.sources.text_files import decode_line
from llm_trainer.errors import DataError

RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_LARGEST_JSON = 8 * storage.MAX_RECORD_BYTES
_ROWS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Record:
    """One record: its fields, and where it stands (`part` is the file, or the part of the data set on the
    hub).
    """

    fields: Mapping[str, object]
    part: str
    where: str


def read_local_records(path: Path) -> Iterator[Record | Rejected]:
    """Every record of a file, or of every file of a known kind in a folder, by relative path.

    What cannot be read is set aside with its reason; raises DataError where there is nothing to read.
    """
    for file in find_record_files(path):
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        try:
            yield from _READERS[_suffix(file)](FileRange(file, name))
        except storage.READ_ERRORS as error:
            yield Rejected("unreadable file", f"{name}: {error}")


def find_record_files(path: Path) -> list[Path]:
    """The files to read; raises DataError where the path is missing or holds none of a known kind."""
    if path.is_file() and _suffix(path) in RECORD_SUFFIXES:
        return [path]
    found = [
        file
        for file in path.rglob("*")
        if file.is_file() and _suffix(file) in RECORD_SUFFIXES and not _is_hidden(file, path)
    ]
    if not found:
        kinds = f"{', '.join(RECORD_SUFFIXES)} (text also with {', '.join(COMPRESSIONS)})"
        what = "holds no records" if path.exists() else "does not exist"
        raise DataError(f"{path} {what}; give a file of one of these kinds or a folder of them: {kinds}")
    return sorted(found, key=lambda file: file.relative_to(path).as_posix())


def _is_hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _suffix(file: Path) -> str:
    return (Path(file.stem) if compression_suffix(file) else file).suffix.lower()


def _json_lines(extent: FileRange) -> Iterator[Record | Rejected]:
    for where, offset, line in storage.read_lines(extent):
        if line is not None and not line.strip():
            continue
        text = decode_line(where, offset, line)
        yield text if isinstance(text, Rejected) else _parsed(text, extent.name, where)


def _parsed(text: str, part: str, where: str) -> Record | Rejected:
    try:
        value: JsonValue = json.loads(text)
    except (ValueError, RecursionError):
        return Rejected("not JSON", where, text)
    return _record(value, part, where)


def _record(value: JsonValue, part: str, where: str) -> Record | Rejected:
    return Record(value, part, where) if isinstance(value, dict) else Rejected("no record", where)


def _json(extent: FileRange) -> Iterator[Record | Rejected]:
    """A list of records, one record, or, as some write it, a record a line."""
    with extent.open() as opened:
        raw = opened.read(_LARGEST_JSON + 1)
    if len(raw) > _LARGEST_JSON:
        yield Rejected(
            f".json longer than {_LARGEST_JSON >> 20} MB",
            f"{extent.name}: write it as .jsonl, one record a line",
        )
        return
    try:
        value: JsonValue = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        yield Rejected("not utf-8", f"{extent.name}, byte {error.start}")
    except (ValueError, RecursionError):
        yield from _json_lines(extent)
    else:
        for index, record in enumerate(value if isinstance(value, list) else [value]):
            yield _record(record, extent.name, f"{extent.name}, record {index}")


def _csv(extent: FileRange) -> Iterator[Record | Rejected]:
    delimiter = "\t" if _suffix(extent.path) == ".tsv" else ","
    with extent.open() as opened:
        rows = csv.DictReader(io.TextIOWrapper(opened, encoding="utf-8-sig", newline=""), delimiter=delimiter)
        index = 0
        try:
            for index, row in enumerate(rows):
                yield Record(
                    {name: value for name, value in row.items() if name is not None},
                    extent.name,
                    f"{extent.name}, row {index}",
                )
        except csv.Error as error:
            yield Rejected("not CSV", f"{extent.name}, after row {index}: {error}")
        except UnicodeDecodeError as error:
            yield Rejected("not utf-8", f"{extent.name}, after row {index}: {error.reason}")


def _parquet(extent: FileRange) -> Iterator[Record | Rejected]:
    _require_pyarrow(extent.name)
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(extent.path) as table:
            yield from _batches(table.iter_batches(_ROWS_AT_ONCE), extent)
    except pa.ArrowException as error:
        yield Rejected("unreadable file", f"{extent.name}: {str(error).splitlines()[0]}")


def _arrow(extent: FileRange) -> Iterator[Record | Rejected]:
    _require_pyarrow(extent.name)
    import pyarrow as pa

    try:
        with pa.memory_map(str(extent.path)) as mapped:
            try:
                opened = pa.ipc.open_file(mapped)
                batches = (opened.get_batch(index) for index in range(opened.num_record_batches))
            except pa.ArrowInvalid:
                mapped.seek(0)
                batches = iter(pa.ipc.open_stream(mapped))
            yield from _batches(batches, extent)
    except pa.ArrowException as error:
        yield Rejected("unreadable file", f"{extent.name}: {str(error).splitlines()[0]}")


def _batches(batches: Iterator[object], extent: FileRange) -> Iterator[Record | Rejected]:
    index = 0
    for batch in batches:
        for row in batch.to_pylist():  # type: ignore[attr-defined]
            yield Record(row, extent.name, f"{extent.name}, row {index}")
            index += 1


def _require_pyarrow(name: str) -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise DataError(f"reading {name} needs the extra 'hub': pip install 'llm-trainer[hub]'") from None


_READERS = {
    ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet, ".arrow": _arrow,
}  # fmt: skip
