"""Records with all their fields from local files, which domain loaders read instead of the hub.

`file_source.py` reads one column as documents. Here a text is made of several fields, some of which are
lists, so complete records are yielded. The formats are those that datasets are downloaded in: JSON lines,
JSON, CSV, parquet and arrow, of which the first three may be compressed. Each format is read by the module
that also reads its columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from llm_trainer.data.sources import file_io
from llm_trainer.data.sources.base import Record, Rejected
from llm_trainer.data.sources.csv_files import read_csv_records
from llm_trainer.data.sources.file_io import COMPRESSIONS, FileRange, format_suffix
from llm_trainer.data.sources.json_files import read_json_lines_records, read_json_records
from llm_trainer.data.sources.parquet_arrow import read_arrow_records, read_parquet_records
from llm_trainer.errors import DataError

RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_READERS: Mapping[str, Callable[[FileRange], Iterator[Record | Rejected]]] = {
    ".jsonl": read_json_lines_records,
    ".ndjson": read_json_lines_records,
    ".json": read_json_records,
    ".csv": read_csv_records,
    ".tsv": read_csv_records,
    ".parquet": read_parquet_records,
    ".arrow": read_arrow_records,
}


def read_local_records(path: Path) -> Iterator[Record | Rejected]:
    """Yield every record of a file, or of every file of a known format in a folder, by relative path.

    What cannot be read is yielded as rejected, with its reason.

    Raises:
        DataError: There is nothing to read.
    """
    for file in find_record_files(path):
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        try:
            yield from _READERS[format_suffix(file)](FileRange(file, name))
        except file_io.READ_ERRORS as error:
            yield Rejected("unreadable file", f"{name}: {error}")


def find_record_files(path: Path) -> list[Path]:
    """Return the files to read, hidden ones excluded.

    Raises:
        DataError: The path does not exist, or has no file of a known format.
    """
    if path.is_file() and format_suffix(path) in RECORD_SUFFIXES:
        return [path]
    found = [
        file
        for file in path.rglob("*")
        if file.is_file() and format_suffix(file) in RECORD_SUFFIXES and not _is_hidden(file, path)
    ]
    if not found:
        kinds = f"{', '.join(RECORD_SUFFIXES)} (text formats also with {', '.join(COMPRESSIONS)})"
        problem = "has no records" if path.exists() else "does not exist"
        raise DataError(f"{path} {problem}; give a file of one of these formats or a folder of them: {kinds}")
    return sorted(found, key=lambda file: file.relative_to(path).as_posix())


def _is_hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)
