"""Which checkpoints are trusted, and which folder a name means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_trainer.errors import CheckpointError
from llm_trainer.run_dir import (
    list_checkpoints,
    resolve_model_folder,
    resolve_resume_folder,
    verify,
    write_manifest,
)


def make_checkpoint(folder: Path, step: int) -> Path:
    """A folder with everything but real weights."""
    (folder / "optimizer").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(100)))
    (folder / "optimizer" / "model-00001-of-00001.safetensors").write_bytes(bytes(50))
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "state.json").write_text(json.dumps({"step": step}), encoding="utf-8")
    write_manifest(folder)
    return folder


def test_a_complete_checkpoint_has_no_problems(tmp_path: Path) -> None:
    assert verify(make_checkpoint(tmp_path / "checkpoint-1", 1)) == []


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer/model-00001-of-00001.safetensors", "config.json", "state.json"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "remove"])
def test_any_damage_to_any_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint-1", 1)
    original = (folder / name).read_bytes()
    if damage == "remove":
        (folder / name).unlink()
    else:
        damaged = {"flip": bytes([original[0] ^ 1]) + original[1:], "cut": original[:-1], "empty": b""}[
            damage
        ]
        (folder / name).write_bytes(damaged)
    (problem,) = verify(folder)
    assert problem.startswith(name)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": 1}',
        '{"format": 2, "files": {"a": {}}}',
        '{"format": 1, "files": {}}',
        "\x00",
    ],
)
def test_a_damaged_manifest_is_a_problem(tmp_path: Path, text: str) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint-1", 1)
    (folder / "manifest.json").write_text(text, encoding="utf-8")
    assert verify(folder) != []


def test_a_manifest_cannot_point_out_of_its_folder(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint-1", 1)
    for name in ("../outside", "/etc/passwd"):
        (folder / "manifest.json").write_text(
            json.dumps({"format": 1, "files": {name: {"size": 1, "sha256": ""}}}), encoding="utf-8"
        )
        assert "not a file of this folder" in verify(folder)[0]


def test_weights_that_the_manifest_does_not_list_are_a_problem_and_notes_are_not(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint-1", 1)
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    assert verify(folder) == []
    (folder / "optimizer" / "more.safetensors").write_bytes(b"")
    assert verify(folder) == ["optimizer/more.safetensors is not in the manifest"]


def test_checkpoints_are_listed_newest_first_and_others_left_out(tmp_path: Path) -> None:
    for name, step in (
        ("checkpoint-9", 9),
        ("checkpoint-10", 10),
        ("emergency-12", 12),
        ("best_model", 10),
        ("final_model", 20),
    ):
        make_checkpoint(tmp_path / name, step)
    make_checkpoint(tmp_path / ".tmp-checkpoint-30", 30)
    make_checkpoint(tmp_path / "earlier-1" / "checkpoint-40", 40)
    names = [one.path.name for one in list_checkpoints(tmp_path)]
    assert names == ["final_model", "emergency-12", "checkpoint-10", "best_model", "checkpoint-9"]


def test_resuming_a_run_takes_the_newest_complete_checkpoint_and_reports_those_skipped(
    tmp_path: Path,
) -> None:
    for step in (5, 10, 15):
        make_checkpoint(tmp_path / f"checkpoint-{step}", step)
    (tmp_path / "checkpoint-15" / "manifest.json").unlink()
    (tmp_path / "checkpoint-10" / "model.safetensors").write_bytes(b"")
    lines: list[str] = []
    assert resolve_resume_folder(tmp_path, lines.append) == tmp_path / "checkpoint-5"
    assert [line.split(":")[0].rsplit("/")[-1] for line in lines] == ["checkpoint-15", "checkpoint-10"]
    assert "the save did not finish" in lines[0]
    assert "model.safetensors has 0 bytes instead of 100" in lines[1]


def test_a_damaged_checkpoint_is_an_error_that_names_a_complete_one(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint-5", 5)
    (make_checkpoint(tmp_path / "checkpoint-10", 10) / "state.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"state.json has .*checkpoint-5 is complete"):
        resolve_resume_folder(tmp_path / "checkpoint-10")


def test_the_previous_folder_of_a_name_is_used_while_its_replacement_is_missing(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / ".old-checkpoint-5", 5)
    make_checkpoint(tmp_path / ".old-best_model", 3)
    assert resolve_resume_folder(tmp_path) == tmp_path / ".old-checkpoint-5"
    assert resolve_model_folder(tmp_path) == tmp_path / ".old-best_model"
    assert resolve_model_folder(tmp_path / "best_model.pt") == tmp_path / ".old-best_model"


def test_a_model_of_a_run_is_the_best_else_the_final_else_the_newest(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint-5", 5)
    make_checkpoint(tmp_path / "checkpoint-9", 9)
    assert resolve_model_folder(tmp_path) == tmp_path / "checkpoint-9"
    make_checkpoint(tmp_path / "final_model", 9)
    assert resolve_model_folder(tmp_path) == tmp_path / "final_model"
    make_checkpoint(tmp_path / "best_model", 5)
    assert resolve_model_folder(tmp_path) == tmp_path / "best_model"


def test_a_damaged_best_model_is_skipped_and_reported(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "final_model", 9)
    (make_checkpoint(tmp_path / "best_model", 5) / "model.safetensors").write_bytes(b"")
    lines: list[str] = []
    assert resolve_model_folder(tmp_path, lines.append) == tmp_path / "final_model"
    assert "best_model" in lines[0]


@pytest.mark.parametrize(
    ("file_name", "folder"),
    [
        ("checkpoint_step_50.pt", "checkpoint-50"),
        ("checkpoint-50.pt", "checkpoint-50"),
        ("checkpoint-50", "checkpoint-50"),
        ("checkpoint_50.pt", "checkpoint-50"),
        ("step_60.pt", "emergency-60"),
        ("best_model.pt", "best_model"),
        ("best.pt", "best_model"),
        ("final_model.pt", "final_model"),
        ("checkpoint-50/model.safetensors", "checkpoint-50"),
        ("checkpoint_step_70.pt", "final_model"),
    ],
)
def test_file_names_of_the_manuals_mean_checkpoint_folders(
    tmp_path: Path, file_name: str, folder: str
) -> None:
    for name, step in (("checkpoint-50", 50), ("emergency-60", 60), ("best_model", 50), ("final_model", 70)):
        make_checkpoint(tmp_path / name, step)
    assert resolve_model_folder(tmp_path / file_name) == tmp_path / folder
    assert resolve_resume_folder(str(tmp_path / file_name)) == tmp_path / folder


def test_an_unknown_checkpoint_is_an_error_that_lists_those_there(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint-50", 50)
    for name in ("checkpoint-51.pt", "nothing", "checkpoint-51/model.safetensors"):
        with pytest.raises(CheckpointError, match="is not a checkpoint"):
            resolve_resume_folder(tmp_path / name)
    with pytest.raises(CheckpointError, match="holds checkpoint-50"):
        resolve_model_folder(tmp_path / "checkpoint_step_51.pt")


def test_an_empty_folder_is_not_a_run_folder(tmp_path: Path) -> None:
    for resolve in (resolve_resume_folder, resolve_model_folder):
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            resolve(tmp_path)


def test_a_real_pt_file_is_a_model_and_cannot_be_resumed(tmp_path: Path) -> None:
    (tmp_path / "ckpt.pt").write_bytes(b"PK")
    assert resolve_model_folder(tmp_path / "ckpt.pt") == tmp_path / "ckpt.pt"
    assert resolve_model_folder(tmp_path) == tmp_path / "ckpt.pt"
    with pytest.raises(CheckpointError, match="--init_from"):
        resolve_resume_folder(tmp_path / "ckpt.pt")


def test_a_folder_that_transformers_wrote_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert resolve_model_folder(tmp_path) == tmp_path
    with pytest.raises(CheckpointError, match="cannot be resumed"):
        resolve_resume_folder(tmp_path)


def test_run_dir_imports_neither_torch_nor_numpy() -> None:
    import subprocess
    import sys

    code = "import sys, llm_trainer.run_dir; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
