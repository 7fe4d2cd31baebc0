"""The report is one file that loads nothing, shows the contents of the run folder, and escapes all text."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from llm_trainer.config import RunConfig
from llm_trainer.errors import CheckpointError
from llm_trainer.reporting.charts import axis_ticks, downsample, format_number, render_chart, smooth
from llm_trainer.reporting.run_metadata import RunMetadata, Sample, load_run_metadata, save_run_metadata
from llm_trainer.reporting.run_report import build_charts, write_report
from llm_trainer.training.logging.metrics import MetricsTracker, read_metrics

EVIL = '</script></pre><script>alert(1)</script><img src=x onerror=alert(1)>" onload="x'


class Page(HTMLParser):
    """Collects tags and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run <b>&"
    tracker = MetricsTracker(folder)
    for step in range(1, 41):
        tracker.update(
            {
                "loss": 4 - step / 20,
                "learning_rate": 1e-3,
                "gradient_norm": 1.0,
                "tokens_per_second": 1000.0 + step,
            },
            step,
        )
        if step % 10 == 0:
            tracker.update(
                {"val_loss": 4 - step / 25, "perplexity": math.exp(4 - step / 25), "bits_per_byte": 1.5}, step
            )
    tracker.update({"loss": math.nan}, 41)
    tracker.close()
    (folder / "run.json").write_text(
        json.dumps(RunConfig(training={"learning_rate": 0.25, "run_name": EVIL}).model_dump(mode="json")),
        encoding="utf-8",
    )
    save_run_metadata(
        folder,
        RunMetadata(
            EVIL, {"parameters": EVIL}, {"shape": EVIL}, {EVIL: EVIL}, {"system": EVIL}, [Sample(EVIL, EVIL)]
        ),
    )
    return folder


def test_text_from_outside_stays_text(run_folder: Path) -> None:
    page = Page(write_report(run_folder).read_text(encoding="utf-8"))
    assert [tag for tag, _ in page.tags].count("script") == 1, "the page has one script"
    assert "img" not in {tag for tag, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count("alert(1)") >= 10, "the text is shown"


def test_the_page_loads_nothing_and_its_policy_forbids_it(run_folder: Path) -> None:
    text = write_report(run_folder).read_text(encoding="utf-8")
    page = Page(text)
    assert not [attributes for _, attributes in page.tags if "src" in attributes or "href" in attributes]
    assert "@import" not in text
    assert "url(http" not in text
    policy = next(
        attributes["content"] for tag, attributes in page.tags if tag == "meta" and "http-equiv" in attributes
    )
    assert policy is not None
    assert "default-src 'none'" in policy


def test_the_pages_script_is_the_one_that_its_policy_allows(run_folder: Path) -> None:
    import base64
    import hashlib

    text = write_report(run_folder).read_text(encoding="utf-8")
    script = text.partition("<script>")[2].partition("</script>")[0]
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in text


def test_the_page_shows_curves_samples_settings_and_machine(run_folder: Path) -> None:
    page = Page(write_report(run_folder).read_text(encoding="utf-8"))
    assert [attributes.get("aria-label") for tag, attributes in page.tags if tag == "svg"] == [
        "Loss",
        "Learning rate",
        "Throughput",
        "Gradient norm",
    ]
    assert "2.4000" in page.text, "the best validation loss"
    assert "0.25" in page.text, "a setting"
    charts_data = [
        json.loads(attributes["data-chart"] or "")
        for _, attributes in page.tags
        if "data-chart" in attributes
    ]
    validation = next(series for series in charts_data[0]["series"] if series["label"] == "validation")
    assert validation["points"] == [[10.0, 3.6], [20.0, 3.2], [30.0, 2.8], [40.0, 2.4]]


def test_settings_that_the_user_has_set_are_marked(run_folder: Path) -> None:
    text = write_report(run_folder).read_text(encoding="utf-8")
    assert re.search(r"<tr class=set><td>learning_rate</td><td>0.25</td>", text)
    assert re.search(r"<tr><td>weight_decay</td>", text)


def test_a_run_with_a_single_line_of_metrics_has_a_report(tmp_path: Path) -> None:
    tracker = MetricsTracker(tmp_path)
    tracker.update({"loss": 3.0}, 1)
    tracker.close()
    assert write_report(tmp_path, tmp_path / "elsewhere/page.html").is_file()


def test_a_folder_without_metrics_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))):
        write_report(tmp_path)


def test_metadata_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    metadata = RunMetadata("command", {"a": "b"}, {}, {}, {}, [Sample("\n", "ü")])
    save_run_metadata(tmp_path, metadata)
    assert load_run_metadata(tmp_path) == metadata
    (tmp_path / "report.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"report\.json"):
        load_run_metadata(tmp_path)


def test_downsampling_keeps_spikes_and_few_points() -> None:
    line = [(float(x), 0.0) for x in range(10_000)]
    line[7777] = (7777.0, 9.0)
    kept = downsample(line)
    assert len(kept) <= 620
    assert (7777.0, 9.0) in kept
    assert kept == sorted(kept)


def test_smoothing_keeps_a_straight_line_straight() -> None:
    line = [(float(x), 2.0 * x) for x in range(100)]
    assert [y for _, y in smooth(line)] == pytest.approx([y for _, y in line])


@pytest.mark.parametrize(("low", "high"), [(0, 1), (2.9, 3.1), (0, 123456), (1e-5, 3e-4), (-3, 7)])
def test_ticks_are_few_round_and_within_the_range(low: float, high: float) -> None:
    found = axis_ticks(low, high)
    assert 2 <= len(found) <= 8
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)


@pytest.mark.parametrize(
    ("number", "formatted"),
    [(0, "0"), (1234567, "1.23M"), (999_999, "1M"), (0.0003, "3e-4"), (2.5, "2.5"), (21100, "21.1k")],
)
def test_numbers_are_formatted_briefly(number: float, formatted: str) -> None:
    assert format_number(number) == formatted


def test_an_empty_chart_is_left_out(run_folder: Path) -> None:
    lines = [line for line in read_metrics(run_folder) if "loss" in line]
    assert render_chart(build_charts([{"step": 1.0, "time": 0.0}])[0]) == ""
    assert "nan" not in render_chart(build_charts(lines)[0]).lower()


def test_each_corpus_of_a_mixture_has_a_labelled_line() -> None:
    lines = [
        {"step": float(step), "loss": 2.0, **{f"share/c{n}": n / 15 for n in range(6)}}
        for step in range(1, 5)
    ]
    chart = next(chart for chart in build_charts(lines) if "mixture" in chart.title)
    assert [series.label for series in chart.series] == [f"c{n}" for n in range(6)]
    assert {series.colour for series in chart.series} == {1, 2, 3, 4}
    assert ">c5<" in render_chart(chart)
    assert (
        next(
            render_chart(chart)
            for chart in build_charts([{"step": 1.0, "loss": 2.0}])
            if "mixture" in chart.title
        )
        == ""
    )
