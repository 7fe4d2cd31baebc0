"""What bad input gets: one message that names the thing and the way out, an exit status, nothing
half-written.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_trainer.cli.main import main
from llm_trainer.cli.scripts import script

Fails = Callable[..., str]


def test_an_empty_corpus(place: Path, fails: Fails) -> None:
    (place / "empty.txt").write_text("", encoding="utf-8")
    assert "empty.txt" in fails("prepare", "--input=empty.txt", "--output_dir=made", status=1)
    assert not (place / "made/metadata.json").exists()


def test_a_corpus_shorter_than_one_window(place: Path, fails: Fails) -> None:
    (place / "short.txt").write_text("too short", encoding="utf-8")
    said = fails(
        "prepare",
        "--input=short.txt",
        "--output_dir=made",
        "--tokenizer_type=char",
        "--max_length=512",
        status=1,
    )
    assert "short.txt" in said
    assert "512" in said
    assert not (place / "made/metadata.json").exists()


def test_a_corpus_that_is_not_utf8(place: Path, fails: Fails) -> None:
    (place / "latin.txt").write_bytes("Müller grüßt\n".encode("latin-1") * 50)
    said = fails("prepare", "--input=latin.txt", "--output_dir=made", status=1)
    assert "latin.txt" in said
    assert "utf-8" in said


def test_a_missing_corpus(place: Path, fails: Fails) -> None:
    assert "nowhere" in fails("prepare", "--input=nowhere", "--output_dir=made", status=1)


def test_a_missing_data_folder_names_the_command_that_makes_it(place: Path, fails: Fails) -> None:
    said = fails("train", "--data_dir=nowhere", status=1)
    assert "nowhere" in said
    assert "prepare" in said


def test_no_data_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Fails) -> None:
    monkeypatch.chdir(tmp_path)
    assert "--data_dir" in fails("train", status=2)


def test_an_unprepared_data_set_of_nanogpts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Fails
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "openwebtext" in fails("train", "--dataset=openwebtext", status=2)


def test_a_vocabulary_larger_than_the_embedding_names_both(place: Path, fails: Fails) -> None:
    said = fails(
        "train",
        "--data_dir=data/prepared/text",
        "--vocab_size=100",
        "--hidden_size=32",
        "--num_heads=4",
        status=2,
    )
    assert "100" in said
    assert "300" in said


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--hiden_size=32"], "hidden_size"),
        (["--hidden_size=32", "--d_model=64"], "d_model"),
        (["--learning_rate=fast"], "learning_rate"),
        (["--dropout=1.5"], "dropout"),
        (["--temperature=0.5"], "temperature"),
        (["--num_layers"], "num_layers"),
        (["--fp16=true", "--dtype=bfloat16"], "precision"),
        (["--config=missing.yaml"], "missing.yaml"),
        (["--use_deepspeed", "--fp16"], "precision fp16 is not supported with use_deepspeed"),
        (["--use_deepspeed", "--optimizer=muon"], "optimizer muon"),
        (["--use_deepspeed", "--deepspeed_config=missing.json"], "missing.json"),
        (["--zero_stage=3"], "use_deepspeed"),
        (["--batch_size=10", "--micro_batch_size=4"], "micro_batch_size"),
        (["--hidden_size=33", "--num_heads=4"], "33"),
        (["--device=cuda:99"], "cuda"),
    ],
)
def test_a_setting_that_cannot_be_is_named(
    place: Path, fails: Fails, arguments: list[str], named: str
) -> None:
    before = sorted(place.rglob("*"))
    assert named in fails(
        "train", "--data_dir=data/prepared/text", "--output_dir=other", *arguments, status=2
    )
    assert sorted(place.rglob("*")) == before, "nothing is written before the settings are known to be right"


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "train" in capsys.readouterr().err


def test_a_truncated_checkpoint_names_the_file_and_a_whole_one(place: Path, fails: Fails) -> None:
    weights = place / "checkpoints/checkpoint-4/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    said = fails("train", "--resume=checkpoints/checkpoint-4", status=1)
    assert "model.safetensors" in said
    assert "checkpoint-2" in said or "final_model" in said or "best_model" in said


def test_a_missing_checkpoint_lists_those_that_are_there(place: Path, fails: Fails) -> None:
    assert "checkpoint-4" in fails("train", "--resume=checkpoints/checkpoint-99", status=1)


class _Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch ran-the-code",)


def test_a_pt_with_code_in_it_is_refused_and_not_run(place: Path, fails: Fails) -> None:
    import torch

    torch.save({"model": _Code(), "model_args": {}}, place / "evil.pt")
    said = fails("train", "--data_dir=data/prepared/text", "--init_from=evil.pt", status=1)
    assert "evil.pt" in said
    (place / "plain.pt").write_bytes(pickle.dumps(_Code()))
    assert "plain.pt" in fails("generate", "--model=plain.pt", "--prompt=x", status=1)
    assert not (place / "ran-the-code").exists()


def test_a_meta_pkl_with_code_in_it_is_refused_and_not_run(place: Path, fails: Fails) -> None:
    folder = place / "data/evil"
    folder.mkdir(parents=True)
    (folder / "train.bin").write_bytes(bytes(2000))
    (folder / "meta.pkl").write_bytes(pickle.dumps(_Code()))
    assert "meta.pkl" in fails("train", "--dataset=evil", status=1)
    assert not (place / "ran-the-code").exists()


def test_no_disk_space_while_saving_leaves_the_earlier_checkpoints_whole(
    place: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llm_trainer.run_dir import verify
    from llm_trainer.training.checkpoint import snapshot as capture

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "checkpoint")

    monkeypatch.setattr(capture, "write_weights", full)
    said = fails("train", "--resume=checkpoints/checkpoint-4", "--max_steps=6", status=1)
    assert "space" in said
    assert verify(place / "checkpoints/checkpoint-4") == []
    assert not list((place / "checkpoints").glob(".tmp-*"))


def test_changing_the_shape_on_a_resume_is_refused(place: Path, fails: Fails) -> None:
    assert "hidden_size" in fails("train", "--resume=checkpoints/checkpoint-4", "--hidden_size=64", status=2)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--min_learning_rate=0.001"], "training.learning_rate (of the resumed run) is 0.0003"),
        (["--hidden_size=42"], "hidden_size 42 is not divisible by num_attention_heads 4"),
        (["--warmup_steps=7"], "which ends after 6 steps"),
    ],
)
def test_a_contradiction_with_the_run_that_goes_on_is_named(
    place: Path, fails: Fails, arguments: list[str], named: str
) -> None:
    assert named in fails("train", "--resume=checkpoints/checkpoint-4", *arguments, status=2)


def test_a_resume_that_finds_no_run_is_judged_as_a_run_that_begins(place: Path, fails: Fails) -> None:
    said = fails(
        "train",
        "--data_dir=data/prepared/text",
        "--output_dir=new",
        "--resume",
        "--hidden_size=33",
        "--num_heads=4",
        status=2,
    )
    assert "33" in said
    assert not (place / "new").exists()


def test_what_is_said_on_a_resume_is_judged_with_the_runs_own_settings(place: Path) -> None:
    arguments = [
        "--data_dir=data/prepared/text",
        "--hidden_size=32",
        "--num_layers=1",
        "--num_heads=2",
        "--learning_rate=0.01",
    ]
    rest = [
        "--max_length=32",
        "--batch_size=4",
        "--max_steps=2",
        "--compile=off",
        "--output_dir=fast",
        "--report_to=none",
    ]
    assert main(["train", *arguments, *rest]) == 0
    onward = ["--min_learning_rate=0.001", "--hidden_size=32", "--max_steps=3", "--lr_on_resume=extend"]
    assert main(["train", "--resume=fast", *onward]) == 0


def test_a_prompt_with_characters_that_a_character_tokenizer_lacks(place: Path, fails: Fails) -> None:
    shape = [
        "--hidden_size=32",
        "--num_layers=1",
        "--num_heads=4",
        "--max_length=16",
        "--max_steps=2",
        "--batch_size=2",
        "--compile=off",
    ]
    assert (
        main(
            [
                "train",
                "--input=text.txt",
                "--tokenizer_type=char",
                "--data.output_dir=chars",
                *shape,
                "--output_dir=characters",
            ]
        )
        == 0
    )
    said = fails("generate", "--model=characters", "--prompt=Ωmega", status=1)
    assert "Ω" in said


def test_a_report_of_a_folder_that_is_no_run(place: Path, fails: Fails) -> None:
    assert "nowhere" in fails("report", "nowhere", status=1)


def test_metrics_that_are_garbled_are_named(place: Path, fails: Fails) -> None:
    (place / "checkpoints/metrics.jsonl").write_text("not json\n", encoding="utf-8")
    assert "metrics.jsonl" in fails("report", "checkpoints", status=1)


def test_the_traceback_is_shown_when_asked_for(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM_TRAINER_DEBUG", "1")
    assert main(["train", "--data_dir=nowhere"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_leaves_with_its_own_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llm_trainer.cli.commands import presets

    def interrupted(_: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(presets, "run", interrupted)
    assert main(["presets"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_settings_file_with_twins_is_refused(place: Path, fails: Fails) -> None:
    (place / "twins.json").write_text('{"training": {"max_steps": 1, "max_steps": 2}}', encoding="utf-8")
    assert "max_steps" in fails("train", "--config=twins.json", status=2)
    (place / "list.json").write_text(json.dumps([1]), encoding="utf-8")
    assert "list.json" in fails("train", "--config=list.json", status=2)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--data_dir=data/prepared/text", "--input=text.txt"], "input"),
        (["--data_dir=data/prepared/text", "--min_length=5"], "min_length"),
        (["--data_dir=data/prepared/text", "--tokenizer_type=char"], "tokenizer_type"),
    ],
)
def test_a_setting_of_data_that_would_have_no_effect_is_refused(
    place: Path, fails: Fails, arguments: list[str], named: str
) -> None:
    assert named in fails("train", *arguments, status=2)


def test_data_of_another_tokenizer_than_the_load_pretrained_models_is_refused(
    place: Path, fails: Fails
) -> None:
    assert main(["prepare", "--input=text.txt", "--output_dir=other", "--tokenizer_type=char"]) == 0
    said = fails(
        "train",
        "--data_dir=other",
        "--init_from=checkpoints",
        "--output_dir=tuned",
        "--max_steps=1",
        status=1,
    )
    assert "id " in said
    assert "--tokenizer_path checkpoints" in said


def test_a_shape_that_contradicts_pretrained_weights_is_refused(place: Path, fails: Fails) -> None:
    said = fails(
        "train",
        "--data_dir=data/prepared/text",
        "--init_from=checkpoints",
        "--num_layers=5",
        "--output_dir=tuned",
        status=2,
    )
    assert "num_hidden_layers" in said


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["train", "--dropout=2"], "Try 'llm-trainer train --help'."),
        (["train", "--data_dir=nowhere", "--input=text.txt"], "Try 'llm-trainer train --help'."),
        (["train", "--resume=checkpoints", "--hidden_size=42"], "Try 'llm-trainer train --help'."),
        (["generate"], "Try 'llm-trainer generate --help'."),
        (["prepare-domains", "--min_lenght=3"], "Try 'llm-trainer prepare-domains --help'."),
    ],
)
def test_usage_errors_end_with_the_command_that_helps(
    place: Path, fails: Callable[..., str], arguments: list[str], hint: str
) -> None:
    """Wherever they are found: on the command line, in the data, after merging with a resumed run."""
    assert fails(*arguments, status=2).splitlines()[-1] == hint


def test_a_scripts_usage_error_names_the_script(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script("train.py", ["--dropout=2"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "error: invalid value for --dropout: 2 is not in [0, 1)",
        "Try 'python train.py --help'.",
    ]
