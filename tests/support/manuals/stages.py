"""Folders to run the manuals' commands in: a clone, and the states that earlier commands leave it in. Each is
made once a session.
"""

from __future__ import annotations

import base64
import compileall
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import fork_server
from paths import ROOT

from manuals.cases import L1, ORCHESTRATOR, TINY_DOMAINS, Case, scaled

LINES = [f"line {number}: the quick brown fox jumps over {number * 7} lazy dogs." for number in range(400)]
TINY_MODEL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 300,
}


def _of_manual(cases: dict[str, Case], number: int) -> str:
    """A manual's command by its place among the manual's commands, scaled."""
    text, case = list(cases.items())[number]
    return scaled(text, case)


# State → the state before it, and the command that leads from one to the other.
STEPS: dict[str, tuple[str, str]] = {
    "framework data": ("clone", "python data_prep_tool.py --vocab_size 300 --max_length 32"),
    "framework run": (
        "framework data",
        "python train.py --hidden_size 32 --num_layers 2 --num_heads 4 --batch_size 4 --max_steps 4 "
        "--save_interval 2 --compile off",
    ),
    "l1 data": ("clone", _of_manual(L1, 0)),
    "ready data": (
        "l1 data",
        "python scripts/process_data.py --input_dir data/processed --output_dir data/ready --mode train",
    ),
    "l1 run": ("ready data", _of_manual(L1, 1)),
    "all in one": (
        "ready data",
        "python train_aio.py --config tiny/training_config.json --max_steps 2 --batch_size 2 --compile off",
    ),
    "domain data": (
        "clone",
        f"python scripts/prepare_domain_datasets.py --config config/domain_bridge_config.json {TINY_DOMAINS}",
    ),
    "trainer run": ("clone", "python scripts/train.py --config tiny/config.json"),
    "character data": ("clone", _of_manual(ORCHESTRATOR, 0)),
    "character run": ("character data", _of_manual(ORCHESTRATOR, 1)),
}


@dataclass
class Stages:
    """Makes each state at most once, under `base`."""

    base: Path
    made: dict[str, Path] = field(default_factory=dict)

    def copy(self, name: str, target: Path) -> Path:
        """A copy of a state's folder."""
        shutil.copytree(self.folder(name), target, symlinks=True)
        return target

    def folder(self, name: str) -> Path:
        """The folder in this state; do not change it."""
        if name not in self.made:
            place = self.base / name.replace(" ", "-")
            if name == "clone":
                make_clone(place)
            else:
                before, command = STEPS[name]
                self.copy(before, place)
                done = run(command, place)
                assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
            self.made[name] = place
        return self.made[name]


def make_clone(place: Path) -> None:
    """What a clone holds, without its history and tests, and some text."""
    place.mkdir(parents=True)
    for script in ROOT.glob("*.py"):
        shutil.copy(script, place)
    for folder in ("llm_trainer", "scripts", "configs"):
        shutil.copytree(ROOT / folder, place / folder, ignore=shutil.ignore_patterns("__pycache__"))
    compileall.compile_dir(place / "llm_trainer", quiet=2)  # once, instead of in each command
    for script in ROOT.glob("data/*/prepare.py"):
        (place / script.relative_to(ROOT)).parent.mkdir(parents=True)
        shutil.copy(script, place / script.relative_to(ROOT))
    (place / "config").symlink_to("configs")
    for name in ("raw_text_data/a.txt", "data/raw/your_text.txt"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("\n".join(LINES) + "\n", encoding="utf-8")
    (place / "prompt.txt").write_text("line 7", encoding="utf-8")
    ranks = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" f", b" fo"]
    (place / "ranks.tiktoken").write_text(
        "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks)),
        encoding="utf-8",
    )
    _write_tiny_files(place / "tiny")
    _write_domain_records(place / "data/domain_raw")


def _write_domain_records(folder: Path) -> None:
    """Records with the fields of the data sets that the domain bridge file names, in place of the hub's."""
    folder.mkdir(parents=True)
    for number, line in enumerate(LINES[:60]):
        turns = [{"role": role, "content": line * 4} for role in ("user", "assistant")]
        records: dict[str, dict[str, object]] = {
            "load_math": {
                "problem": f"{line} How many?", "solution": f"{number}.",
                "level": "Level 1", "type": "Algebra",
            },
            "load_numinamath": {
                "problem": f"{line} How fast?", "solution": f"{number} km/h.", "source": "olympiads",
            },
            "load_scieval": {"question": f"{line} Why?\n\nA. Wind\nB. Rain\n\nAnswer:", "answer": ["B"]},
            "load_olympiad_bench": {
                "question": f"{line} Prove it.", "solution": ["Clear."], "context": None,
                "subject": "Physics", "difficulty": "Competition",
            },
            "load_livecodebench": {
                "question_title": f"{number}", "question_content": f"Print: {line}", "starter_code": "",
                "difficulty": ("medium", "hard")[number % 2],
            },
            "load_quant": {"Question": f"{line} Who?", "Answer": "Nobody."},
            "load_curated_thoughts": {
                "problem": f"{line} Then?", "solution": "So.",
                "generations": [f"<think>{number}</think> So."],
            },
            "load_wildchat": {"conversation": turns, "toxic": False},
        }  # fmt: skip
        for name, record in records.items():
            with (folder / f"{name}.jsonl").open("a", encoding="utf-8") as opened:
                opened.write(json.dumps(record) + "\n")


def _write_tiny_files(folder: Path) -> None:
    """The shipped training files with a small model, and text from here in place of the hub's."""
    folder.mkdir()
    training = json.loads((ROOT / "configs/training_config.json").read_text(encoding="utf-8"))
    training["training"].pop("warmup_steps", None)
    (folder / "training_config.json").write_text(json.dumps(training), encoding="utf-8")
    domains = json.loads((ROOT / "configs/domain_training_config.json").read_text(encoding="utf-8"))
    domains["training"].pop("warmup_steps", None)
    (folder / "domain_training_config.json").write_text(json.dumps(domains), encoding="utf-8")
    model = {"model": {**TINY_MODEL, "max_position_embeddings": 32}}
    (folder / "model_config.json").write_text(json.dumps(model), encoding="utf-8")
    trainer = json.loads((ROOT / "configs/config.json").read_text(encoding="utf-8"))
    trainer["model"] = {
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "d_ff": 64,
        "max_seq_len": 32,
        "vocab_size": 300,
    }
    trainer["data"] = {"input": "data/raw/your_text.txt", "max_length": 32}
    trainer["training"] |= {
        "max_steps": 4,
        "batch_size": 4,
        "save_steps": 2,
        "eval_steps": 2,
        "compile": "off",
    }
    (folder / "config.json").write_text(json.dumps(trainer), encoding="utf-8")
    for name in ("basic_scaling.yaml", "progressive_scaling.yaml"):
        shipped = (ROOT / "configs" / name).read_text(encoding="utf-8")
        small = re.sub(r"max_wait_iters: \d+", "max_wait_iters: 1", shipped)  # within four steps
        small = re.sub(r"\[0, 0, 1, 1[^\]]*\]", "[0, 0, 1, 1]", small).replace("4096", "256")
        (folder / name).write_text(small, encoding="utf-8")


def run(command: str, folder: Path, seconds: int = 300) -> subprocess.CompletedProcess[str]:
    """Run a command line as a user would, in `folder`, with this Python and without a network.

    Python is a fork of a process that has imported PyTorch, but nothing of this package: the command imports
    the copy in `folder`. The ranks that torchrun starts are fresh processes.
    """
    quiet = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "COLUMNS": "200",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LLM_TRAINER_DEBUG")
    } | quiet
    program, *arguments = shlex.split(command)
    if program == "torchrun":
        program, arguments = "python", ["-m", "torch.distributed.run", *arguments]
    if program == "python":
        return fork_server.run(arguments, cwd=folder, env=environment, timeout=seconds)
    return subprocess.run(
        [str(Path(sys.executable).parent / program), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
        stdin=subprocess.DEVNULL,
        check=False,
    )
