"""Metrics are valid and complete, and each step is recorded once."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from paths import SUPPORT
from rich.console import Console
from tiny_run import tiny_config, tiny_model, tiny_run, tokens

from llm_trainer.config import CheckpointError, UsageError
from llm_trainer.diagnostics.verify_resume import StopAtStep
from llm_trainer.training.logging.metrics import MetricsTracker, read_metrics
from llm_trainer.training.logging.progress import ProgressReporter, escape_control_characters
from llm_trainer.training.trainer import Trainer


def write(
    run_folder: Path, steps: range, resumed_step: int | None = None, report_to: tuple[str, ...] = ()
) -> None:
    tracker = MetricsTracker(run_folder, report_to, resumed_step=resumed_step)
    for step in steps:
        tracker.update({"loss": 1 / step}, step)
    tracker.close()


def scalars(run_folder: Path, tag: str) -> dict[int, float]:
    """The values that TensorBoard itself reads."""
    accumulator = importlib.import_module(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator(str(run_folder / "tensorboard"))
    accumulator.Reload()
    return {event.step: event.value for event in accumulator.Scalars(tag)}


def test_lines_are_json_with_step_and_time_and_are_read_back_bit_exactly(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["loss"] for line in lines] == [1.0, 0.5, 1 / 3]
    assert all(line["time"] > 1e9 for line in lines)


def test_values_that_json_lacks_are_strings_in_the_file_and_numbers_when_read(tmp_path: Path) -> None:
    tracker = MetricsTracker(tmp_path)
    tracker.update({"a": math.nan, "b": math.inf, "c": -math.inf}, 1)
    tracker.close()
    json.loads(
        (tmp_path / "metrics.jsonl").read_text(encoding="utf-8"),
        parse_constant=lambda word: pytest.fail(word),
    )
    (line,) = read_metrics(tmp_path)
    assert math.isnan(line["a"])
    assert (line["b"], line["c"]) == (math.inf, -math.inf)


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path: Path) -> None:
    tracker = MetricsTracker(tmp_path)
    tracker.update({"loss": 2.0}, 1)
    assert read_metrics(tmp_path)[0]["loss"] == 2.0
    tracker.close()


def test_a_name_with_a_line_break_cannot_forge_a_line(tmp_path: Path) -> None:
    tracker = MetricsTracker(tmp_path)
    tracker.update({'a\r\n{"step": 9, "loss": 0.0}': 1.0}, 1)
    tracker.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]


def test_a_resumed_run_drops_later_lines_and_a_truncated_one(tmp_path: Path) -> None:
    write(tmp_path, range(1, 6))
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    write(tmp_path, range(4, 7), resumed_step=3)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_resumed_run_has_the_same_lines_as_an_uninterrupted_one(tmp_path: Path) -> None:
    def lines_of(folder: Path) -> list[dict[str, float]]:
        of_the_clock = {"time", "tokens_per_second", "mfu", "memory_gb"}
        measured = ("time/", "system/")
        return [
            {
                name: value
                for name, value in line.items()
                if name not in of_the_clock and not name.startswith(measured)
            }
            for line in read_metrics(folder)
        ]

    tiny_run(tmp_path / "uninterrupted")
    tiny_run(tmp_path / "resumed", callbacks=[StopAtStep(8)])
    tiny_run(tmp_path / "resumed", resume_from=str(tmp_path / "resumed" / "checkpoint-6"))
    assert lines_of(tmp_path / "resumed") == lines_of(tmp_path / "uninterrupted")


def test_an_invalid_line_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("[]\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl has a line"):
        read_metrics(tmp_path)


def test_tensorboard_reads_both_folders_of_the_manuals(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4), report_to=("tensorboard",))
    assert scalars(tmp_path, "loss") == pytest.approx({1: 1.0, 2: 0.5, 3: 1 / 3})
    assert (tmp_path / "tensorboard").is_symlink()
    assert list((tmp_path / "logs").glob("events.out.tfevents.*"))
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_tensorboard_replaces_steps_that_a_resumed_run_repeats(tmp_path: Path) -> None:
    write(tmp_path, range(1, 6), report_to=("tensorboard",))
    tracker = MetricsTracker(tmp_path, ("tensorboard",), resumed_step=2)
    tracker.update({"loss": 9.0}, 3)
    tracker.close()
    assert scalars(tmp_path, "loss") == pytest.approx({1: 1.0, 2: 0.5, 3: 9.0})


def test_a_run_folder_that_was_moved_keeps_its_link(tmp_path: Path) -> None:
    write(tmp_path / "a", range(1, 3), report_to=("tensorboard",))
    (tmp_path / "a").rename(tmp_path / "b")
    assert scalars(tmp_path / "b", "loss") == pytest.approx({1: 1.0, 2: 0.5})


def test_writing_events_needs_neither_tensorflow_nor_torchs_writer(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from llm_trainer.training.logging.metrics import MetricsTracker\n"
        f"tracker = MetricsTracker(Path({str(tmp_path)!r}), ['tensorboard'])\n"
        "tracker.update({'loss': 1.0}, 1); tracker.close()\n"
        "assert not {'tensorflow', 'torch', 'torch.utils.tensorboard'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_wandb_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match=r"llm-trainer\[wandb\]"):
        MetricsTracker(tmp_path, ("wandb",))


@pytest.mark.slow
def test_wandb_offline_records_the_run_and_a_resume_continues_its_id(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    code = (
        "import sys; from pathlib import Path; from tiny_run import tiny_config\n"
        "from llm_trainer.training.logging.metrics import MetricsTracker\n"
        "folder, step = Path(sys.argv[1]), int(sys.argv[2])\n"
        "config = tiny_config(folder, wandb_project='shelf', wandb_run_name='book')\n"
        "tracker = MetricsTracker(folder, ['wandb'], resumed_step=step or None, config=config)\n"
        "tracker.update({'loss': 1.5}, step + 1); tracker.close()"
    )
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    ids = []
    for step in ("0", "1"):
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), step], check=True, cwd=SUPPORT, env=environment
        )
        ids.append((tmp_path / "wandb_run_id").read_text(encoding="utf-8").strip())
    assert ids[0] == ids[1]
    runs = list((tmp_path / "wandb").glob(f"offline-run-*-{ids[0]}"))
    assert runs
    assert any(b"shelf" in path.read_bytes() for run in runs for path in run.glob("*.wandb"))


@pytest.mark.slow
def test_wandb_keeps_steps_that_are_repeated_after_a_rollback(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    code = (
        "import sys; from pathlib import Path\n"
        "from llm_trainer.training.logging.metrics import MetricsTracker\n"
        "tracker = MetricsTracker(Path(sys.argv[1]), ['wandb'])\n"
        "steps = ((1, 0.5), (2, 0.25), (3, 9.0625), (2, 0.1875), (3, 0.09375))\n"
        "[tracker.update({'loss': loss}, step) for step, loss in steps]\n"
        "tracker.close()"
    )
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)
    [kept] = [path.read_bytes() for path in (tmp_path / "wandb").glob("offline-run-*/*.wandb")]
    assert [loss for loss in (b"0.5", b"0.25", b"9.0625", b"0.1875", b"0.09375") if loss not in kept] == []


def test_a_subclass_can_log_its_own_metrics(tmp_path: Path) -> None:
    """As the manual writes it."""

    class Custom(Trainer):
        def _log_metrics(self, loss: float) -> None:
            super()._log_metrics(loss)
            self.metrics_tracker.update({"squared": loss**2}, self.current_step)

    config = tiny_config(tmp_path)
    Custom(tiny_model(config.model), config, tokens(), console=Console(quiet=True)).train()
    lines = read_metrics(tmp_path)
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert {line["step"]: line["squared"] for line in lines if "squared" in line} == pytest.approx(
        {step: loss**2 for step, loss in losses.items()}
    )


def test_without_a_terminal_there_are_plain_lines_at_log_steps_and_no_bar(tmp_path: Path) -> None:
    out = StringIO()
    tiny_run(tmp_path, console=Console(file=out, width=200), logging_steps=5)
    text = out.getvalue()
    assert "\x1b" not in text
    assert "\r" not in text
    assert [line.split()[1] for line in text.splitlines() if "loss" in line and "val_loss" not in line] == [
        "5/10",
        "10/10",
    ]
    assert text.count("val_loss") == 3


def test_on_a_terminal_there_is_a_bar_with_loss_learning_rate_and_throughput(tmp_path: Path) -> None:
    out = StringIO()
    reporter = ProgressReporter(10, console=Console(file=out, width=200, force_terminal=True))
    reporter.show_metrics(5, {"loss": 2.5, "learning_rate": 1e-3, "tokens_per_second": 1234.0})
    reporter.print_line("step 5  val_loss 2.0")
    reporter.close()
    for shown in ("5/10", "loss 2.5000", "lr 1.00e-03", "1,234 tok/s", "val_loss 2.0"):
        assert shown in out.getvalue()


def test_the_bar_follows_a_changed_length_of_the_run() -> None:
    out = StringIO()
    reporter = ProgressReporter(10, console=Console(file=out, width=200, force_terminal=True))
    reporter.advance(5, 7)
    reporter.print_line("something")  # draws the bar anew
    reporter.close()
    assert "5/7" in out.getvalue()


def test_control_characters_in_text_from_outside_are_escaped(tmp_path: Path) -> None:
    hostile = "run\r\n2026-01-01 00:00:00 forged\x1b[2J\u2028x\x00"
    assert escape_control_characters(hostile) == "run\\r\\n2026-01-01 00:00:00 forged\\x1b[2J\\u2028x\\x00"
    out = StringIO()
    reporter = ProgressReporter(10, console=Console(file=out), log_folder=tmp_path)
    reporter.print_line(hostile)
    reporter.print_line("[red]markup[/red] is text")
    reporter.close()
    log = (tmp_path / "logs" / "train.log").read_text(encoding="utf-8")
    assert len(log.splitlines()) == 2
    assert "[red]markup[/red]" in log
    assert "[red]markup[/red]" in out.getvalue()
    assert "\x1b" not in out.getvalue() + log


def test_file_logging_can_be_switched_off(tmp_path: Path) -> None:
    tiny_run(tmp_path / "on", max_steps=2)
    tiny_run(tmp_path / "off", max_steps=2, file_logging=False)
    assert "step 1/2" in (tmp_path / "on" / "logs" / "train.log").read_text(encoding="utf-8")
    assert not (tmp_path / "off" / "logs").exists()
