"""Data sets of the catalogue from a hub and a server made here, from local folders and from archives."""

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

from llm_trainer.data.catalog import http_download as downloads
from llm_trainer.data.catalog import registry as catalogue
from llm_trainer.data.catalog import writers as saving
from llm_trainer.data.catalog.fetch_dataset import SOURCE_FILE, fetch_dataset
from llm_trainer.data.catalog.http_download import NoConnectionError, RemoteFile
from llm_trainer.data.catalog.registry import (
    DATASETS,
    DatasetEntry,
    list_remote_files,
    manual_download_hint,
    select_datasets,
)
from llm_trainer.data.sources import file_io as storage
from llm_trainer.data.sources.base import Rejected, TextChunk
from llm_trainer.data.sources.file_source import KIND_BY_SUFFIX, FileSource
from llm_trainer.errors import DataError, UsageError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TEXTS = ["the first", "the second\nwith a break", "das dritte, ä"]


def parquet_of(texts: list[str | None], column: str = "text") -> bytes:
    made = io.BytesIO()
    pq.write_table(pa.table({column: texts, "id": list(range(len(texts)))}), made)
    return made.getvalue()


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """Path → contents, as a server with the hub's two answers about a data set gives them; "url" says where,
    "asked" what was asked.
    """
    files: dict[str, bytes] = {}
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(downloads, "_FIRST_PAUSE_SECONDS", 0.001)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path.startswith("/api/datasets/someone/corpus/revision/"):
                self.send(json.dumps({"id": "someone/corpus", "sha": COMMIT}).encode(), "application/json")
            elif path.startswith(f"/api/datasets/someone/corpus/tree/{COMMIT}"):
                self.send(
                    json.dumps([self.entry(name) for name in files if not name.startswith("/")]).encode(),
                    "application/json",
                )
            else:
                content = files.get(
                    path.removeprefix(f"/datasets/someone/corpus/resolve/{COMMIT}/"), files.get(path)
                )
                self.send(content, "application/octet-stream") if content is not None else self.send_error(
                    404
                )

        def entry(self, name: str) -> dict[str, object]:
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
    return DatasetEntry("a corpus", 0.001, "CC0", "https://example.org", "made here", **facts)  # type: ignore[arg-type]


def read(folder: Path) -> list[str]:
    return [reading.text for reading in FileSource(folder).read_chunks() if isinstance(reading, TextChunk)]


def test_a_data_set_of_the_hub_is_fetched_read_and_saved(tmp_path: Path, served: dict[str, bytes]) -> None:
    served["data/train-00000.parquet"] = parquet_of([*TEXTS[:2], None])
    served["data/train-00001.parquet"] = parquet_of(TEXTS[2:])
    served["data/test-00000.parquet"] = parquet_of(["not this"])
    collected = fetch_dataset("corpus", on_hub(), tmp_path, "parquet")
    assert collected.saved is not None
    assert (collected.saved.kept, dict(collected.saved.rejected)) == (3, {"no text in the column 'text'": 1})
    assert collected.source == f"someone/corpus@{COMMIT}"
    assert read(tmp_path / "corpus") == TEXTS
    assert read(tmp_path) == TEXTS, "hidden files and what was downloaded are not read as data"
    assert not (tmp_path / ".downloads" / "corpus").exists()
    facts = json.loads((tmp_path / "corpus" / SOURCE_FILE).read_text(encoding="utf-8"))
    assert (facts["documents"], facts["licence"], facts["source"]) == (3, "CC0", f"someone/corpus@{COMMIT}")


def test_what_is_there_is_not_fetched_again_unless_it_is_damaged_or_another_format(
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
def test_every_format_holds_the_documents(tmp_path: Path, save_format: saving.SaveFormat) -> None:
    originals = tmp_path / "originals"
    originals.mkdir()
    (originals / "a.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, "", "nul \0"]), encoding="utf-8"
    )
    collected = fetch_dataset("corpus", on_hub(), tmp_path / "raw", save_format, given=originals)
    saved = collected.saved
    assert saved is not None
    assert saved.kept + saved.rejected.total() == 5
    expected = [text.replace("\n", " ") for text in TEXTS] if save_format == "txt" else TEXTS
    source = FileSource(collected.folder, one_document_per_line=True)
    assert [r.text for r in source.read_chunks() if isinstance(r, TextChunk)] == expected
    assert saved.broken_lines == (save_format == "txt")
    assert saved.size == sum(len(text.encode()) for text in expected)


def test_large_sets_are_saved_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "SHARD_BYTES", 1000)
    monkeypatch.setattr(saving, "_ROW_GROUP_BYTES", 300)
    texts = [f"text {number} " * 10 for number in range(50)]
    (tmp_path / "a.json").write_text(json.dumps(texts), encoding="utf-8")
    collected = fetch_dataset("corpus", on_hub(), tmp_path / "raw", "parquet", given=tmp_path / "a.json")
    assert collected.saved is not None
    assert len(collected.saved.files) == 4
    assert pq.ParquetFile(collected.folder / "train-00000.parquet").num_row_groups > 2
    assert read(collected.folder) == texts


def test_text_files_are_kept_as_they_are_where_txt_is_wanted(tmp_path: Path) -> None:
    originals = tmp_path / "originals"
    (originals / "deep").mkdir(parents=True)
    (originals / "a.md").write_text("# One\n\nline\n", encoding="utf-8")
    (originals / "deep" / "b.txt").write_bytes("zwei ä\n".encode())
    (originals / "c.txt").write_bytes(b"\xff")
    collected = fetch_dataset("corpus", on_hub(), tmp_path / "raw", "txt", given=originals)
    assert collected.saved is not None
    assert (collected.saved.kept, dict(collected.saved.rejected)) == (2, {"not utf-8": 1})
    assert (collected.folder / "a.txt").read_text(encoding="utf-8") == "# One\n\nline\n"
    assert (collected.folder / "deep" / "b.txt").read_text(encoding="utf-8") == "zwei ä\n"


def test_archives_are_opened_and_only_their_texts_taken(tmp_path: Path, served: dict[str, bytes]) -> None:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as opened:
        for name, content in (
            ("set/train/a.txt", b"one"),
            ("set/train/b.txt", b"two"),
            ("set/README.txt", b"about"),
            ("set/x.md", b"no"),
        ):
            facts = tarfile.TarInfo(name)
            facts.size = len(content)
            opened.addfile(facts, io.BytesIO(content))
    served["/set.tar.gz"] = gzip.compress(made.getvalue())
    url = f"{huggingface_hub.constants.ENDPOINT}/set.tar.gz"
    row = on_hub(hub=None, urls=(RemoteFile(url, "set.tar.gz"),), members=("set/train/*.txt",))
    assert read(fetch_dataset("set", row, tmp_path, "jsonl").folder) == ["one", "two"]
    hostile = io.BytesIO()
    with zipfile.ZipFile(hostile, "w") as zipped:
        zipped.writestr("../outside.txt", "bad")
    (tmp_path / "given.zip").write_bytes(hostile.getvalue())
    with pytest.raises(DataError, match="is refused"):
        fetch_dataset("set", row, tmp_path, "jsonl", given=tmp_path / "given.zip")
    assert read(tmp_path / "set") == ["one", "two"], "what was there stays"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".set")]


def test_a_download_that_broke_off_goes_on_in_the_next_run(tmp_path: Path, served: dict[str, bytes]) -> None:
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
    monkeypatch.setattr(downloads, "_FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(
        NoConnectionError,
        match=r"'corpus' could not be fetched.*hf download someone/corpus.*--datasets corpus --input FOLDER",
    ):
        fetch_dataset("corpus", on_hub(), tmp_path, "parquet")
    row = on_hub(hub=None, urls=(RemoteFile("http://127.0.0.1:9/x.txt", "x.txt"),))
    with pytest.raises(
        NoConnectionError,
        match=r"'corpus' could not be fetched.*fetch http://127\.0\.0\.1:9/x\.txt into a folder",
    ):
        fetch_dataset("corpus", row, tmp_path, "parquet")
    assert not (tmp_path / "corpus").exists()


def test_a_set_with_nothing_usable_in_it_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="nothing usable in the files of corpus: 1 no text in the column"):
        fetch_dataset("corpus", on_hub(), tmp_path / "raw", "parquet", given=tmp_path / "a.jsonl")
    assert list((tmp_path / "raw").iterdir()) == []
    with pytest.raises(DataError, match="nowhere does not exist"):
        fetch_dataset("corpus", on_hub(), tmp_path / "raw", "parquet", given=tmp_path / "nowhere")


def test_a_document_too_long_for_a_record_is_rejected_and_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "LONGEST_RECORD", 10)
    readings = [
        TextChunk("12345", False),
        TextChunk("678"),
        TextChunk("123456", False),
        TextChunk("123456", False),
        TextChunk("1"),
        TextChunk("end"),
    ]
    texts = list(saving.join_chunks(iter(readings)))
    assert texts[0] == "12345678"
    assert isinstance(texts[1], Rejected)
    assert texts[2] == "end"


def test_rows_of_the_catalogue_are_complete() -> None:
    for name, row in DATASETS.items():
        assert name == name.lower().replace("-", "_")
        assert all((row.about, row.licence, row.verified))
        assert row.page.startswith("https://")
        assert (row.hub is None) == bool(row.urls)
        assert (row.hub is None) != bool(row.patterns)
        assert all(url.url.startswith("https://") for url in row.urls)
        assert name in manual_download_hint(name, row)
        readable = [
            pattern.removesuffix(".gz")
            for pattern in (*row.patterns, *row.members, *(url.name for url in row.urls if not row.members))
        ]
        assert all(Path(pattern).suffix in KIND_BY_SUFFIX for pattern in readable)
    assert sum(row.gigabytes for row in select_datasets([]).values()) < 2, (
        "what is fetched where none is named stays small"
    )


def test_names_are_chosen_from_the_catalogue() -> None:
    assert list(select_datasets(["tinystories", "tiny_shakespeare"])) == ["tinystories", "tiny_shakespeare"]
    assert select_datasets(["all"]) == DATASETS
    with pytest.raises(UsageError, match=r"no data set 'tinystory'; did you mean tinystories.*--list"):
        select_datasets(["tinystory"])


def test_files_of_the_hub_come_with_size_hash_and_commit(served: dict[str, bytes]) -> None:
    served["data/train-0 ä.parquet"] = b"content"
    files, version = list_remote_files(on_hub())
    assert version == f"someone/corpus@{COMMIT}"
    assert files == [
        RemoteFile(files[0].url, "data/train-0 ä.parquet", 7, hashlib.sha256(b"content").hexdigest())
    ]
    assert f"resolve/{COMMIT}/data/train-0%20%C3%A4.parquet" in files[0].url
    assert catalogue.DATASETS["openwebtext"].revision == "refs/convert/parquet"
