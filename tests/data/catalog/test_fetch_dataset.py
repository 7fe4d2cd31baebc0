"""Datasets of the catalog are fetched from a test hub and server, from local folders and from archives."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_trainer.data.catalog import http_download, writers
from llm_trainer.data.catalog.fetch_dataset import SOURCE_FILE, fetch_dataset
from llm_trainer.data.catalog.http_download import NoConnectionError, RemoteFile
from llm_trainer.data.catalog.registry import (
    DATASETS,
    DatasetEntry,
    list_remote_files,
    manual_download_hint,
    select_datasets,
)
from llm_trainer.data.sources import file_io
from llm_trainer.data.sources.base import Rejected, TextChunk
from llm_trainer.data.sources.file_source import KIND_BY_SUFFIX, FileSource
from llm_trainer.errors import DataError, UsageError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TEXTS = ["the first", "the second\nwith a break", "das dritte, ä"]


def parquet_of(texts: list[str | None], column: str = "text") -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({column: texts, "id": list(range(len(texts)))}), buffer)
    return buffer.getvalue()


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """Path → contents of the files of a server, which also gives the hub's two answers about a dataset."""
    files: dict[str, bytes] = {}
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(http_download, "_FIRST_PAUSE_SECONDS", 0.001)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path.startswith("/api/datasets/someone/corpus/revision/"):
                self.send(json.dumps({"id": "someone/corpus", "sha": COMMIT}).encode(), "application/json")
            elif path.startswith(f"/api/datasets/someone/corpus/tree/{COMMIT}"):
                self.send(
                    json.dumps(
                        [self.file_entry(name) for name in files if not name.startswith("/")]
                    ).encode(),
                    "application/json",
                )
            else:
                content = files.get(
                    path.removeprefix(f"/datasets/someone/corpus/resolve/{COMMIT}/"), files.get(path)
                )
                self.send(content, "application/octet-stream") if content is not None else self.send_error(
                    404
                )

        def file_entry(self, name: str) -> dict[str, object]:
            sha256 = hashlib.sha256(files[name]).hexdigest()
            large = {"oid": sha256, "size": len(files[name]), "pointerSize": 100}
            return {"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40, "lfs": large}

        def send(self, content: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{running.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "")
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    yield files
    running.shutdown()
    running.server_close()


def on_hub(**more: object) -> DatasetEntry:
    facts: dict[str, object] = {"hub": "someone/corpus", "patterns": ("data/train-*.parquet",), **more}
    return DatasetEntry("a corpus", 0.001, "CC0", "https://example.org", "made up", **facts)  # type: ignore[arg-type]


def read(folder: Path) -> list[str]:
    return [item.text for item in FileSource(folder).read_chunks() if isinstance(item, TextChunk)]


def test_a_hub_dataset_is_downloaded_read_and_saved(tmp_path: Path, served: dict[str, bytes]) -> None:
    served["data/train-00000.parquet"] = parquet_of([*TEXTS[:2], None])
    served["data/train-00001.parquet"] = parquet_of(TEXTS[2:])
    served["data/test-00000.parquet"] = parquet_of(["not this"])
    fetched = fetch_dataset("corpus", on_hub(), tmp_path, "parquet")
    assert fetched.saved is not None
    assert (fetched.saved.kept, dict(fetched.saved.rejected)) == (3, {"no text in the column 'text'": 1})
    assert fetched.source == f"someone/corpus@{COMMIT}"
    assert read(tmp_path / "corpus") == TEXTS
    assert read(tmp_path) == TEXTS, "hidden files and downloads are not read as data"
    assert not (tmp_path / ".downloads" / "corpus").exists()
    facts = json.loads((tmp_path / "corpus" / SOURCE_FILE).read_text(encoding="utf-8"))
    assert (facts["documents"], facts["licence"], facts["source"]) == (3, "CC0", f"someone/corpus@{COMMIT}")


def test_an_existing_set_is_not_downloaded_again_unless_it_is_damaged_or_of_another_format(
    tmp_path: Path, served: dict[str, bytes]
) -> None:
    served["data/train-00000.parquet"] = parquet_of(TEXTS)  # type: ignore[arg-type]
    fetch_dataset("corpus", on_hub(), tmp_path, "jsonl")
    content = served.pop("data/train-00000.parquet")
    assert fetch_dataset("corpus", on_hub(), tmp_path, "jsonl").saved is None
    with pytest.raises(DataError, match="has no files"):
        fetch_dataset("corpus", on_hub(), tmp_path, "parquet")
    (tmp_path / "corpus" / "train-00000.jsonl").write_text("cut", encoding="utf-8")
    served["data/train-00000.parquet"] = content
    assert fetch_dataset("corpus", on_hub(), tmp_path, "jsonl").saved is not None
    assert read(tmp_path / "corpus") == TEXTS


@pytest.mark.parametrize("save_format", ["parquet", "jsonl", "txt"])
def test_every_format_has_the_documents(tmp_path: Path, save_format: writers.SaveFormat) -> None:
    originals = tmp_path / "originals"
    originals.mkdir()
    (originals / "a.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, "", "nul \0"]), encoding="utf-8"
    )
    fetched = fetch_dataset("corpus", on_hub(), tmp_path / "raw", save_format, local_copy=originals)
    saved = fetched.saved
    assert saved is not None
    assert saved.kept + saved.rejected.total() == 5
    expected = [text.replace("\n", " ") for text in TEXTS] if save_format == "txt" else TEXTS
    source = FileSource(fetched.folder, one_document_per_line=True)
    assert [r.text for r in source.read_chunks() if isinstance(r, TextChunk)] == expected
    assert saved.broken_lines == (save_format == "txt")
    assert saved.size == sum(len(text.encode()) for text in expected)


def test_large_sets_are_saved_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writers, "SHARD_BYTES", 1000)
    monkeypatch.setattr(writers, "_ROW_GROUP_BYTES", 300)
    texts = [f"text {number} " * 10 for number in range(50)]
    (tmp_path / "a.json").write_text(json.dumps(texts), encoding="utf-8")
    fetched = fetch_dataset("corpus", on_hub(), tmp_path / "raw", "parquet", local_copy=tmp_path / "a.json")
    assert fetched.saved is not None
    assert len(fetched.saved.files) == 4
    assert pq.ParquetFile(fetched.folder / "train-00000.parquet").num_row_groups > 2
    assert read(fetched.folder) == texts


def test_text_files_are_copied_unchanged_for_txt(tmp_path: Path) -> None:
    originals = tmp_path / "originals"
    (originals / "deep").mkdir(parents=True)
    (originals / "a.md").write_text("# One\n\nline\n", encoding="utf-8")
    (originals / "deep" / "b.txt").write_bytes("zwei ä\n".encode())
    (originals / "c.txt").write_bytes(b"\xff")
    fetched = fetch_dataset("corpus", on_hub(), tmp_path / "raw", "txt", local_copy=originals)
    assert fetched.saved is not None
    assert (fetched.saved.kept, dict(fetched.saved.rejected)) == (2, {"not utf-8": 1})
    assert (fetched.folder / "a.txt").read_text(encoding="utf-8") == "# One\n\nline\n"
    assert (fetched.folder / "deep" / "b.txt").read_text(encoding="utf-8") == "zwei ä\n"


def test_archives_are_unpacked_and_only_their_texts_are_read(
    tmp_path: Path, served: dict[str, bytes]
) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as opened:
        for name, content in (
            ("set/train/a.txt", b"one"),
            ("set/train/b.txt", b"two"),
            ("set/README.txt", b"about"),
            ("set/x.md", b"no"),
        ):
            facts = tarfile.TarInfo(name)
            facts.size = len(content)
            opened.addfile(facts, io.BytesIO(content))
    served["/set.tar.gz"] = gzip.compress(buffer.getvalue())
    url = f"{huggingface_hub.constants.ENDPOINT}/set.tar.gz"
    entry = on_hub(hub=None, urls=(RemoteFile(url, "set.tar.gz"),), members=("set/train/*.txt",))
    assert read(fetch_dataset("set", entry, tmp_path, "jsonl").folder) == ["one", "two"]
    hostile = io.BytesIO()
    with zipfile.ZipFile(hostile, "w") as zipped:
        zipped.writestr("../outside.txt", "bad")
    (tmp_path / "given.zip").write_bytes(hostile.getvalue())
    with pytest.raises(DataError, match="is rejected"):
        fetch_dataset("set", entry, tmp_path, "jsonl", local_copy=tmp_path / "given.zip")
    assert read(tmp_path / "set") == ["one", "two"], "the existing set is kept"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".set")]


def test_an_interrupted_download_is_resumed_by_the_next_run(tmp_path: Path, served: dict[str, bytes]) -> None:
    served["data/train-00000.parquet"] = parquet_of(TEXTS)  # type: ignore[arg-type]
    served["data/train-00001.parquet"] = parquet_of(["other"])
    done = tmp_path / ".downloads" / "corpus" / "data" / "train-00000.parquet"
    done.parent.mkdir(parents=True)
    done.write_bytes(served["data/train-00000.parquet"])
    part = done.with_name("train-00001.parquet.part")
    part.write_bytes(served["data/train-00001.parquet"][:10])
    assert read(fetch_dataset("corpus", on_hub(), tmp_path, "parquet").folder) == [*TEXTS, "other"]


def test_without_a_network_the_error_names_the_set_and_how_to_supply_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(http_download, "_FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(
        NoConnectionError,
        match=r"'corpus' could not be downloaded.*hf download someone/corpus.*--datasets corpus "
        r"--input FOLDER",
    ):
        fetch_dataset("corpus", on_hub(), tmp_path, "parquet")
    entry = on_hub(hub=None, urls=(RemoteFile("http://127.0.0.1:9/x.txt", "x.txt"),))
    with pytest.raises(
        NoConnectionError,
        match=r"'corpus' could not be downloaded.*download http://127\.0\.0\.1:9/x\.txt into a folder",
    ):
        fetch_dataset("corpus", entry, tmp_path, "parquet")
    assert not (tmp_path / "corpus").exists()


def test_a_set_with_nothing_usable_is_an_error_and_leaves_no_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n', encoding="utf-8")
    with pytest.raises(
        DataError, match="no usable documents in the files of corpus: 1 no text in the column"
    ):
        fetch_dataset("corpus", on_hub(), tmp_path / "raw", "parquet", local_copy=tmp_path / "a.jsonl")
    assert list((tmp_path / "raw").iterdir()) == []
    with pytest.raises(DataError, match="nowhere does not exist"):
        fetch_dataset("corpus", on_hub(), tmp_path / "raw", "parquet", local_copy=tmp_path / "nowhere")


def test_a_document_too_long_for_a_record_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_io, "MAX_RECORD_BYTES", 10)
    items = [
        TextChunk("12345", False),
        TextChunk("678"),
        TextChunk("123456", False),
        TextChunk("123456", False),
        TextChunk("1"),
        TextChunk("end"),
    ]
    texts = list(writers.join_chunks(iter(items)))
    assert texts[0] == "12345678"
    assert isinstance(texts[1], Rejected)
    assert texts[2] == "end"


def test_entries_of_the_catalog_are_complete() -> None:
    for name, entry in DATASETS.items():
        assert name == name.lower().replace("-", "_")
        assert all((entry.about, entry.licence, entry.verified))
        assert entry.page.startswith("https://")
        assert (entry.hub is None) == bool(entry.urls)
        assert (entry.hub is None) != bool(entry.patterns)
        assert all(url.url.startswith("https://") for url in entry.urls)
        assert name in manual_download_hint(name, entry)
        readable = [
            pattern.removesuffix(".gz")
            for pattern in (
                *entry.patterns,
                *entry.members,
                *(url.name for url in entry.urls if not entry.members),
            )
        ]
        assert all(Path(pattern).suffix in KIND_BY_SUFFIX for pattern in readable)
    assert sum(entry.gigabytes for entry in select_datasets([]).values()) < 2, "the default download is small"


def test_datasets_are_selected_by_name() -> None:
    assert list(select_datasets(["tinystories", "tiny_shakespeare"])) == ["tinystories", "tiny_shakespeare"]
    assert select_datasets(["all"]) == DATASETS
    with pytest.raises(UsageError, match=r"no dataset 'tinystory'; did you mean tinystories.*--list"):
        select_datasets(["tinystory"])


def test_files_on_the_hub_are_listed_with_size_hash_and_commit(served: dict[str, bytes]) -> None:
    served["data/train-0 ä.parquet"] = b"content"
    files, version = list_remote_files(on_hub())
    assert version == f"someone/corpus@{COMMIT}"
    assert files == [
        RemoteFile(files[0].url, "data/train-0 ä.parquet", 7, hashlib.sha256(b"content").hexdigest())
    ]
    assert f"resolve/{COMMIT}/data/train-0%20%C3%A4.parquet" in files[0].url
    assert DATASETS["openwebtext"].revision == "refs/convert/parquet"
