"""Writes a run's metrics: always to `metrics.jsonl`, and to TensorBoard and Weights & Biases on request.

`metrics.jsonl` is the record: one JSON object per line, `step` and `time` (seconds since 1970) first. Each
line is appended at once, so a kill costs at most the line being written, and a full disk leaves no torn line.
JSON has no NaN; such values are the strings "NaN", "Infinity" and "-Infinity", and `read_metrics` converts
them back. A resumed run first drops the lines past the step it resumes from: every step is recorded once, by
the run that the weights come from.

TensorBoard events are written with TensorBoard's own record writer and protocol buffers.
`torch.utils.tensorboard` would do the same through numpy, and through TensorFlow where that is installed,
which alone takes seconds to import.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

from llm_trainer.errors import CheckpointError, UsageError
from llm_trainer.run_dir import LOGS_FOLDER, METRICS_FILE, TEMPORARY_PREFIX, TENSORBOARD_LINK, WANDB_ID_FILE
from llm_trainer.training.logging.append_file import AppendFile

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event

    from llm_trainer.config import RunConfig

MetricLine = dict[str, float]

_WANDB_WAYS = (
    "run `wandb login`, set WANDB_API_KEY, set WANDB_MODE=offline to keep the run on this machine, or remove "
    "wandb from report_to"
)
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsWriter(Protocol):
    """A destination of metrics."""

    def write(self, metrics: Mapping[str, float], step: int, seconds: float) -> None:
        """Record the metrics of a step.

        Args:
            metrics: Name → value.
            step: The step.
            seconds: The time, in seconds since 1970.
        """

    def close(self) -> None:
        """Flush and close the destination."""


class MetricsTracker:
    """Writes metrics to `metrics.jsonl` and to every destination of `report_to`.

    Args:
        run_folder: The run folder; None to write nothing, on ranks other than the main one.
        report_to: "tensorboard", "wandb", both or neither.
        resumed_step: The step that a resumed run continues from; lines of later steps are dropped. (Metrics
        of
            another run in the same folder have been moved away by `CheckpointStore.begin`.)
        config: Gives Weights & Biases its project, run name and settings.

    Raises:
        UsageError: A destination needs a package that is not installed.
    """

    def __init__(
        self,
        run_folder: Path | None,
        report_to: Sequence[str] = (),
        *,
        resumed_step: int | None = None,
        config: RunConfig | None = None,
    ) -> None:
        self._writers: list[MetricsWriter] = []
        if run_folder is None:
            return
        run_folder.mkdir(parents=True, exist_ok=True)
        self._writers = [JsonLinesWriter(run_folder / METRICS_FILE, resumed_step)]
        if "tensorboard" in report_to:
            self._writers.append(TensorBoardWriter(run_folder, resumed_step))
        if "wandb" in report_to:
            self._writers.append(WandbWriter(run_folder, config))

    def update(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics (numbers, or tensors of one element) at a step."""
        plain = {str(name): float(value) for name, value in metrics.items()}
        now = time.time()
        for writer in self._writers:
            writer.write(plain, step, now)

    def add_text(self, tag: str, text: str, step: int) -> None:
        """Record a line of text at a step, where the destination has texts: in TensorBoard."""
        for writer in self._writers:
            if isinstance(writer, TensorBoardWriter):
                writer.add_text(tag, text, step)

    def close(self) -> None:
        """Flush and close every destination; `update` must not be called after it."""
        for writer in self._writers:
            writer.close()
        self._writers = []


def read_metrics(run_folder: Path) -> list[MetricLine]:
    """Return the lines of a run's `metrics.jsonl` in order, each with `step` and `time`.

    A truncated last line, which a kill may leave, is skipped. Without the file the result is empty.

    Raises:
        CheckpointError: A line is not a JSON object of numbers.
    """
    path = run_folder / METRICS_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    complete = text[: text.rfind("\n") + 1]
    try:
        return [_decode(line) for line in complete.splitlines()]
    except ValueError as error:
        raise CheckpointError(
            f"{path} has a line that is not a JSON object of numbers ({error}); repair or remove the line"
        ) from error


class JsonLinesWriter:
    """Writes `metrics.jsonl`, to which a run only appends."""

    def __init__(self, path: Path, resumed_step: int | None) -> None:
        if path.exists() and resumed_step is not None:
            _keep_until(path, resumed_step)
        self._file = AppendFile(path)

    def write(self, metrics: Mapping[str, float], step: int, seconds: float) -> None:
        """Append one line. On a full disk it is left out completely, and the error names the file."""
        values = {
            name: value if math.isfinite(value) else _non_finite_name(value)
            for name, value in metrics.items()
        }
        self._file.write(
            json.dumps({"step": step, "time": round(seconds, 3), **values}, allow_nan=False) + "\n"
        )

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardWriter:
    """Writes TensorBoard events to `logs/`, to which `tensorboard` is a link.

    The manuals use both names with `tensorboard --logdir`.
    """

    def __init__(self, run_folder: Path, resumed_step: int | None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        logs = run_folder / LOGS_FOLDER
        logs.mkdir(parents=True, exist_ok=True)
        _link(run_folder / TENSORBOARD_LINK, logs)
        seconds = time.time_ns() // 1_000_000_000
        process = f"{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        name = f"events.out.tfevents.{seconds}.{process}"
        self._file = AppendFile(logs / name)
        self._records = RecordWriter(self._file)
        self._event, self._summary = Event, Summary
        self._put(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if resumed_step is not None:
            # TensorBoard then hides the values of this step and later ones in earlier files.
            self._put(
                Event(
                    wall_time=time.time(),
                    step=resumed_step + 1,
                    session_log=SessionLog(status=SessionLog.START),
                )
            )

    def write(self, metrics: Mapping[str, float], step: int, seconds: float) -> None:
        """Append one event with all metrics and flush it."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._put(self._event(wall_time=seconds, step=step, summary=self._summary(value=values)))

    def add_text(self, tag: str, text: str, step: int) -> None:
        """Append an event that TensorBoard shows in its Text tab."""
        from tensorboard.compat.proto.summary_pb2 import SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING

        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()], tensor_shape=shape)
        kind = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        value = self._summary.Value(tag=tag, metadata=kind, tensor=tensor)
        self._put(self._event(wall_time=time.time(), step=step, summary=self._summary(value=[value])))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _put(self, event: Event) -> None:
        self._records.write(event.SerializeToString())
        self._file.flush()


class WandbWriter:
    """Writes to Weights & Biases; WANDB_MODE=offline keeps the run on this machine.

    A resumed run continues under the id that is stored in the run folder. The run's step is logged as a
    metric of its own, over which charts are drawn: W&B's built-in step must never decrease, and metrics at a
    lower step are dropped, so the steps after a rollback would be lost.
    """

    def __init__(self, run_folder: Path, config: RunConfig | None) -> None:
        wandb = _import_wandb()
        id_file = run_folder / WANDB_ID_FILE
        known = id_file.read_text(encoding="utf-8").strip() if id_file.exists() else None
        training = config.training if config is not None else None
        try:
            self._run = wandb.init(
                project=(training.wandb_project if training else None) or "llm-trainer",
                name=training.wandb_run_name if training else None,
                dir=str(run_folder),
                id=known,
                resume="allow",
                config=config.model_dump(mode="json") if config else None,
            )
        except wandb.errors.Error as error:
            raise UsageError(f"Weights & Biases refused the run: {error}; {_WANDB_WAYS}") from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        id_file.write_text(f"{self._run.id}\n", encoding="utf-8")

    def write(self, metrics: Mapping[str, float], step: int, seconds: float) -> None:
        """Log the metrics of this step."""
        self._run.log({**metrics, "step": step})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def check_wandb_login(report_to: Sequence[str]) -> None:
    """Check before a run starts that Weights & Biases can be used, if metrics go there. No network is needed.

    Args:
        report_to: Destinations of metrics.

    Raises:
        UsageError: If the package or a login is missing.
    """
    if "wandb" not in report_to:
        return
    wandb = _import_wandb()
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE", "online") not in ("online", "shared"):
        return
    try:
        is_logged_in = wandb.login(prompt=False, verify=False)
    except TypeError:  # an older version without `prompt`, which is asked at the start of the run
        return
    except wandb.errors.Error:
        is_logged_in = False
    if not is_logged_in:
        raise UsageError(f"report_to wandb needs a login at Weights & Biases; {_WANDB_WAYS}")


def _import_wandb() -> ModuleType:
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise UsageError(
            "report_to wandb needs the package wandb; install it with pip install 'llm-trainer[wandb]', "
            "or remove wandb from report_to"
        ) from error


def _non_finite_name(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _decode(line: str) -> MetricLine:
    values = json.loads(line)
    if not isinstance(values, dict) or not isinstance(values.get("step"), int):
        raise ValueError(f"no step in {line[:60]!r}")
    return {
        name: _NOT_FINITE[value] if isinstance(value, str) and value in _NOT_FINITE else float(value)
        for name, value in values.items()
    }


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines past `step` and a truncated last line, replacing the file by one rename."""
    kept = [
        line
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
        if line.endswith("\n") and _step_of_line(line) <= step
    ]
    replacement = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
    replacement.write_text("".join(kept), encoding="utf-8")
    replacement.replace(path)


def _step_of_line(line: str) -> float:
    try:
        return _decode(line)["step"]
    except ValueError:
        return math.inf  # not a line of metrics


def _link(link: Path, target: Path) -> None:
    """Make `link` a relative link to `target`, unless the name is taken or the system has no links."""
    if link.is_symlink() or link.exists():
        return
    try:
        link.symlink_to(target.name, target_is_directory=True)
    except OSError:  # Windows without the permission to create links
        return
