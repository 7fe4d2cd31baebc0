"""`llm-trainer report RUN`: one page about a run, finished or still going on."""

from __future__ import annotations

from pathlib import Path

from llm_trainer.cli.scripts import REPORT, ReportOptions
from llm_trainer.cli.setup.parse_command import parse_command


def run(argv: list[str]) -> int:
    """Write the page and say where it is."""
    loaded = parse_command(REPORT, argv)
    if loaded is None:
        return 0
    assert isinstance(loaded.options, ReportOptions)
    from llm_trainer.reporting.run_report import write_report

    print(
        f"report: {write_report(Path(loaded.options.run), Path(loaded.options.output) if loaded.options.output else None)}"
    )
    return 0
