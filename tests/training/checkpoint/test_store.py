"""A checkpoint is restored bit-exactly, and saving never damages an earlier one."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from snapshots import snapshot
from tiny_run import SHAPE, tiny_config, tiny_model, tiny_run, tiny_trainer

from llm_trainer.config import CheckpointError, ModelConfig
from llm_trainer.config.saved_run import read_run_config
from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.model.hf.checkpoint import load_pretrained
from llm_trainer.run_dir import list_checkpoints, verify, write_manifest
from llm_trainer.training.checkpoint.optimizer_state import (
    TENSORS_FILE,
    load_optimizer_state,
    optimizer_state,
    write_tensors,
)
from llm_trainer.training.checkpoint.store import CheckpointData, CheckpointStore, read_state, restore
from llm_trainer.training.optim.optimizers import build_optimizers


def test_a_checkpoint_is_the_folder_that_is_documented(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_characters(["abc"])
    data = snapshot(tmp_path)
    folder = CheckpointStore(tmp_path).save(
        CheckpointData(data.model, data.optimizers, data.state, data.config, tokenizer), 2
    )
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    documented = {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "state.json",
        "run.json",
        "manifest.json",
        f"optimizer/{TENSORS_FILE}",
    }
    assert documented <= names
    assert verify(folder) == []
    assert read_run_config(folder) == data.config
    assert (
        json.loads((folder / "run.json").read_text(encoding="utf-8"))["versions"]["torch"]
        == torch.__version__
    )


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_and_optimizer_are_restored_bit_exactly_with_dtypes_and_devices(
    tmp_path: Path, optimizer: str
) -> None:
    data = snapshot(tmp_path, optimizer=optimizer)
    folder = CheckpointStore(tmp_path).save(data, 2)
    other = tiny_model(data.config.model, seed=8)
    optimizers = build_optimizers(other, data.config.training)
    restore(folder, other, optimizers)
    for name, tensor in data.model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    before, after = optimizer_state(data.model, data.optimizers)[0], optimizer_state(other, optimizers)[0]
    assert before.keys() == after.keys()
    assert any(name.endswith("wte.weight.step") for name in before)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
        assert (tensor.dtype, tensor.device, tensor.shape) == (
            after[name].dtype,
            after[name].device,
            after[name].shape,
        ), name


def test_restoring_gives_tensors_that_outlive_the_files(tmp_path: Path) -> None:
    """safetensors maps files; a checkpoint that rotation deletes or a disk truncates must not pull weights
    from under a run.
    """
    data = snapshot(tmp_path)
    folder = CheckpointStore(tmp_path).save(data, 2)
    restore(folder, data.model, data.optimizers)
    expected = {
        name: tensor.clone() for name, tensor in optimizer_state(data.model, data.optimizers)[0].items()
    }
    for path in folder.rglob("*.safetensors"):
        with path.open("r+b") as file:
            file.truncate(0)
    assert all(
        torch.equal(tensor, expected[name])
        for name, tensor in optimizer_state(data.model, data.optimizers)[0].items()
    )


def test_a_checkpoint_before_the_first_step_has_no_optimizer_state(tmp_path: Path) -> None:
    """torch's get_optimizer_state_dict would make a step of zeros and say step 1."""
    config = tiny_config(tmp_path)
    model = tiny_model(config.model)
    optimizers = build_optimizers(model, config.training)
    folder = CheckpointStore(tmp_path).save(CheckpointData(model, optimizers, {"step": 0}, config, None), 0)
    restore(folder, model, optimizers)
    assert optimizer_state(model, optimizers) == ({}, {})


def test_numbers_that_json_lacks_survive_in_the_state(tmp_path: Path) -> None:
    state = {
        "step": 1,
        "best": math.inf,
        "worst": -math.inf,
        "nested": [{"loss": math.nan}],
        "third": 1 / 3,
        "none": None,
    }
    folder = CheckpointStore(tmp_path).save(snapshot(tmp_path, state=state), 1)
    json.loads(
        (folder / "state.json").read_text(encoding="utf-8"), parse_constant=lambda word: pytest.fail(word)
    )
    read = read_state(folder)
    assert (read["best"], read["worst"], read["third"], read["none"]) == (math.inf, -math.inf, 1 / 3, None)
    assert math.isnan(read["nested"][0]["loss"])  # type: ignore[index, call-overload, arg-type]


def test_torchs_own_reader_and_writer_agree_with_ours(tmp_path: Path) -> None:
    """Ours is read by torch.distributed.checkpoint, and what it writes is read by ours: the way to any number
    of ranks stays open.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

    data = snapshot(tmp_path, optimizer="muon")
    tensors, scalars = optimizer_state(data.model, data.optimizers)
    (tmp_path / "ours").mkdir()
    write_tensors(tmp_path / "ours" / TENSORS_FILE, tensors)
    read = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    dcp.load(read, storage_reader=HuggingFaceStorageReader(str(tmp_path / "ours")), no_dist=True)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    (tmp_path / "theirs").mkdir()
    dcp.save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(tmp_path / "theirs")), no_dist=True)
    load_optimizer_state(tmp_path / "theirs", scalars, data.model, data.optimizers)
    assert all(
        torch.equal(optimizer_state(data.model, data.optimizers)[0][name], tensor)
        for name, tensor in tensors.items()
    )


def test_names_are_those_of_torchs_flattened_optimizer_state(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    data = snapshot(tmp_path)
    flat = get_optimizer_state_dict(
        data.model, data.optimizers, options=StateDictOptions(flatten_optimizer_state_dict=True)
    )
    assert {name for name in flat if name.startswith("state.")} == set(
        optimizer_state(data.model, data.optimizers)[0]
    )


def test_the_newest_are_kept_and_the_best_is_never_removed(tmp_path: Path) -> None:
    store, data = CheckpointStore(tmp_path, save_total_limit=2), snapshot(tmp_path, state={"step": 1})
    store.save_best(data)
    for step in (1, 2, 3, 10):
        store.save(data, step)
    store.save_emergency(data, 11)
    store.save_final(data)
    assert {path.name for path in tmp_path.iterdir()} == {
        "best_model",
        "final_model",
        "checkpoint-10",
        "emergency-11",
    }


def test_no_checkpoint_is_removed_for_one_that_is_incomplete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, data = CheckpointStore(tmp_path, save_total_limit=1), snapshot(tmp_path)
    store.save(data, 1)
    monkeypatch.setattr("llm_trainer.training.checkpoint.store.verify", lambda *_, **__: ["planted"])
    store.save(data, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-2"}


def test_a_step_saved_again_replaces_the_first(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(snapshot(tmp_path, seed=1), 2)
    second = snapshot(tmp_path, seed=2)
    folder = store.save(second, 2)
    assert verify(folder) == []
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert torch.equal(load_pretrained(folder).wte.weight, second.model.get_parameter("wte.weight"))


def test_what_crashed_saves_left_is_removed_at_the_next_save(tmp_path: Path) -> None:
    store, data = CheckpointStore(tmp_path), snapshot(tmp_path)
    (tmp_path / ".tmp-checkpoint-1").mkdir()
    (tmp_path / ".tmp-checkpoint-1" / "model.safetensors").write_bytes(b"half")
    store.save(data, 2)
    (tmp_path / "checkpoint-2").rename(tmp_path / ".old-checkpoint-2")  # killed between two renames
    store.save(data, 3)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-3"}
    assert verify(tmp_path / "checkpoint-2") == []


def test_too_little_space_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, data = CheckpointStore(tmp_path), snapshot(tmp_path)
    store.save(data, 1)
    usage = shutil.disk_usage(tmp_path)._replace(free=30_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        CheckpointError,
        match=r"needs about 0\.\d MB, 0\.0 MB are free, 0\.\d MB are missing; "
        ".*Earlier checkpoints are untouched",
    ):
        store.save(data, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert verify(tmp_path / "checkpoint-1") == []


def test_a_checkpoint_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    folder = CheckpointStore(tmp_path).save(snapshot(tmp_path), 2)
    other = tiny_model(ModelConfig(**(SHAPE | {"hidden_size": 32})))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"wte.weight.*has shape \(32, 16\)"):
        restore(folder, other, [])


def test_optimizer_state_of_a_parameter_that_is_not_trained_is_refused_by_name(tmp_path: Path) -> None:
    data = snapshot(tmp_path)
    folder = CheckpointStore(tmp_path).save(data, 2)
    data.model.get_parameter("wte.weight").requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"'wte.weight', which is not being trained"):
        restore(folder, data.model, build_optimizers(data.model, data.config.training))


def test_a_damaged_folder_is_not_restored(tmp_path: Path) -> None:
    data = snapshot(tmp_path)
    folder = CheckpointStore(tmp_path).save(data, 2)
    (folder / "state.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"state\.json has 2 bytes"):
        restore(folder, data.model, data.optimizers)


@pytest.mark.parametrize("name", ["model.safetensors", f"optimizer/{TENSORS_FILE}"])
def test_an_oversized_safetensors_header_is_refused_even_with_a_manifest_that_agrees(
    tmp_path: Path, name: str
) -> None:
    data = snapshot(tmp_path)
    folder = CheckpointStore(tmp_path).save(data, 2)
    (folder / name).write_bytes((2**62).to_bytes(8, "little") + b"{}")
    write_manifest(folder)
    with pytest.raises(CheckpointError):
        restore(folder, data.model, data.optimizers)


def test_training_saving_and_resuming_never_touch_a_pickle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a pickle")

    for name in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    tiny_run(tmp_path, report_to=["tensorboard"])
    assert tiny_run(tmp_path, resume_from=str(tmp_path / "checkpoint-6")).step == 10


def test_final_and_best_model_can_be_resumed_as_any_checkpoint(tmp_path: Path) -> None:
    tiny_run(tmp_path)
    steps = {one.path.name: one.step for one in list_checkpoints(tmp_path)}
    assert steps == {
        "checkpoint-3": 3,
        "checkpoint-6": 6,
        "checkpoint-9": 9,
        "final_model": 10,
        "best_model": read_state(tmp_path / "best_model")["step"],
    }
    trainer = tiny_trainer(tmp_path, resume_from=str(tmp_path / "best_model"))
    assert trainer.train().step == 10


def test_the_saved_folder_opens_with_transformers_as_it_is(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    data = snapshot(tmp_path)
    folder = CheckpointStore(tmp_path).save(data, 2)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(8)[None]
    assert torch.allclose(theirs(ids).logits, data.model.eval()(ids), atol=1e-5)
