"""Every executor gives the same bytes, and errors, killed workers and Ctrl-C lose no finished work."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fork_server
import psutil
import pytest
from fork_server import ForkedProcess

from llm_trainer.config import DataConfig
from llm_trainer.data.pipeline import executors
from llm_trainer.data.pipeline.executors import ProcessExecutor
from llm_trainer.data.pipeline.pipeline import prepare_dataset
from llm_trainer.data.sources.file_source import FileSource
from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.errors import DataError

# As in the real commands, a worker process that imports this finds nothing heavy at its top.
PROGRAM = """
import os, sys, threading
from pathlib import Path
from llm_trainer.data.sources import file_source

def wait_forever(_):
    Path(os.environ["WORKER_READS"]).touch()
    threading.Event().wait()

if "WORKER_READS" in os.environ:
    file_source._READERS["lines"] = wait_forever

if __name__ == "__main__":
    from llm_trainer.config import DataConfig
    from llm_trainer.data.pipeline import executors
    from llm_trainer.data.pipeline.pipeline import prepare_dataset

    texts, output, workers = sys.argv[1:]
    executors._MIN_BYTES_FOR_PROCESSES = 0
    source = file_source.FileSource(Path(texts), one_document_per_line=True, partition_bytes=20_000)
    settings = DataConfig(
        vocab_size=400, val_ratio=0.2, deduplicate="exact", clean=True, num_workers=int(workers)
    )
    print("begins", flush=True)
    prepare_dataset(settings, output, source=source)
"""


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, tiny_texts: list[str]) -> Path:
    """Twelve files of lines, one partition each."""
    folder = tmp_path_factory.mktemp("executors") / "texts"
    folder.mkdir()
    lines = [line for text in tiny_texts for line in text.splitlines() if line.strip()]
    for file in range(12):
        shuffled = random.Random(file).sample(lines, k=min(600, len(lines)))
        (folder / f"{file:02d}.txt").write_text(
            "\n".join(f"{file} {line}" for line in shuffled), encoding="utf-8"
        )
    return folder


@pytest.fixture(scope="module")
def expected(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The result of one process that is not interrupted."""
    folder = tmp_path_factory.mktemp("expected")
    prepared(texts, folder)
    return result_of(folder)


def prepared(texts: Path, output: Path, **options: object) -> None:
    source = FileSource(texts, one_document_per_line=True, partition_bytes=20_000)
    settings = {"vocab_size": 400, "val_ratio": 0.2, "deduplicate": "exact", "clean": True, **options}
    prepare_dataset(DataConfig(**settings), output, source=source)


def result_of(folder: Path) -> dict[str, bytes]:
    """The prepared files, without the cached stages and the times."""
    files = (
        path
        for path in folder.rglob("*")
        if path.is_file() and ".stages" not in path.relative_to(folder).parts
    )
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in files
        if path.name not in (".prepare.lock", "summary.json")
    }


def start(texts: Path, output: Path, workers: int, **environment: str) -> ForkedProcess:
    """Prepare in another process; returns when it has begun."""
    program = output.parent / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    process = fork_server.start(
        [program, texts, output, workers], env=os.environ | environment, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begins\n"
    return process


def wait_until(holds: Callable[[], bool], seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_processes_give_the_same_bytes(
    texts: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "_MIN_BYTES_FOR_PROCESSES", 0)
    prepared(texts, tmp_path, num_workers=2)
    assert result_of(tmp_path) == expected


@pytest.mark.slow
def test_ray_gives_the_same_bytes(texts: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    ray = pytest.importorskip("ray")
    prepared(texts, tmp_path, executor="ray", num_workers=2)
    assert result_of(tmp_path) == expected
    assert not ray.is_initialized()
    threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in threads if name.startswith("gcs_client")]  # it may end this process later
    Tokenizer.from_characters(["abc "]).save(tmp_path / "tokenizer")
    with pytest.raises(DataError, match=r"\.txt.*: the character tokenizer has no id for"):
        prepared(
            texts,
            tmp_path / "other",
            executor="ray",
            num_workers=2,
            tokenizer_path=str(tmp_path / "tokenizer"),
        )


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_names_the_partition(
    texts: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "_MIN_BYTES_FOR_PROCESSES", 0)
    Tokenizer.from_characters(["abc "]).save(tmp_path / "tokenizer")
    with pytest.raises(DataError, match=r"\d\d\.txt.*: the character tokenizer has no id for"):
        prepared(texts, tmp_path / "out", num_workers=workers, tokenizer_path=str(tmp_path / "tokenizer"))
    assert result_of(tmp_path / "out") == {}


@dataclass(frozen=True)
class Fatal:
    """A job whose process is killed, as when it uses too much memory."""

    name: str
    size: int = 1

    def __call__(self, advance: Callable[[int], None]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_the_error_for_a_killed_worker_names_its_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "_MIN_BYTES_FOR_PROCESSES", 0)
    workers = ProcessExecutor(2)
    with pytest.raises(
        DataError, match=r"a worker process died.*(one|two).*run the same command again to resume"
    ):
        workers.run([Fatal("one"), Fatal("two")], lambda count: None)
    workers.close()


def test_workers_end_with_a_killed_command_and_the_next_run_resumes(
    texts: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    process = start(texts, tmp_path / "out", workers=2)
    made = tmp_path / "out" / ".stages" / "read"
    wait_until(lambda: any(not path.name.startswith(".") for path in made.glob("*")))
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.kill()
    process.communicate()
    wait_until(
        lambda: not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
    )
    assert not (tmp_path / "out" / "metadata.json").exists()
    prepared(texts, tmp_path / "out")
    assert result_of(tmp_path / "out") == expected
    assert not list((tmp_path / "out").glob(".stages/*/.making-*"))


def test_ctrl_c_ends_all_processes(texts: Path, tmp_path: Path) -> None:
    """The worker would never end without it."""
    process = start(texts, tmp_path / "out", workers=2, WORKER_READS=str(tmp_path / "reads"))
    wait_until((tmp_path / "reads").exists)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.send_signal(signal.SIGINT)
    assert process.wait() != 0
    _, alive = psutil.wait_procs(children, timeout=300)
    assert not alive


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_20_random_moments_it_gives_the_same_bytes(
    texts: Path, tmp_path: Path, expected: dict[str, bytes], workers: int
) -> None:
    began = time.monotonic()
    start(texts, tmp_path / "whole", workers).communicate()
    whole = time.monotonic() - began
    drawn = random.Random(workers)
    for number in range(20):
        out = tmp_path / f"out{number}"
        kills = 0
        for _ in range(drawn.randint(1, 3)):
            process = start(texts, out, workers)
            timer = threading.Timer(drawn.uniform(0, 0.8 * whole), process.kill)
            timer.start()
            process.communicate()
            timer.cancel()
            kills += process.returncode == -signal.SIGKILL
            if process.returncode == 0:
                break
        process = start(texts, out, workers)
        process.communicate()
        assert process.returncode == 0
        assert result_of(out) == expected, f"number {number}, killed {kills} times"
