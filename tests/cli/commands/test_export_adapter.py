"""`llm-trainer adapter`: what a run has learned as a folder of PEFT's, which peft opens, generate answers
with and a run goes on from.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llm_trainer.cli.main import main
from llm_trainer.inference.load_model import load_model
from llm_trainer.model.adapters.lora import active_adapters
from llm_trainer.model.hf.checkpoint import load_pretrained
from llm_trainer.model.interop.peft_format import load_adapter

IDS = torch.randint(60, (2, 12), generator=torch.Generator().manual_seed(3))
TRAIN = [
    "train",
    "--data_dir=data/prepared/text",
    "--batch_size=4",
    "--max_steps=4",
    "--compile=off",
    "--learning_rate=0.02",
]
OVER_BASE = [*TRAIN, "--init_from=checkpoints/final_model", "--warmup_steps=0"]


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        found = model.eval()(IDS)
    return found if isinstance(found, Tensor) else found.logits


@pytest.fixture(scope="module")
def tuned(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to stand in, with a run of LoRA over the weights of another."""
    folder = tmp_path_factory.mktemp("tuned") / "place"
    shutil.copytree(finished, folder, symlinks=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*OVER_BASE, "--attn_lora_rank=2", "--mlp_lora_rank=1", "--output_dir=tuned"]) == 0
    return folder


@pytest.fixture
def there(tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = tmp_path / "there"
    shutil.copytree(tuned, copy, symlinks=True)
    monkeypatch.chdir(copy)
    return copy


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_peft_opens_what_the_command_writes_with_the_logits_of_the_run(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import AutoPeftModelForCausalLM

    assert main(["export-adapter", "tuned", "mine"]) == 0
    assert "for checkpoints/final_model" in capsys.readouterr().out
    theirs = AutoPeftModelForCausalLM.from_pretrained("mine")
    ours = load_pretrained(there / "tuned" / "final_model")
    assert (logits(ours) - logits(load_pretrained(there / "checkpoints" / "final_model"))).abs().max() > 1e-3
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=1e-5)


def test_generate_and_evaluate_read_it_again(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["export-adapter", "tuned", "mine"])
    said = {}
    for name, model in {
        "run": ["tuned"],
        "folder": ["checkpoints", "--adapter=mine"],
        "base": ["checkpoints"],
    }.items():
        capsys.readouterr()
        assert main(["generate", model[0], "line", *model[1:], "--temperature=0", "--max_new_tokens=20"]) == 0
        assert main(["evaluate", model[0], "text.txt", *model[1:]]) == 0
        said[name] = capsys.readouterr().out
    assert said["run"] == said["folder"] != said["base"]


def test_a_run_goes_on_training_it(there: Path) -> None:
    main(["export-adapter", "tuned", "mine"])
    still = [one if not one.startswith("--learning_rate") else "--learning_rate=0" for one in OVER_BASE]
    assert main([*still, "--adapter_from=mine", "--output_dir=again", "--save_interval=2"]) == 0
    again = load_pretrained(there / "again" / "final_model")
    assert active_adapters(again) == ["default"]
    assert torch.equal(logits(again), logits(load_pretrained(there / "tuned" / "final_model")))
    assert main([*still, "--adapter_from=mine", "--output_dir=again", "--resume=again/checkpoint-2"]) == 0
    assert main(["verify-resume", "again", "--steps=4"]) == 0


def test_merged_it_is_a_plain_model_with_its_tokenizer(there: Path) -> None:
    main(["export-adapter", "tuned", "mine"])
    assert main(["export-adapter", "tuned", "--merged_output=merged"]) == 0
    assert main(["export-adapter", "checkpoints", "--adapter=mine", "--merged_output=merged-folder"]) == 0
    assert not (there / "adapter").exists()
    wanted = logits(load_pretrained(there / "tuned" / "final_model"))
    for folder in ("merged", "merged-folder"):
        plain, _ = load_model(folder, device="cpu")
        assert not plain.model.config.lora
        torch.testing.assert_close(logits(plain.model), wanted, rtol=0, atol=1e-5)


def test_where_the_base_was_trained_too_it_is_written_beside_or_nothing_is(
    there: Path, fails: Callable[..., str]
) -> None:
    assert main([*OVER_BASE, "--attn_lora_rank=2", "--lora_train_base=true", "--output_dir=both"]) == 0
    assert "differs from checkpoints/final_model" in fails("export-adapter", "both", "mine", status=2)
    assert not (there / "mine").exists()
    assert main(["export-adapter", "both", "mine", "--base_output=base"]) == 0
    model = load_pretrained(there / "base")
    assert not model.config.lora
    load_adapter(model, there / "mine")
    assert torch.equal(logits(model), logits(load_pretrained(there / "both" / "final_model")))
    assert (
        json.loads((there / "mine/adapter_config.json").read_text(encoding="utf-8"))[
            "base_model_name_or_path"
        ]
        == "base"
    )


def test_over_a_base_of_four_bits_it_is_written_merged_and_resumed(
    there: Path, fails: Callable[..., str]
) -> None:
    run = [*OVER_BASE, "--attn_lora_rank=2", "--quantize_base=nf4", "--output_dir=four", "--save_interval=2"]
    assert main(run) == 0
    assert "differs from checkpoints/final_model" in fails("export-adapter", "four", "mine", status=2)
    assert main(["export-adapter", "four", "mine", "--base_output=base"]) == 0
    assert main(["export-adapter", "four", "--merged_output=merged"]) == 0
    wanted = logits(load_pretrained(there / "four" / "final_model"))
    model = load_pretrained(there / "base")
    load_adapter(model, there / "mine")
    assert torch.equal(logits(model), wanted)
    torch.testing.assert_close(logits(load_pretrained(there / "merged")), wanted, rtol=0, atol=1e-5)
    assert main(["verify-resume", "four", "--steps=4"]) == 0


def test_what_cannot_be_is_refused_before_anything_is_written(there: Path, fails: Callable[..., str]) -> None:
    assert "it has none" in fails("export-adapter", "checkpoints", "mine", status=2)
    assert "no adapter 'other'; it has default" in fails(
        "export-adapter", "tuned", "mine", "--adapter=other", status=2
    )
    assert "data is not empty" in fails("export-adapter", "tuned", "data", status=2)
    assert "name them with --init_from" in fails(*TRAIN, "--adapter_from=mine", "--output_dir=new", status=2)
    assert not (there / "mine").exists()
    assert not (there / "new").exists()
