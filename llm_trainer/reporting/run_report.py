"""`report.html`: one file that presents a run to a reader who has not followed it.

It has curves of loss, learning rate, throughput and gradient norm, samples, every setting (in bold if set for
the run) and the machine. It needs no network and loads nothing, so it can be mailed, archived or opened from
a cluster's disk. It is generated from the files of the run folder (`metrics.jsonl`, `run.json`,
`report.json`), so it can be written again at any time, also during the run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html import escape
from pathlib import Path

from llm_trainer.config import RunConfig
from llm_trainer.config.schema.base import Section
from llm_trainer.errors import CheckpointError
from llm_trainer.reporting.charts import Chart, Points, Series, format_number, render_chart, smooth
from llm_trainer.reporting.html import render_figures, render_page, render_table
from llm_trainer.reporting.run_metadata import RunMetadata, Sample, load_run_metadata
from llm_trainer.run_dir import METRICS_FILE, OPERATIONS_FILE, RUN_FILE, list_checkpoints, read_json
from llm_trainer.training.logging.metrics import MetricLine, read_metrics

REPORT_FILE = "report.html"
MIXTURE_PREFIX = "share/"  # metrics of a mixture: share/<corpus>
COLOURS = 4  # in the page's palette


def write_report(run_folder: Path, output: Path | None = None) -> Path:
    """Write the report of a run.

    Args:
        run_folder: The run folder.
        output: The file to write; None for `report.html` in the run folder.

    Returns:
        The file that was written.

    Raises:
        CheckpointError: The folder has no metrics.
    """
    lines = read_metrics(run_folder)
    if not lines:
        raise CheckpointError(
            f"{run_folder} is not a run folder: it has no metrics in {METRICS_FILE}; give the folder of a run"
        )
    target = output or run_folder / REPORT_FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.write_text(
        render_report(
            run_folder.resolve().name,
            lines,
            load_run_metadata(run_folder),
            load_settings(run_folder),
            read_operations(run_folder),
        ),
        encoding="utf-8",
    )
    temporary.replace(target)
    return target


def render_report(
    name: str,
    lines: list[MetricLine],
    metadata: RunMetadata,
    settings: Mapping[str, object],
    operations: Sequence[Mapping[str, object]] = (),
) -> str:
    """Return the page as HTML; all text from outside is escaped.

    Args:
        name: The name of the run.
        lines: The lines of metrics.jsonl.
        metadata: The contents of report.json.
        settings: The resolved settings, by section.
        operations: The lines of operations.jsonl.
    """
    marks = [
        (float(str(one["step"])), f"step {one['step']}: {one['operation']} {one['value']} ({one['why']})")
        for one in operations
    ]
    figures = (render_chart(replace(chart, marks=marks)) for chart in build_charts(lines))
    sections = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="sub">{escape(_subtitle(lines, metadata))}</p>',
        render_figures(headline_figures(lines, metadata)),
        f'<div class="charts">{"".join(figures)}</div>',
        '<p class="note">The bold line of the training loss is the mean around each step. '
        "Move the pointer over a chart to read its values.</p>",
        *_operations(operations),
        *_samples(metadata.samples),
        "<h2>Model, data, machine</h2>",
        f'<div class="tables">{"".join(_metadata_tables(metadata))}</div>',
        "<h2>Settings</h2>" if settings else "",
        '<p class="note">Settings in bold were set for this run. The others are defaults.</p>'
        if settings
        else "",
        f'<div class="tables">{"".join(_settings_tables(settings))}</div>',
    ]
    return render_page(f"{name} · training report", "\n".join(sections))


def read_operations(run_folder: Path) -> list[Mapping[str, object]]:
    """Return the operations that a scaling schedule has run, from operations.jsonl.

    A truncated last line, which a kill may leave, is skipped.
    """
    path = run_folder / OPERATIONS_FILE
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _operations(operations: Sequence[Mapping[str, object]]) -> Iterator[str]:
    if not operations:
        return
    yield "<h2>Operations</h2>"
    yield '<p class="note">These are the dotted vertical lines in the charts above.</p>'
    names = ("step", "operation", "value", "why", "loss_before", "loss_after", "parameters_after", "seconds")
    rows = [
        (
            f"{one['entry']}",
            ", ".join(f"{name} {_plain(one[name])}" for name in names if one.get(name) is not None),
            False,
        )
        for one in operations
    ]
    yield render_table(rows)


def build_charts(lines: list[MetricLine]) -> list[Chart]:
    """Return the charts of the lines of metrics.jsonl."""
    loss, validation = metric_points(lines, "loss"), metric_points(lines, "val_loss")
    return [
        Chart(
            "Loss",
            "nats per token",
            1010,
            (
                Series("training, per log step", 1, loss, faint=True),
                Series("training", 1, smooth(loss)),
                Series("validation", 2, validation, dots=len(validation) < 60),
            ),
            clip_top=0.98,
        ),
        Chart("Corpora of the mixture", "of training tokens", 1010, _mixture_series(lines), from_zero=True),
        Chart(
            "Learning rate",
            "",
            310,
            (Series("learning rate", 3, metric_points(lines, "learning_rate")),),
            from_zero=True,
        ),
        Chart(
            "Throughput",
            "tokens/s",
            310,
            (Series("tokens per second", 4, metric_points(lines, "tokens_per_second")),),
            from_zero=True,
        ),
        Chart(
            "Gradient norm",
            "",
            310,
            (Series("before clipping", 1, metric_points(lines, "gradient_norm")),),
            clip_top=0.99,
            from_zero=True,
        ),
    ]


def _mixture_series(lines: list[MetricLine]) -> tuple[Series, ...]:
    """Each corpus's fraction of the training tokens, per log step."""
    names = sorted({name for line in lines for name in line if name.startswith(MIXTURE_PREFIX)})
    return tuple(
        Series(name.removeprefix(MIXTURE_PREFIX), 1 + index % COLOURS, metric_points(lines, name))
        for index, name in enumerate(names)
    )


def metric_points(lines: list[MetricLine], name: str) -> Points:
    """Return the (step, value) of one metric."""
    return [(line["step"], line[name]) for line in lines if name in line]


def headline_figures(lines: list[MetricLine], metadata: RunMetadata) -> list[tuple[str, str]]:
    """Return the large figures at the top of the page, (value, label)."""
    rows: list[tuple[str, str]] = []
    validated = [line for line in lines if math.isfinite(line.get("val_loss", math.nan))]
    if validated:
        best = min(validated, key=lambda line: line["val_loss"])
        rows.append((f"{best['val_loss']:.4f}", f"best validation loss (step {int(best['step']):,})"))
        rows.append((f"{math.exp(min(best['val_loss'], 700)):.2f}", "perplexity"))
        if "bits_per_byte" in best:
            rows.append((f"{best['bits_per_byte']:.3f}", "bits per byte"))
    rows += [(value, label) for label, value in metadata.headline.items()]
    rows.append((f"{int(lines[-1]['step']):,}", "steps"))
    speeds = sorted(value for _, value in metric_points(lines, "tokens_per_second") if math.isfinite(value))
    if speeds:
        rows.append((format_number(speeds[len(speeds) // 2]), "tokens per second (median)"))
    return rows


def load_settings(run_folder: Path) -> Mapping[str, object]:
    """Return the resolved settings from run.json in the run folder, or else in its newest checkpoint.

    Empty if there is neither.
    """
    folders = [run_folder, *(checkpoint.path for checkpoint in list_checkpoints(run_folder))]
    found = next((folder / RUN_FILE for folder in folders if (folder / RUN_FILE).is_file()), None)
    return read_json(found) if found else {}


def _subtitle(lines: list[MetricLine], metadata: RunMetadata) -> str:
    started, ended = lines[0].get("time"), lines[-1].get("time")
    parts = [metadata.command]
    if started is not None and ended is not None:
        duration = timedelta(seconds=round(ended - started))
        parts.append(
            f"{datetime.fromtimestamp(ended, UTC):%Y-%m-%d %H:%M} UTC, "
            f"{duration} from the first log step to the last"
        )
    return " · ".join(part for part in parts if part)


def _samples(samples: list[Sample]) -> Iterator[str]:
    if samples:
        yield "<h2>Samples</h2>"
    for sample in samples:
        text = f"<mark>{escape(sample.prompt)}</mark>{escape(sample.text)}"
        yield f'<div class="sample"><pre>{text}</pre></div>'


def _metadata_tables(metadata: RunMetadata) -> Iterator[str]:
    for title, rows in (("Model", metadata.model), ("Data", metadata.data), ("Machine", metadata.machine)):
        if rows:
            body = render_table([(name, value, False) for name, value in rows.items()])
            yield f'<details class="card" open><summary>{title}</summary>{body}</details>'


def _settings_tables(settings: Mapping[str, object]) -> Iterator[str]:
    for name, values in settings.items():
        if not isinstance(values, Mapping) or not values:
            continue
        defaults = _defaults(name)
        rows = [
            (str(key), _plain(value), key in defaults and defaults[key] != value)
            for key, value in values.items()
        ]
        rows.sort(key=lambda row: not row[2])
        is_open = " open" if name in ("model", "training") else ""
        title = escape(name.replace("_", " "))
        yield f'<details class="card"{is_open}><summary>{title}</summary>{render_table(rows)}</details>'


def _defaults(section: str) -> Mapping[str, object]:
    field = RunConfig.model_fields.get(section)
    kind = field.annotation if field else None
    return kind().model_dump(mode="json") if isinstance(kind, type) and issubclass(kind, Section) else {}


def _plain(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "–"
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)
