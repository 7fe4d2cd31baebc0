"""A run's remote copy is complete after the run, trusted by its manifest only, and fetched on a resume."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from snapshots import snapshot
from tiny_run import tiny_config, tiny_run, tiny_trainer

from llm_trainer.config import CheckpointError, UsageError
from llm_trainer.diagnostics.verify_resume import StopAtStep, compare_checkpoints
from llm_trainer.run_dir import list_checkpoints, verify
from llm_trainer.training.checkpoint.remote import RemoteRun, fetch_checkpoint, with_local_folders
from llm_trainer.training.checkpoint.store import CheckpointStore


@pytest.fixture(params=["memory", "file"])
def address(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An address that nothing is at, and a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield "memory://bucket/run" if request.param == "memory" else f"file://{tmp_path}/storage/run"
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


def names_at(address: str) -> set[str]:
    """The names at the address."""
    files, root = fsspec.core.url_to_fs(address)
    return {path.rstrip("/").rpartition("/")[2] for path in files.ls(root, detail=False)}


def downloaded(address: str, name: str, folder: Path) -> Path:
    """A checkpoint, downloaded by another client."""
    files, root = fsspec.core.url_to_fs(f"{address}/{name}")
    for path in files.find(root):
        place = folder / name / path.removeprefix(f"{root}/")
        place.parent.mkdir(parents=True, exist_ok=True)
        files.get_file(path, str(place))
    return folder / name


def test_a_run_saved_at_an_address_is_complete_there_and_another_machine_resumes_it(
    address: str, tmp_path: Path
) -> None:
    tiny_run(tmp_path / "straight")
    tiny_run(address, save_total_limit=2, callbacks=[StopAtStep(7)])  # type: ignore[arg-type]
    assert names_at(address) == {
        "checkpoint-3",
        "checkpoint-6",
        "best_model",
        "final_model",
        "run.json",
        "metrics.jsonl",
    }
    for name in ("checkpoint-6", "best_model", "final_model"):
        assert verify(downloaded(address, name, tmp_path / "theirs")) == []
    shutil.rmtree(tmp_path / "cache")  # another machine
    tiny_run(address, save_total_limit=2, resume_from="auto")  # type: ignore[arg-type]
    final = downloaded(address, "final_model", tmp_path / "end")
    assert compare_checkpoints(tmp_path / "straight/final_model", final) == []
    assert names_at(address) >= {"checkpoint-6", "checkpoint-9"}
    assert "checkpoint-3" not in names_at(address)


def test_a_named_checkpoint_at_an_address_is_resumed_into_a_local_run(address: str, tmp_path: Path) -> None:
    tiny_run(tmp_path / "straight", remote_dir=address)
    tiny_run(tmp_path / "again", resume_from=f"{address}/checkpoint-6")
    assert compare_checkpoints(tmp_path / "straight/final_model", tmp_path / "again/final_model") == []


def test_an_interrupted_upload_is_skipped_for_the_one_before(address: str, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run", remote=RemoteRun(address, tmp_path / "run"))
    for step in (1, 2, 3):
        store.save(snapshot(tmp_path), step)
    store.finish_uploads()
    files, root = fsspec.core.url_to_fs(address)
    files.rm_file(f"{root}/checkpoint-3/manifest.json")  # never came
    files.pipe_file(f"{root}/checkpoint-2/state.json", b"{}")  # another process's hand
    lines: list[str] = []
    config = tiny_config(tmp_path / "elsewhere", remote_dir=address, resume_from="auto")
    fetch_checkpoint(config.training, lines.append)
    assert [one.path.name for one in list_checkpoints(tmp_path / "elsewhere")] == ["checkpoint-1"]
    assert any("skipping" in line and "state.json has 2 bytes" in line for line in lines)
    assert not any(path.name.startswith(".") for path in (tmp_path / "elsewhere").iterdir())


def test_the_manifest_is_uploaded_last_and_deleted_first(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = RemoteRun(address, tmp_path / "run")
    store = CheckpointStore(tmp_path / "run", remote=remote)
    store.save_best(snapshot(tmp_path, seed=1))
    store.finish_uploads()
    done: list[tuple[str, str]] = []
    kind = type(remote._files)
    for call in ("put_file", "rm_file", "rm"):
        original = getattr(kind, call)

        def noted(
            self: object,
            path: str,
            *rest: object,
            call: str = call,
            original: object = original,
            **more: object,
        ) -> object:
            done.append((call, str(rest[0] if call == "put_file" else path).rpartition("/")[2]))
            return original(self, path, *rest, **more)  # type: ignore[operator]

        monkeypatch.setattr(kind, call, noted)
    store.save_best(snapshot(tmp_path, seed=2))
    store.finish_uploads()
    assert done[0] == ("rm_file", "manifest.json")
    uploaded = [name for call, name in done if call == "put_file"]
    assert uploaded.index("manifest.json") > uploaded.index("model.safetensors")
    assert uploaded[uploaded.index("manifest.json") + 1 :] == []


def test_unreachable_storage_is_reported_and_tried_again(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = RemoteRun(address, tmp_path / "run")
    store = CheckpointStore(tmp_path / "run", remote=remote)

    def gone(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    with monkeypatch.context() as patch:
        patch.setattr(type(remote._files), "put_file", gone)
        store.save(snapshot(tmp_path), 1)
        store.save(snapshot(tmp_path), 2)
        remote._writer.wait()
        assert ["no route" in line and "tried again" in line for line in remote.take_messages()] == [True]
        with pytest.raises(CheckpointError, match="no route"):
            store.finish_uploads()
    store.save(snapshot(tmp_path), 3)
    store.finish_uploads()
    assert names_at(address) == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}
    assert remote.take_messages() == []


def test_a_run_whose_copy_is_incomplete_at_its_end_ends_with_an_error(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tiny_trainer(tmp_path / "run", remote_dir=address)
    lines: list[str] = []
    monkeypatch.setattr(trainer.run, "log", lines.append)
    assert trainer.run.store.remote is not None

    def gone(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(trainer.run.store.remote._files, "put_file", gone)
    with pytest.raises(CheckpointError, match="no route"):
        trainer.train()
    assert trainer.current_step == 10
    assert any("tried again" in line for line in lines)
    assert verify(tmp_path / "run/final_model") == []


def test_a_new_run_sets_aside_what_is_at_its_address(address: str, tmp_path: Path) -> None:
    tiny_run(tmp_path / "first", remote_dir=address)
    tiny_run(tmp_path / "second", remote_dir=address, max_steps=4, save_interval=2)
    log = (tmp_path / "second/logs/train.log").read_text(encoding="utf-8")
    assert any("set aside" in line and "checkpoint-9" in line for line in log.splitlines())
    remote = RemoteRun(address, tmp_path / "third")
    assert {name for name, _ in remote._names()} == {"checkpoint-2", "best_model", "final_model"}
    files, root = fsspec.core.url_to_fs(address)
    assert files.exists(f"{root}/checkpoint-9/manifest-set-aside.json")


def test_two_addresses_and_unknown_addresses_are_refused(tmp_path: Path) -> None:
    two = tiny_config("memory://a", remote_dir="memory://b")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"memory://a and remote_dir memory://b"):
        with_local_folders(two.training)
    with pytest.raises(UsageError, match="nowhere"):
        RemoteRun("nowhere://a", tmp_path)


def test_a_run_resumed_into_another_folder_leaves_the_first_runs_copy_alone(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llm_trainer.cli.main import main

    (tmp_path / "text.txt").write_text("hello world of text. " * 500, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    shape = [
        "--hidden_size=16",
        "--num_layers=1",
        "--num_heads=2",
        "--max_length=16",
        "--compile=off",
        "--precision=fp32",
    ]
    run = [
        "train",
        "--input=text.txt",
        "--batch_size=2",
        "--max_steps=4",
        "--save_interval=2",
        "--lr_scheduler=constant",
        *shape,
    ]
    assert main([*run, f"--output_dir={address}"]) == 0
    before = names_at(address)
    assert main(["train", f"--resume={address}/checkpoint-2", "--output_dir=other", "--max_steps=6"]) == 0
    assert (tmp_path / "other/final_model").is_dir()
    assert names_at(address) == before
    assert verify(downloaded(address, "final_model", tmp_path / "theirs")) == []


def test_s3_without_its_client_names_the_extra(tmp_path: Path) -> None:
    try:
        import s3fs  # noqa: F401
    except ImportError:
        with pytest.raises(UsageError, match=r"pip install 'llm-trainer\[s3\]'"):
            RemoteRun("s3://bucket/run", tmp_path)
