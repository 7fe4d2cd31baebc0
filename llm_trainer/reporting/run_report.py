"""`report.html`: one file that shows a run to somebody who was not there.

Curves of loss, learning rate, throughput and gradient norm; samples; every setting, those that were chosen in
bold; the machine. It needs no network and loads nothing, so it can be mailed, archived or opened from a
cluster's disk. It is made from what the run folder holds (`metrics.jsonl`, `run.json`, `report.json`), and so
can be written again at any time, also while the run goes on.
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
from llm_trainer.reporting.charts import Chart, Points, Series, draw, short, smooth
from llm_trainer.reporting.html import figures, page, table
from llm_trainer.reporting.run_metadata import RunFacts, Sample, load_facts
from llm_trainer.run_dir import METRICS_FILE, OPERATIONS_FILE, RUN_FILE, list_checkpoints, read_json
from llm_trainer.training.logging.metrics import MetricLine, read_metrics

REPORT_FILE = "report.html"
SHARE = "share/"  # metrics of a mixture: share/<corpus>
COLOURS = 4  # in the page's palette


def write_report(run_folder: Path, output: Path | None = None) -> Path:
    """Write the report of a run, by default to `<run>/report.html`, and return its path.

    Raises CheckpointError for a folder that is no run folder.
    """
    lines = read_metrics(run_folder)
    if not lines:
        raise CheckpointError(f"{run_folder} has no {METRICS_FILE} with a line in it; is it a run folder?")
    target = output or run_folder / REPORT_FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.write_text(
        render(
            run_folder.resolve().name,
            lines,
            load_facts(run_folder),
            saved_settings(run_folder),
            operations(run_folder),
        ),
        encoding="utf-8",
    )
    temporary.replace(target)
    return target


def render(
    name: str,
    lines: list[MetricLine],
    facts: RunFacts,
    settings: Mapping[str, object],
    fired: Sequence[Mapping[str, object]] = (),
) -> str:
    """The whole page for a run called `name`; all text from outside is escaped. `fired` are the lines of
    operations.jsonl.
    """
    marks = [
        (float(str(one["step"])), f"step {one['step']}: {one['operation']} {one['value']} ({one['why']})")
        for one in fired
    ]
    sections = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="sub">{escape(_subtitle(lines, facts))}</p>',
        figures(headline(lines, facts)),
        f'<div class="charts">{"".join(draw(replace(chart, marks=marks)) for chart in charts(lines))}</div>',
        '<p class="note">The bold line of the training loss is the mean around each step; point at a chart to read it.</p>',
        *_operations(fired),
        *_samples(facts.samples),
        "<h2>Model, data, machine</h2>",
        f'<div class="tables">{"".join(_facts_tables(facts))}</div>',
        "<h2>Settings</h2>" if settings else "",
        '<p class="note">In bold: set for this run. The others are defaults.</p>' if settings else "",
        f'<div class="tables">{"".join(_settings_tables(settings))}</div>',
    ]
    return page(f"{name} · training report", "\n".join(sections))


def operations(run_folder: Path) -> list[Mapping[str, object]]:
    """What a scaling schedule did to the run, from operations.jsonl; a line cut by a kill is left out."""
    path = run_folder / OPERATIONS_FILE
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _operations(fired: Sequence[Mapping[str, object]]) -> Iterator[str]:
    if not fired:
        return
    yield "<h2>Operations</h2>"
    yield '<p class="note">Dotted upright lines in the curves above.</p>'
    names = ("step", "operation", "value", "why", "loss_before", "loss_after", "parameters_after", "seconds")
    rows = [
        (
            f"{one['entry']}",
            ", ".join(f"{name} {_plain(one[name])}" for name in names if one.get(name) is not None),
            False,
        )
        for one in fired
    ]
    yield table(rows)


def charts(lines: list[MetricLine]) -> list[Chart]:
    """What is drawn, from the lines of metrics.jsonl."""
    loss, validation = points(lines, "loss"), points(lines, "val_loss")
    return [
        Chart(
            "Loss",
            "nats a token",
            1010,
            (
                Series("training, each report", 1, loss, faint=True),
                Series("training", 1, smooth(loss)),
                Series("validation", 2, validation, dots=len(validation) < 60),
            ),
            clip_top=0.98,
        ),
        Chart("Shares of the mixture", "of the tokens learned from", 1010, _shares(lines), from_zero=True),
        Chart(
            "Learning rate",
            "",
            310,
            (Series("learning rate", 3, points(lines, "learning_rate")),),
            from_zero=True,
        ),
        Chart(
            "Throughput",
            "tokens/s",
            310,
            (Series("tokens a second", 4, points(lines, "tokens_per_second")),),
            from_zero=True,
        ),
        Chart(
            "Gradient norm",
            "",
            310,
            (Series("before clipping", 1, points(lines, "gradient_norm")),),
            clip_top=0.99,
            from_zero=True,
        ),
    ]


def _shares(lines: list[MetricLine]) -> tuple[Series, ...]:
    """What was learned from each corpus of a mixture, report by report."""
    names = sorted({name for line in lines for name in line if name.startswith(SHARE)})
    return tuple(
        Series(name.removeprefix(SHARE), 1 + index % COLOURS, points(lines, name))
        for index, name in enumerate(names)
    )


def points(lines: list[MetricLine], name: str) -> Points:
    """(step, value) of one metric."""
    return [(line["step"], line[name]) for line in lines if name in line]


def headline(lines: list[MetricLine], facts: RunFacts) -> list[tuple[str, str]]:
    """The large figures at the top: (value, what it is)."""
    rows: list[tuple[str, str]] = []
    validated = [line for line in lines if math.isfinite(line.get("val_loss", math.nan))]
    if validated:
        best = min(validated, key=lambda line: line["val_loss"])
        rows.append((f"{best['val_loss']:.4f}", f"best validation loss (step {int(best['step']):,})"))
        rows.append((f"{math.exp(min(best['val_loss'], 700)):.2f}", "perplexity"))
        if "bits_per_byte" in best:
            rows.append((f"{best['bits_per_byte']:.3f}", "bits per byte"))
    rows += [(value, what) for what, value in facts.headline.items()]
    rows.append((f"{int(lines[-1]['step']):,}", "steps"))
    speeds = sorted(value for _, value in points(lines, "tokens_per_second") if math.isfinite(value))
    if speeds:
        rows.append((short(speeds[len(speeds) // 2]), "tokens a second (median)"))
    return rows


def saved_settings(run_folder: Path) -> Mapping[str, object]:
    """The resolved settings: run.json of the run folder, else of its newest checkpoint; empty where neither
    is.
    """
    folders = [run_folder, *(checkpoint.path for checkpoint in list_checkpoints(run_folder))]
    found = next((folder / RUN_FILE for folder in folders if (folder / RUN_FILE).is_file()), None)
    return read_json(found) if found else {}


def _subtitle(lines: list[MetricLine], facts: RunFacts) -> str:
    started, ended = lines[0].get("time"), lines[-1].get("time")
    parts = [facts.command]
    if started is not None and ended is not None:
        took = timedelta(seconds=round(ended - started))
        parts.append(
            f"{datetime.fromtimestamp(ended, UTC):%Y-%m-%d %H:%M} UTC, {took} from the first report to the last"
        )
    return " · ".join(part for part in parts if part)


def _samples(samples: list[Sample]) -> Iterator[str]:
    if samples:
        yield "<h2>Samples</h2>"
    for sample in samples:
        yield f'<div class="sample"><pre><mark>{escape(sample.prompt)}</mark>{escape(sample.text)}</pre></div>'


def _facts_tables(facts: RunFacts) -> Iterator[str]:
    for title, rows in (("Model", facts.model), ("Data", facts.data), ("Machine", facts.machine)):
        if rows:
            body = table([(name, value, False) for name, value in rows.items()])
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
        yield f'<details class="card"{is_open}><summary>{escape(name.replace("_", " "))}</summary>{table(rows)}</details>'


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
