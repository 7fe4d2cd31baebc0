"""Every JSON, YAML and Python configuration block of the five manuals loads unchanged."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
from paths import SHARED

from llm_trainer.config import DataConfig, ModelConfig, TrainingConfig, UsageError
from llm_trainer.config.parse.command import CommandSpec, LoadedRun
from llm_trainer.config.parse.loader import load_run
from llm_trainer.config.parse.validation import not_implemented_settings
from llm_trainer.config.resolve.deepspeed import read_deepspeed
from llm_trainer.config.schema.domains import parse_domain_bridge, read_bridge_file
from llm_trainer.config.schema.scaling_schedule import read_schedule

MANUALS = SHARED / "manuals"
SECTIONS = (
    "model",
    "training",
    "data",
    "knowledge_distillation",
    "computational_efficiency",
    "adaptive_reasoning",
)
SPEC = CommandSpec("train", "Train.", SECTIONS)


def blocks(language: str) -> list[tuple[str, str]]:
    """(manual and line, text) of each fenced block in this language, and of the here-documents that write a
    file of its kind.
    """
    found = []
    for path in sorted(MANUALS.glob("00*.txt")):
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(r"^[ \t]*```(\w+)\n(.*?)^[ \t]*```", text, re.MULTILINE | re.DOTALL):
            where = f"{path.name[:3]}:{text[: match.start()].count(chr(10)) + 1}"
            if match[1] == language:
                found.append((where, textwrap.dedent(match[2])))
            for inner in re.finditer(r"cat > \S+\.(\w+) << EOF\n(.*?)\nEOF", match[2], re.DOTALL):
                if inner[1] == language:
                    found.append((f"{where} (here-document)", inner[2]))
    return found


def case(language: str) -> pytest.MarkDecorator:
    found = blocks(language)
    if not found:
        return pytest.mark.parametrize(
            "block", [pytest.param("", marks=pytest.mark.skip("the manuals are not next to this clone"))]
        )
    return pytest.mark.parametrize("block", [text for _, text in found], ids=[where for where, _ in found])


def load(folder: Path, name: str, text: str) -> LoadedRun:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return load_run(SPEC, [f"--config={path}"])


@case("json")
def test_json_block_loads(block: str, tmp_path: Path) -> None:
    path = tmp_path / "block.json"
    path.write_text(block, encoding="utf-8")
    if '"loaders"' in block:
        bridge = parse_domain_bridge(read_bridge_file(path), str(path))
        assert bridge.domain_weights["math"] == 1.5
        assert bridge.loaders["load_wildchat"] == {"min_length": 200}
    elif '"zero_optimization"' in block:
        config = read_deepspeed(path)
        config.check_ranks(4)
        with pytest.raises(UsageError, match="fits 4 ranks"):
            config.check_ranks(2)
    else:
        loaded = load_run(SPEC, [f"--config={path}"])
        assert loaded.set_values(), "the block set nothing"


@case("yaml")
def test_yaml_block_loads(block: str, tmp_path: Path) -> None:
    if re.search(r"^- name:", block, re.MULTILINE):
        path = tmp_path / "schedule.yaml"
        path.write_text(block, encoding="utf-8")
        assert len(read_schedule(path, layers=12)) == block.count("- name:")
    else:
        assert load(tmp_path, "block.yaml", block).set_values()


@case("python")
def test_python_block_runs(block: str) -> None:
    if "CustomTrainer" in block or "load_model" in block:
        pytest.skip("a block about the trainer or a model, not about settings")
    names: dict[str, object] = {
        "ModelConfig": ModelConfig,
        "TrainingConfig": TrainingConfig,
        "DataConfig": DataConfig,
    }
    exec(block, names)
    for name in re.findall(r"^(\w*config) = ", block, re.MULTILINE):
        assert names[name].model_fields_set or not re.search(r"=\w", block)  # type: ignore[attr-defined]


@pytest.mark.skipif(not MANUALS.is_dir(), reason="the manuals are not next to this clone")
def test_the_manuals_have_blocks_of_each_kind() -> None:
    assert {kind: len(blocks(kind)) for kind in ("json", "yaml", "python")} == {
        "json": 7,
        "yaml": 7,
        "python": 20,
    }


TRAINING_BLOCK = """{"training": {"batch_size": 16, "eval_batch_size": 32, "num_epochs": 3,
"learning_rate": 5e-5, "fp16": true, "use_domain_specific_data": true,
"domain_data_dir": "data/domain_specific", "mixed_precision": true, "mixed_precision_dtype": "float16",
"use_knowledge_distillation": true}}"""


def test_a_block_with_features_that_are_not_implemented_loads_and_names_them(tmp_path: Path) -> None:
    loaded = load(tmp_path, "training.json", TRAINING_BLOCK)
    assert loaded.config.training.precision == "fp16"
    missing = "\n".join(not_implemented_settings(loaded.config))
    assert "use_knowledge_distillation" in missing
