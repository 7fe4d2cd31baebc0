"""What a training prints before its first step and after its last."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llm_trainer.cli.main import main
from llm_trainer.training import trainer

SHAPE = ["--hidden_size", "16", "--num_layers", "1", "--num_heads", "2", "--context_length", "16"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    argv = ["prepare", "--input", str(text), "--output_dir", str(tmp_path / "data")]
    assert main([*argv, "--tokenizer_type", "char", "--val_ratio", "0.1"]) == 0
    return tmp_path / "data"


def test_a_lora_run_says_how_much_is_trained_and_every_run_its_speed_and_memory(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--data_dir", str(data), "--max_steps", "2", "--batch_size", "1"]
    base = str(tmp_path / "base")
    assert main(["train", *common, *SHAPE, "--output_dir", base, "--save_interval", "1"]) == 0
    text = "".join(capsys.readouterr())
    assert "trainable" not in text
    assert "1 sequence × 1 micro-batch × 16 tokens" in text
    assert re.search(r"finished +step 2 after .* tokens, [\d,]+ tok/s", text)
    assert re.search(r"memory +\d+\.\d\d GB at the peak", text)
    assert f"saved {base}/checkpoint-1" in text.replace("\n", "")
    adapters = ["--init_from", base, "--attn_lora_rank", "2", "--output_dir", str(tmp_path / "lora")]
    assert main(["train", *common, *adapters]) == 0
    assert re.search(r"parameters \([\d.]+k? trainable, \d+\.\d\d%\)", "".join(capsys.readouterr()))


def test_a_slow_first_step_is_shown_before_the_first_interval_of_the_log_is_over(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["train", "--data_dir", str(data), *SHAPE, "--max_steps", "3", "--batch_size", "1"]
    assert main([*common, "--output_dir", str(tmp_path / "fast")]) == 0
    assert "step 1/3  loss" not in "".join(capsys.readouterr())
    monkeypatch.setattr(trainer, "_SLOW_STEP_SECONDS", 0.0)
    assert main([*common, "--output_dir", str(tmp_path / "slow")]) == 0
    assert re.search(r"step 1/3  loss \d", "".join(capsys.readouterr()))
    assert '"step": 1,' not in (tmp_path / "slow/metrics.jsonl").read_text()
