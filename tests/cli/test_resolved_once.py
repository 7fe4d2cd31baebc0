"""A start resolves everything once: batch sizes, DeepSpeed's file, remote copies, the checkpoint."""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

from llm_trainer.cli.main import main
from llm_trainer.config.resolve import deepspeed, settings
from llm_trainer.training.checkpoint import resume

RESOLVED_IN = {
    "resolve_batches": "config/resolve/settings.py",
    "read_deepspeed": "config/resolve/deepspeed.py",
    "merge_deepspeed": "config/resolve/settings.py",
    "fetch_checkpoint": "training/checkpoint/resume.py",
    "resume_folder": "training/checkpoint/resume.py",
}


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each of these functions is called."""
    counted: Counter[str] = Counter()

    def count(module: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(module, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            counted[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, counting)

    count(settings, "resolve_batches")
    count(deepspeed, "read_deepspeed")
    count(resume, "fetch_checkpoint")
    count(resume, "resume_folder")
    return counted


def calls_of(name: str) -> list[str]:
    """The modules that call a function, once for each call."""
    package = ROOT / "llm_trainer"
    found = []
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
                found.append(path.relative_to(package).as_posix())
    return found


@pytest.mark.parametrize("name", RESOLVED_IN)
def test_one_place_in_the_code_resolves_it(name: str) -> None:
    assert calls_of(name) == [RESOLVED_IN[name]]


def test_a_new_run_and_a_resumed_one_resolve_once(place: Path, counts: Counter[str]) -> None:
    settings_of_run = [
        "--data_dir=data/prepared/text",
        "--batch_size=4",
        "--compile=off",
        "--save_interval=2",
    ]
    shape = ["--hidden_size=32", "--num_layers=2", "--num_heads=4", "--max_length=32"]
    remote = f"--remote_dir=file://{place}/remote"
    assert main(["train", *settings_of_run, *shape, "--max_steps=2", "--output_dir=run", remote]) == 0
    assert counts == {"resolve_batches": 1, "fetch_checkpoint": 1}
    counts.clear()
    resumed = ["--resume=auto", "--max_steps=4", "--lr_on_resume=extend", "--output_dir=run", remote]
    assert main(["train", *settings_of_run, *resumed]) == 0
    assert counts == {"resolve_batches": 1, "fetch_checkpoint": 1, "resume_folder": 1}


def test_deepspeeds_file_is_read_once(place: Path, counts: Counter[str]) -> None:
    file = place / "deepspeed.json"
    file.write_text(
        json.dumps({"train_micro_batch_size_per_gpu": 3, "fp16": {"enabled": True}}), encoding="utf-8"
    )
    # DeepSpeed trains in no fp16 here, which is found out after the settings are resolved.
    arguments = [
        "--data_dir=data/prepared/text",
        "--use_deepspeed",
        f"--deepspeed_config={file}",
        "--num_layers=2",
    ]
    assert main(["train", *arguments]) != 0
    assert counts == {"resolve_batches": 1, "read_deepspeed": 1}
