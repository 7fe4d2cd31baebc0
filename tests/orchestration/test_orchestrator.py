"""Which operations fire, when, what they change and log, and that an interrupted run ends as the
uninterrupted one.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_run import tiny_trainer

from llm_trainer.config import UsageError
from llm_trainer.config.schema.scaling_schedule import Operation
from llm_trainer.diagnostics.verify_resume import StopAtStep, compare_checkpoints
from llm_trainer.model.adapters.lora import is_adapter_parameter
from llm_trainer.orchestration.orchestrator import Orchestrator, dry_run_schedule, trigger_of
from llm_trainer.reporting.run_report import write_report
from llm_trainer.training.callbacks.callback import Callback
from llm_trainer.training.logging.metrics import read_metrics
from llm_trainer.training.run import TrainingRun
from llm_trainer.training.trainer import Trainer

NO_LOSS_YET = 1e9


def after(steps: int, name: str, value: object = None, **more: Any) -> Operation:
    return Operation(name=name, value=value, max_wait_iters=steps, **more)


def trained(folder: Path, schedule: list[Operation], *callbacks: Callback, **settings: Any) -> Trainer:
    trainer = tiny_trainer(folder, callbacks=[Orchestrator(schedule), *callbacks], **settings)
    trainer.train()
    return trainer


def journal(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in (folder / "operations.jsonl").read_text(encoding="utf-8").splitlines()
    ]


@pytest.mark.parametrize(
    ("entry", "loss", "waited", "fires"),
    [
        ({"trigger_loss": 2.0}, 1.99, 0, True),
        ({"trigger_loss": 2.0}, 2.0, 10_000, False),
        ({"trigger_loss": 2.0}, None, 10_000, False),
        ({"trigger_loss": float("inf")}, 9.0, 0, True),
        ({"trigger_loss": float("inf")}, None, 0, False),
        ({"trigger_loss": 2.0}, float("nan"), 0, False),
        ({"max_wait_iters": 5}, None, 4, False),
        ({"max_wait_iters": 5}, None, 5, True),
        ({"max_wait_iters": 0}, None, 0, True),
        ({"trigger_loss": 2.0, "max_wait_iters": 5}, 3.0, 5, True),
        ({"trigger_loss": 2.0, "max_wait_iters": 5}, 1.0, 0, True),
    ],
)
def test_an_entry_fires_below_its_loss_or_after_its_wait(
    entry: dict[str, Any], loss: float | None, waited: int, fires: bool
) -> None:
    assert (trigger_of(Operation(name="change_lr", value=0.5, **entry), loss, waited) is not None) == fires


def test_only_the_first_pending_entry_fires_and_the_wait_restarts(tmp_path: Path) -> None:
    schedule = [after(3, "change_lr", 0.5), after(2, "change_lr", 0.5), after(0, "change_lr", 0.5)]
    trained(tmp_path, schedule)
    assert [(line["entry"], line["step"]) for line in journal(tmp_path)] == [(1, 3), (2, 5), (3, 5)]


def test_the_first_loss_is_that_of_step_0(tmp_path: Path) -> None:
    schedule = [
        Operation(name="set_lr", value=0.5, trigger_loss=NO_LOSS_YET),
        Operation(name="set_lr", value=0.25, trigger_loss=0.0),
    ]
    trainer = trained(tmp_path, schedule)
    assert [line["step"] for line in journal(tmp_path)] == [0]
    assert trainer.run.state.operations.factor == pytest.approx(0.5 / 1e-2)


def test_after_an_entry_has_fired_the_next_is_checked_at_once_with_the_same_loss_or_the_new_one(
    tmp_path: Path,
) -> None:
    loss = Operation(name="stack_layers", value=[0, 0, 1, 1], trigger_loss=NO_LOSS_YET, reevaluate=True)
    trained(tmp_path, [loss, Operation(name="change_lr", value=0.5, trigger_loss=NO_LOSS_YET)])
    first, second = journal(tmp_path)
    assert first["step"] == second["step"] == 0
    assert first["loss_after"] != first["loss_before"]
    assert second["loss_before"] == first["loss_after"]


@pytest.mark.parametrize(
    ("name", "value", "field", "expected"),
    [
        ("change_lr", 0.5, "lr", 0.005),
        ("set_lr", 0.003, "lr", 0.003),
        ("change_batch_size", 2, "micro", 8),
        ("set_batch_size", 3, "micro", 3),
        ("change_grad_accum", 2, "accumulation", 4),
        ("set_grad_accum", 1, "accumulation", 1),
        ("change_warmup_iters", 2, "warmup", 4),
        ("set_warmup_iters", 0, "warmup", 0),
        ("set_eval_iters", 1, "eval_iters", 1),
        ("change_eval_interval", 0.5, "eval_interval", 2),
        ("set_eval_interval", 3, "eval_interval", 3),
    ],
)
def test_settings_take_effect(tmp_path: Path, name: str, value: float, field: str, expected: float) -> None:
    trainer = trained(tmp_path, [after(2, name, value)], max_steps=6)
    found = {
        "lr": trainer.run.training.learning_rate * trainer.run.state.operations.factor,
        "micro": trainer.run.batches.micro_batch_size,
        "accumulation": trainer.run.batches.gradient_accumulation_steps,
        "warmup": trainer.run.state.schedule.warmup_steps if trainer.run.state.schedule else None,
        "eval_iters": trainer.run.state.overrides.eval_iters,
        "eval_interval": trainer.run.state.overrides.eval_interval,
    }
    assert found[field] == pytest.approx(expected)
    if field in ("micro", "accumulation"):
        assert trainer.run.state.samples == 2 * 8 + 4 * trainer.run.sequences_per_step
    if field == "eval_interval":
        validated = [line["step"] for line in read_metrics(tmp_path) if "val_loss" in line]
        assert validated == [
            step for step in range(1, 7) if step % expected == 0 and (step > 2 or step % 4 == 0)
        ]


def test_the_rate_warms_up_again_from_a_reset(tmp_path: Path) -> None:
    trained(tmp_path, [after(5, "reset_lr_schedule")], lr_decay_steps=100, warmup_steps=2)
    rates = [line["learning_rate"] for line in read_metrics(tmp_path) if "learning_rate" in line]
    assert rates[5] == pytest.approx(rates[0])
    assert rates[6] == pytest.approx(rates[1])
    assert rates[4] > rates[5]


def test_a_run_by_epochs_sees_as_many_samples_with_other_batches(tmp_path: Path) -> None:
    trainer = trained(tmp_path, [after(2, "change_batch_size", 2)], max_steps=None, num_epochs=1)
    assert trainer.run.state.samples == 16 + 32
    assert trainer.run.state.step == 4


def test_the_end_that_is_shown_follows_the_batches(tmp_path: Path) -> None:
    trained(tmp_path, [after(2, "change_batch_size", 2)], max_steps=None, num_epochs=1)
    lines = (tmp_path / "logs" / "train.log").read_text(encoding="utf-8").splitlines()
    assert [line.split()[3] for line in lines if " tok/s" in line] == ["1/5", "2/5", "3/4", "4/4"]


def test_the_event_in_console_log_and_tensorboard_says_what_fired_and_why(tmp_path: Path) -> None:
    console = Console(width=400, file=(tmp_path / "console.txt").open("w", encoding="utf-8"))
    schedule = [
        Operation(name="widen_mlp", value=96, trigger_loss=NO_LOSS_YET, reevaluate=True, desc="wider")
    ]
    trained(tmp_path / "run", schedule, console=console, report_to=["tensorboard"])
    (line,) = journal(tmp_path / "run")
    assert line["parameters_after"] - line["parameters_before"] == 2 * 32 * (2 * 16 + 1)
    assert line["loss_after"] == pytest.approx(line["loss_before"], abs=1e-5)
    console.file.close()
    text = (tmp_path / "console.txt").read_text(encoding="utf-8")
    assert f"widen_mlp 96 (loss {line['loss_before']:.4f} below 1e+09" in text
    assert "(wider)" in text
    events = b"".join(path.read_bytes() for path in (tmp_path / "run/logs").glob("events*"))
    assert b"widen_mlp 96" in events
    assert {"operation": 1.0}.items() <= next(
        one for one in read_metrics(tmp_path / "run") if "operation" in one
    ).items()


GROWTH = [
    after(3, "stack_layers", [0, 0, 1, 1]),
    after(2, "widen_mlp", 96),
    after(0, "freeze_layer", ["attn.0", "wte"]),
    after(1, "widen_model", [32, 4]),
    after(0, "change_batch_size", 0.5),
    after(1, "unfreeze_layer", "attn.0"),
    after(0, "reset_lr_schedule"),
    after(1, "set_attn_lora_rank", 2),
]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_interrupted_anywhere_the_run_ends_where_the_uninterrupted_one_ends(
    tmp_path: Path, optimizer: str
) -> None:
    """Before, between and right after operations: a checkpoint of every step is gone on from, to the last
    bit.
    """
    settings: dict[str, Any] = {"optimizer": optimizer, "save_interval": 1, "save_total_limit": None}
    trainer = trained(tmp_path / "straight", GROWTH, **settings)
    assert len(journal(tmp_path / "straight")) == len(GROWTH)
    assert trainer.model.config.hidden_size == 32
    for step in (2, 3, 5, 6, 7, 9):
        resumed = tmp_path / f"from-{step}"
        trained(resumed, GROWTH, **settings, resume_from=str(tmp_path / "straight" / f"checkpoint-{step}"))
        assert compare_checkpoints(tmp_path / "straight/final_model", resumed / "final_model") == [], step


@pytest.mark.parametrize(
    ("thaw", "freeze"),
    [
        (after(2, "unfreeze_layer", "wte"), after(2, "freeze_layer", "wte")),
        (after(2, "set_embedding_finetune_mode", True), after(2, "set_embedding_finetune_mode", False)),
    ],
    ids=lambda operation: operation.name,
)
def test_a_part_that_is_frozen_again_keeps_its_optimizer_state_over_a_resume(
    tmp_path: Path, thaw: Operation, freeze: Operation
) -> None:
    schedule = [thaw, freeze, after(3, "unfreeze_layer", "wte")]
    settings: dict[str, Any] = {"freeze_layers": ["wte"], "save_interval": 1, "save_total_limit": None}
    trained(tmp_path / "straight", schedule, **settings)
    for step in (5, 7):
        resumed = tmp_path / f"from-{step}"
        trained(resumed, schedule, **settings, resume_from=str(tmp_path / "straight" / f"checkpoint-{step}"))
        assert compare_checkpoints(tmp_path / "straight/final_model", resumed / "final_model") == [], step


def test_a_run_resumed_in_its_own_folder_logs_each_operation_once(tmp_path: Path) -> None:
    trained(tmp_path, GROWTH, StopAtStep(5))
    trained(tmp_path, GROWTH, resume_from=str(tmp_path))
    assert [line["entry"] for line in journal(tmp_path)] == list(range(1, len(GROWTH) + 1))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"max_wait_iters": 1, "reevaluate": True}, "entry 2.*reevaluate.*no validation split"),
        ({"trigger_loss": 2.0}, "entry 2.*trigger_loss 2.*no validation split"),
        ({"trigger_loss": float("inf")}, "entry 2.*trigger_loss inf.*no validation split"),
        ({"trigger_loss": 2.0, "max_wait_iters": 500}, "entry 2.*trigger_loss 2.*no validation split"),
        ({"trigger_loss": float("inf"), "max_wait_iters": 0}, None),
        ({"max_wait_iters": 3}, None),
    ],
)
def test_an_entry_that_needs_a_loss_is_refused_without_a_validation_split(
    tmp_path: Path, entry: dict[str, Any], message: str | None
) -> None:
    trainer = tiny_trainer(tmp_path)
    schedule = [after(1, "change_lr", 0.5), Operation(name="change_lr", value=0.5, **entry)]
    assert len(dry_run_schedule(schedule, trainer.run)) == 3
    trainer.run.eval_dataset = None
    with pytest.raises(UsageError, match=message) if message else contextlib.nullcontext():
        dry_run_schedule(schedule, trainer.run)


@pytest.mark.parametrize("comes", ["set_attn_lora_rank", "set_embedding_lora_rank"])
def test_the_base_is_frozen_when_an_operation_adds_adapters_to_be_trained_alone(
    tmp_path: Path, comes: str
) -> None:
    schedule = [
        after(2, comes, 2),
        after(2, "unfreeze_layer", "mlp.1"),
        after(1, "set_layer_lora_rank", ["mlp.0", 2]),
    ]
    settings: dict[str, Any] = {
        "model": {"lora_train_base": False, "tie_word_embeddings": False},
        "save_interval": 1,
    }
    trainer = trained(tmp_path / "straight", schedule, **settings, save_total_limit=None)
    learning = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert all(is_adapter_parameter(name) or name.startswith("blocks.1.mlp.") for name in learning)
    assert any(is_adapter_parameter(name) for name in learning)
    assert any(name.startswith("blocks.1.mlp.up_proj.weight") for name in learning), (
        "what was let go stays so when more adapters come"
    )
    trained(tmp_path / "resumed", schedule, **settings, resume_from=str(tmp_path / "straight/checkpoint-3"))
    assert compare_checkpoints(tmp_path / "straight/final_model", tmp_path / "resumed/final_model") == []


def test_fired_entries_of_the_schedule_may_not_change_and_later_ones_may(tmp_path: Path) -> None:
    trained(tmp_path, GROWTH, StopAtStep(3))
    other = [after(3, "stack_layers", [0, 1, 1, 1]), *GROWTH[1:]]
    with pytest.raises(UsageError, match="entry 1 of the schedule is stack_layers"):
        trained(tmp_path, other, resume_from=str(tmp_path))
    with pytest.raises(UsageError, match="only 0 entries"):
        trained(tmp_path, [], resume_from=str(tmp_path))
    trainer = trained(tmp_path, GROWTH[:1], resume_from=str(tmp_path))
    assert trainer.model.config.num_hidden_layers == 4


def test_a_frozen_part_stays_as_it_is_while_the_rest_moves(tmp_path: Path) -> None:
    class Watch(Callback):
        def __init__(self) -> None:
            self.seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def on_step_end(self, run: TrainingRun, step: int) -> None:
            parts = [
                dict(run.model.named_parameters())[f"blocks.{layer}.mlp.up_proj.weight"] for layer in (0, 1)
            ]
            self.seen[step] = (parts[0].detach().clone(), parts[1].detach().clone())

    watch = Watch()
    trained(tmp_path, [after(3, "freeze_layer", "mlp.0"), after(4, "unfreeze_layer", "mlp.*")], watch)
    assert torch.equal(watch.seen[3][0], watch.seen[7][0])
    assert not torch.equal(watch.seen[3][1], watch.seen[7][1])
    assert not torch.equal(watch.seen[7][0], watch.seen[8][0])


def test_each_merge_restarts_adapters_in_other_directions_without_optimizer_state(tmp_path: Path) -> None:
    class Watch(Callback):
        def __init__(self) -> None:
            self.a: list[torch.Tensor] = []
            self.state: list[set[str]] = []

        def between_steps(self, run: TrainingRun, step: int, validation: object) -> None:
            form = run.engine.model_state()
            self.a.append(form.weights["blocks.0.attn.q_proj.lora.default.a"].clone())
            self.state.append(set(form.optimizer_state))

    watch, adapters = Watch(), {"attn_lora_rank": 2}
    trained(
        tmp_path,
        [after(2, "merge_lora_weights"), after(2, "merge_lora_weights")],
        watch,
        model=adapters,
        max_steps=6,
    )
    starts = [watch.a[0], watch.a[2], watch.a[4]]
    assert int(torch.linalg.matrix_rank(torch.cat(starts))) == 6
    assert not any(".lora." in name for name in watch.state[2] | watch.state[4])
    assert any(".lora." in name for name in watch.state[1] & watch.state[3])
    assert "blocks.0.attn.q_proj.weight" in watch.state[2]


def test_a_corrupt_newest_checkpoint_falls_back_to_one_of_another_shape(tmp_path: Path) -> None:
    schedule = [after(4, "stack_layers", [0, 0, 1, 1])]
    settings: dict[str, Any] = {"save_interval": 1, "save_total_limit": None}
    trained(tmp_path / "straight", schedule, **settings)
    trained(tmp_path / "cut", schedule, StopAtStep(5), **settings)
    for name in ("final_model", "checkpoint-4", "checkpoint-5"):
        path = tmp_path / "cut" / name / "model.safetensors"
        if path.exists():
            path.write_bytes(path.read_bytes()[:-8])
    trained(tmp_path / "cut", schedule, **settings, resume_from=str(tmp_path / "cut"))
    assert compare_checkpoints(tmp_path / "straight/final_model", tmp_path / "cut/final_model") == []


def test_the_report_marks_the_operations_on_its_curves(tmp_path: Path) -> None:
    trained(tmp_path, [after(3, "widen_mlp", 96, reevaluate=True), after(2, "change_lr", 0.5)])
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert page.count("<title>step 3: widen_mlp 96") == 4  # loss, rate, throughput, norm
    assert "<h2>Operations</h2>" in page
