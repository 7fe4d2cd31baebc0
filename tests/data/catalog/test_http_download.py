"""Downloads from a test server that stops midway, changes its files, ignores ranges or returns errors."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from llm_trainer.data.catalog import http_download
from llm_trainer.data.catalog.http_download import NoConnectionError, RemoteFile, download
from llm_trainer.errors import DataError

TEXT = random.Random(1).randbytes(300_000)
SHA256 = hashlib.sha256(TEXT).hexdigest()


@dataclass
class Server:
    """What the server returns, how it misbehaves, and what was requested."""

    body: bytes = TEXT
    version: str | None = '"one"'
    supports_ranges: bool = True
    breaks_after: int | None = None  # bytes of each answer that arrive
    statuses: list[int] = field(default_factory=list)  # of the next answers
    requested_ranges: list[str | None] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)
    redirects_to: str | None = None
    url: str = ""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    state = Server()
    monkeypatch.setattr(http_download, "_FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.requested_ranges.append(self.headers.get("Range"))
            state.tokens.append(self.headers.get("Authorization"))
            if state.redirects_to is not None and self.path == "/file":
                self.send_response(302)
                self.send_header("Location", state.redirects_to)
                self.end_headers()
                return
            if state.statuses:
                self.send_error(state.statuses.pop(0))
                return
            self.answer()

        def answer(self) -> None:
            start = 0
            is_current = self.headers.get("If-Range") in (None, state.version)
            if state.supports_ranges and is_current and (requested := self.headers.get("Range")):
                start = int(requested.removeprefix("bytes=").removesuffix("-"))
                if start >= len(state.body):
                    self.send_error(416)
                    return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(state.body) - 1}/{len(state.body)}")
            if state.version is not None:
                self.send_header("ETag", state.version)
            rest = state.body[start:]
            self.send_header("Content-Length", str(len(rest)))
            self.end_headers()
            self.wfile.write(rest[: state.breaks_after])

        def log_message(self, *_: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{running.server_port}/file"
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    yield state
    running.shutdown()
    running.server_close()


def left(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_file_is_downloaded_once_and_verified(tmp_path: Path, server: Server) -> None:
    remote = RemoteFile(server.url, "deep/a.bin", len(TEXT), SHA256)
    assert download(remote, tmp_path).read_bytes() == TEXT
    assert left(tmp_path) == ["deep/a.bin"]
    download(remote, tmp_path)
    assert server.requested_ranges == [None]


@pytest.mark.parametrize("sha256", [SHA256, None])
@pytest.mark.parametrize("size", [len(TEXT), None])
def test_a_connection_that_ends_early_is_resumed_where_it_ended(
    tmp_path: Path, server: Server, size: int | None, sha256: str | None
) -> None:
    server.breaks_after = 70_000
    assert download(RemoteFile(server.url, "a.bin", size, sha256), tmp_path).read_bytes() == TEXT
    assert server.requested_ranges == [None, *(f"bytes={70_000 * count}-" for count in range(1, 5))]


def test_a_later_run_resumes_a_partial_file(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.breaks_after = 100_000
    monkeypatch.setattr(http_download, "_MAX_ATTEMPTS", 1)
    monkeypatch.setattr(http_download, "_MAX_FIRST_ATTEMPTS", 1)
    remote = RemoteFile(server.url, "a.bin", len(TEXT), SHA256)
    with pytest.raises(NoConnectionError, match="ended early"):
        download(remote, tmp_path)
    assert left(tmp_path) == ["a.bin.part", "a.bin.part.version"]
    server.breaks_after = None
    assert download(remote, tmp_path).read_bytes() == TEXT
    assert server.requested_ranges == [None, "bytes=100000-"]
    assert left(tmp_path) == ["a.bin"]


@pytest.mark.parametrize(
    ("version", "sha256"), [('"one"', None), ('"one"', SHA256), (None, SHA256), (None, None)]
)
def test_a_part_of_another_version_is_discarded(
    tmp_path: Path, server: Server, version: str | None, sha256: str | None
) -> None:
    server.version = version
    (tmp_path / "a.bin.part").write_bytes(b"x" * 1000)
    (tmp_path / "a.bin.part.version").write_text('"old"', encoding="utf-8") if version else None
    assert download(RemoteFile(server.url, "a.bin", None, sha256), tmp_path).read_bytes() == TEXT


def test_a_server_without_ranges_sends_the_complete_file(tmp_path: Path, server: Server) -> None:
    server.supports_ranges = False
    (tmp_path / "a.bin.part").write_bytes(TEXT[:1000])
    (tmp_path / "a.bin.part.version").write_text('"one"', encoding="utf-8")
    assert download(RemoteFile(server.url, "a.bin"), tmp_path).read_bytes() == TEXT


def test_a_part_that_is_already_complete_or_too_long_is_handled(tmp_path: Path, server: Server) -> None:
    for content in (TEXT, TEXT + b"more"):
        for size in (len(TEXT), None):
            (tmp_path / "a.bin.part").write_bytes(content)
            (tmp_path / "a.bin.part.version").write_text('"one"', encoding="utf-8")
            file = download(RemoteFile(server.url, "a.bin", size, SHA256), tmp_path)
            assert file.read_bytes() == TEXT
            file.unlink()


def test_unexpected_contents_are_not_kept(tmp_path: Path, server: Server) -> None:
    with pytest.raises(DataError, match="sha256 differs"):
        download(RemoteFile(server.url, "a.bin", None, "0" * 64), tmp_path)
    with pytest.raises(DataError, match="has 300000 bytes, not 5"):
        download(RemoteFile(server.url, "a.bin", 5), tmp_path)
    assert left(tmp_path) == []


def test_temporary_errors_are_retried_and_others_are_not(tmp_path: Path, server: Server) -> None:
    server.statuses = [503]
    assert download(RemoteFile(server.url, "a.bin"), tmp_path).read_bytes() == TEXT
    server.statuses = [404]
    with pytest.raises(DataError, match="404"):
        download(RemoteFile(server.url, "b.bin"), tmp_path)
    server.statuses = [401]
    with pytest.raises(DataError, match=r"401.*HF_TOKEN"):
        download(RemoteFile(server.url, "b.bin"), tmp_path)
    server.statuses = [500] * 10
    with pytest.raises(NoConnectionError, match="500"):
        download(RemoteFile(server.url, "b.bin"), tmp_path)


def test_a_token_is_not_sent_on_to_another_server(tmp_path: Path, server: Server) -> None:
    server.redirects_to = server.url.replace("127.0.0.1", "localhost") + "-elsewhere"
    assert download(RemoteFile(server.url, "a.bin"), tmp_path, token="secret").read_bytes() == TEXT
    assert server.tokens == ["Bearer secret", None]


def test_an_unreachable_server_is_reported(tmp_path: Path, server: Server) -> None:
    with pytest.raises(NoConnectionError, match=r"http://127\.0\.0\.1:9/x could not be downloaded"):
        download(RemoteFile("http://127.0.0.1:9/x", "a.bin"), tmp_path)
    with pytest.raises(NoConnectionError, match="nowhere"):
        download(RemoteFile("http://nowhere.invalid/x", "a.bin"), tmp_path)


def test_an_unsafe_name_and_a_file_too_large_for_the_disk_are_refused_before_any_request(
    tmp_path: Path, server: Server
) -> None:
    with pytest.raises(DataError, match="leads out"):
        download(RemoteFile(server.url, "../a.bin"), tmp_path / "inside")
    with pytest.raises(DataError, match="GB are free"):
        download(RemoteFile(server.url, "a.bin", 2**60), tmp_path)
    assert server.requested_ranges == []
