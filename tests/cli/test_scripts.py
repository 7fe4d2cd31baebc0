"""The specs: each command and script says what it reads, uses its manual's defaults, and leads to the same
house.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from llm_trainer.cli import specs
from llm_trainer.cli.commands.train_aio import publish_final
from llm_trainer.cli.main import COMMANDS, main
from llm_trainer.cli.scripts import NOT_IMPLEMENTED_SCRIPTS, SCRIPTS
from llm_trainer.config.duration import Duration
from llm_trainer.config.parse.command import CommandSpec
from llm_trainer.config.parse.loader import load_run

ALL_DOORS = [value for value in vars(specs).values() if isinstance(value, CommandSpec)]


def _python(code: str, *options: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        check=False,
    )


def test_help_and_import_load_nothing_heavy() -> None:
    heavy = "('torch', 'numpy', 'tokenizers', 'datasets', 'pydantic', 'rich')"
    code = f"import sys, llm_trainer\nfrom llm_trainer.cli.main import main\nmain(['--help'])\nprint([m for m in {heavy} if m in sys.modules])"
    assert _python(code).stdout.splitlines()[-1] == "[]"


def test_help_of_a_command_loads_no_torch() -> None:
    code = (
        "import sys\nfrom llm_trainer.cli.main import main\ntry:\n    main(['train', '--help'])\nexcept "
        "SystemExit as end:\n"
        "    print(end.code, [m for m in ('torch', 'numpy', 'tokenizers') if m in sys.modules])"
    )
    assert _python(code).stdout.splitlines()[-1] == "0 []"


def test_every_command_and_script_has_its_function() -> None:
    import importlib

    targets = [(module, "run") for module, _ in COMMANDS.values()] + list(SCRIPTS.values())
    for module, function in targets:
        assert callable(getattr(importlib.import_module(f"llm_trainer.cli.commands.{module}"), function)), (
            module,
            function,
        )


@pytest.mark.parametrize("name", sorted({**SCRIPTS, **NOT_IMPLEMENTED_SCRIPTS}))
def test_a_script_is_a_few_lines_without_logic(name: str) -> None:
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    kinds = [type(node).__name__ for node in tree.body]
    assert kinds == ["Expr", "Import", "ImportFrom", "Expr", "ImportFrom", "If"]
    assert f'script("{name}")' in (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(NOT_IMPLEMENTED_SCRIPTS))
def test_what_is_not_built_yet_says_so_at_once(name: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / name), "--anything"], capture_output=True, text=True, cwd="/", check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[1:] == ["Try 'llm-trainer --help' for the commands that are."]
    assert "not implemented yet" in done.stderr


@pytest.mark.parametrize("door", ALL_DOORS, ids=lambda door: door.name)
def test_every_default_of_a_door_is_a_setting_that_it_reads(door: CommandSpec) -> None:
    loaded = load_run(
        door, ["--model.hidden_size=64", "--model.num_attention_heads=4"] if "model" in door.sections else []
    )
    for dotted, value in door.defaults.items():
        section, _, name = dotted.partition(".")
        found = getattr(getattr(loaded.config, section), name)
        assert found == (Duration(value) if isinstance(found, Duration) else value), dotted  # type: ignore[arg-type]
        assert not getattr(loaded.config, section).is_set(name), f"{dotted} is a default, not said"


@pytest.mark.parametrize(
    ("door", "dotted", "expected"),
    [
        (specs.TRAIN_FRAMEWORK, "model.position_embedding", "rope"),
        (specs.TRAIN_FRAMEWORK, "training.max_steps", 100_000),
        (specs.TRAIN_FROM_FILE, "model.position_embedding", "learned"),
        (specs.TRAIN_FROM_FILE, "training.learning_rate", 1e-4),
        (specs.TRAIN_ALL_IN_ONE, "training.learning_rate", 5e-5),
        (specs.TRAIN_ORCHESTRATOR, "training.max_steps", 600_000),
        (specs.TRAIN_ORCHESTRATOR, "data.dataset", "openwebtext"),
        (specs.TRAIN_ORCHESTRATOR, "model.bias", False),
        (specs.PREPARE_FRAMEWORK, "data.max_length", 2048),
    ],
)
def test_defaults_are_those_of_the_doors_manual(door: CommandSpec, dotted: str, expected: object) -> None:
    section, _, name = dotted.partition(".")
    assert getattr(getattr(load_run(door, []).config, section), name) == expected


def test_explain_prints_every_setting_and_trains_nothing(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--explain", "--d_model=64", "--num_heads=4", "--output_dir=other"]) == 0
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("model.hidden_size"))
    assert "64" in line
    assert "--d_model" in line
    assert "training.warmup_steps" in said
    assert not (place / "other").exists()


def test_the_package_exports_its_names_lazily() -> None:
    code = "import sys, llm_trainer\nfrom llm_trainer import ModelConfig\nassert 'torch' not in sys.modules\n"
    code += "from llm_trainer import Trainer, load_model, Tokenizer, Transformer, EarlyStopping\n"
    code += "print(Trainer.__name__, 'Trainer' in dir(llm_trainer))"
    assert _python(code).stdout.strip() == "Trainer True"
    import llm_trainer

    for name in llm_trainer.__all__:
        assert getattr(llm_trainer, name).__name__ == name
    with pytest.raises(AttributeError, match="Nothing"):
        _ = llm_trainer.Nothing


def test_the_roots_scripts_do_not_shadow_packages(tmp_path: Path) -> None:
    """`evaluate` must be the package that lm-eval imports, also while the root's evaluate.py runs."""
    (tmp_path / "evaluate.py").write_text("MARK = 'the package'", encoding="utf-8")
    code = (
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom llm_trainer.cli.scripts import "
        "_move_scripts_last_on_path\n_move_scripts_last_on_path()\n"
        "import evaluate\nprint(evaluate.MARK)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=False,
    )
    assert done.stdout.strip() == "the package", done.stderr


def test_missing_packages_are_named_in_one_line_with_the_command(tmp_path: Path) -> None:
    """As after the Orchestrator manual's own `pip install` line: pydantic and others are not there."""
    blocked = tmp_path / "sitecustomize.py"
    blocked.write_text(
        "import importlib.machinery as machinery\n"
        "found = machinery.PathFinder.find_spec\n"
        "def find_spec(name, path=None, target=None):\n"
        "    return None if name.partition('.')[0] in ('pydantic', 'safetensors') else found(name, path, "
        "target)\n"
        "machinery.PathFinder.find_spec = find_spec\n",
        encoding="utf-8",
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_refactored.py")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert "pip install pydantic safetensors" in done.stderr


def test_presets_prints_the_manuals_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("enhanced-nano"))
    assert "124.4 M" in line
    assert "125M" in line


def test_training_tells_what_it_is_and_what_to_type_next(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = ["--hidden_size=32", "--num_layers=1", "--num_heads=4", "--max_seq_len=16"]
    assert (
        main(
            [
                "train",
                "--data_dir=data/prepared/text",
                *shape,
                "--max_steps=3",
                "--batch_size=2",
                "--compile=off",
                "--output_dir=told",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    for words in (
        "parameters",
        "training tokens",
        "3 steps",
        "cpu",
        "perplexity",
        "bits per byte",
        "told/best_model",
        "llm-trainer generate told",
    ):
        assert words in said, words
    assert (place / "told/report.html").is_file()


def test_vocabulary_and_context_come_from_the_data_where_they_are_not_said(place: Path) -> None:
    config = json.loads((place / "checkpoints/run.json").read_text(encoding="utf-8"))
    assert config["model"]["vocab_size"] == 300
    assert config["model"]["max_position_embeddings"] == 32


def test_a_preset_gives_way_to_the_tokenizer(place: Path) -> None:
    shape = [
        "--preset=l1-tiny",
        "--hidden_size=32",
        "--intermediate_size=64",
        "--batch_size=2",
        "--max_steps=1",
        "--compile=off",
        "--output_dir=preset",
    ]
    assert main(["train", "--data_dir=data/prepared/text", *shape, "--max_seq_len=16"]) == 0
    assert json.loads((place / "preset/run.json").read_text(encoding="utf-8"))["model"]["vocab_size"] == 300


def test_a_resumed_run_prints_what_changed_and_goes_on_in_its_folder(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--resume=checkpoints/checkpoint_step_4.pt", "--learning_rate=1e-4"]) == 0
    said = capsys.readouterr().out
    assert "learning_rate: 0.0003 → 0.0001" in said
    lines = [
        json.loads(line)
        for line in (place / "checkpoints/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [line["step"] for line in lines if "loss" in line][-1] == 6


def test_resume_auto_begins_where_there_is_nothing_to_resume(place: Path) -> None:
    shape = [
        "--hidden_size=32",
        "--num_layers=1",
        "--num_heads=4",
        "--max_seq_len=16",
        "--batch_size=2",
        "--compile=off",
    ]
    command = [
        "train",
        "--data_dir=data/prepared/text",
        *shape,
        "--max_steps=2",
        "--save_interval=1",
        "--output_dir=auto",
        "--resume=auto",
    ]
    assert main(command) == 0
    assert main(command) == 0
    assert len(list((place / "auto").glob("earlier-*"))) == 0


def test_verify_resume_finds_the_run_exact(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify-resume", "checkpoints", "--steps=4"]) == 0
    assert "exact" in capsys.readouterr().out


def test_verify_resume_says_what_differs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run whose recorded data order is another's: the replay cannot come out the same."""
    from llm_trainer.run_dir import write_manifest

    for checkpoint in (place / "checkpoints").glob("*/run.json"):
        settings = json.loads(checkpoint.read_text(encoding="utf-8"))
        settings["training"]["learning_rate"] = 0.5
        checkpoint.write_text(json.dumps(settings), encoding="utf-8")
        write_manifest(checkpoint.parent)
    assert main(["verify-resume", "checkpoints", "--steps=4"]) == 1
    assert "NOT exact" in capsys.readouterr().out


def test_generate_prints_prompt_and_text_and_the_same_for_the_same_seed(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "checkpoints", "--prompt=line 7", "--max_tokens=12", "--seed=3"]
    assert main(command) == 0
    streamed = capsys.readouterr().out
    assert streamed.startswith("line 7")
    assert main([*command, "--stream=false"]) == 0
    assert capsys.readouterr().out == streamed


def test_a_prompt_can_be_read_from_a_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "prompt.txt").write_text("line 5: the", encoding="utf-8")
    assert main(["generate", "checkpoints", "--start=FILE:prompt.txt", "--max_tokens=3"]) == 0
    assert capsys.readouterr().out.startswith("line 5: the")


def test_evaluate_scores_a_text_as_training_did(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The figure for the prepared folder's held-out split is the best validation loss that training reported."""
    assert main(["evaluate", "checkpoints/best_model", "data/prepared/text"]) == 0
    scored = float(capsys.readouterr().out.partition("loss ")[2].partition(",")[0])
    lines = [
        json.loads(line)
        for line in (place / "checkpoints/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert scored == pytest.approx(min(line["val_loss"] for line in lines if "val_loss" in line), abs=1e-3)


def test_the_all_in_one_model_is_found_under_models_final(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    final = Path("models/all_in_one/final_model")
    final.mkdir(parents=True)
    (final / "model.safetensors").write_text("first", encoding="utf-8")
    publish_final(final)
    publish_final(final)
    assert Path("models/final/model.safetensors").read_text(encoding="utf-8") == "first"


def test_text_for_a_load_pretrained_model_is_prepared_with_its_tokenizer(place: Path) -> None:
    """And dropout and a shorter context may be said beside the weights, which start where the checkpoint
    ended.
    """
    command = [
        "train",
        "--input=text.txt",
        "--data.output_dir=again",
        "--init_from=checkpoints",
        "--output_dir=tuned",
        "--max_steps=1",
    ]
    assert (
        main(
            [
                *command,
                "--batch_size=2",
                "--compile=off",
                "--dropout=0.1",
                "--max_seq_len=16",
                "--eval_at_start",
                "--learning_rate=0",
            ]
        )
        == 0
    )
    settings = json.loads((place / "tuned/run.json").read_text(encoding="utf-8"))
    assert (
        settings["model"]["dropout"],
        settings["model"]["max_position_embeddings"],
        settings["model"]["vocab_size"],
    ) == (0.1, 16, 300)
    losses = [
        json.loads(line) for line in (place / "tuned/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    before = [
        json.loads(line)
        for line in (place / "checkpoints/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    final = next(line["val_loss"] for line in reversed(before) if "val_loss" in line)
    assert next(line["val_loss"] for line in losses if "val_loss" in line) == pytest.approx(final, rel=0.1)


def test_evaluating_only_writes_no_report(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume=checkpoints", "--eval_only"]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llm_trainer", "--version"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.stdout.startswith("llm-trainer ")
