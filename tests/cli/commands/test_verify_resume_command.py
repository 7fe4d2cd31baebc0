"""`verify-resume` builds again all that made the run: its schedule, and the weights that it took from another
model.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_trainer.cli.main import main

RUN = [
    "--data_dir=data/prepared/text",
    "--hidden_size=32",
    "--num_layers=2",
    "--num_heads=4",
    "--max_length=32",
    "--batch_size=4",
]
RUN += ["--compile=off", "--max_steps=8", "--warmup_steps=1"]
GROWTH = [
    {"name": "change_lr", "value": 0.5, "max_wait_iters": 3},
    {"name": "stack_layers", "value": [0, 0, 1, 1], "max_wait_iters": 2},
    {"name": "set_lr", "value": 1e-3, "trigger_loss": 1e-3},
]


def verified(capsys: pytest.CaptureFixture[str], steps: int = 4) -> str:
    capsys.readouterr()
    status = main(["verify-resume", "run", f"--steps={steps}"])
    said = capsys.readouterr().out
    assert status == 0, said
    return said


@pytest.mark.parametrize(("saves", "steps"), [(4, 4), (5, 4), (100, 8)])
def test_a_run_with_a_schedule_is_exact_from_a_checkpoint_and_from_its_beginning(
    place: Path, capsys: pytest.CaptureFixture[str], saves: int, steps: int
) -> None:
    (place / "growth.json").write_text(json.dumps(GROWTH), encoding="utf-8")
    settings = [
        "--scaling_schedule_file=growth.json",
        f"--save_interval={saves}",
        "--eval_interval=100",
        "--output_dir=run",
    ]
    assert main(["train", *RUN, *settings]) == 0
    said = verified(capsys, steps)
    assert f"steps {max(0, 8 - steps) if saves != 5 else 5} to 8: exact" in said
    assert "against final_model of the run: bit-exactly equal" in said


def test_a_run_with_transferred_weights_is_exact_from_its_beginning(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--transfer_from=checkpoints", "--save_interval=3", "--eval_interval=100", "--output_dir=run"]
    assert main(["train", *RUN, *settings]) == 0
    for name in ("checkpoint-6", "final_model"):
        (place / "run" / name / "state.json").unlink()
    said = verified(capsys)
    assert "steps 0 to 3: exact" in said
    assert "against checkpoint-3" in said


def test_the_copy_of_a_run_at_an_address_is_left_as_it_is(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def there() -> dict[str, bytes]:
        copy = place / "bucket"
        return {
            path.relative_to(copy).as_posix(): path.read_bytes() for path in copy.rglob("*") if path.is_file()
        }

    settings = [
        "--save_interval=4",
        "--eval_interval=4",
        "--output_dir=run",
        f"--remote_dir=file://{place}/bucket",
    ]
    assert main(["train", *RUN, *settings]) == 0
    before = there()
    assert {
        "checkpoint-4/manifest.json",
        "best_model/manifest.json",
        "final_model/manifest.json",
    } <= before.keys()
    assert "exact" in verified(capsys, 8)
    assert there() == before
