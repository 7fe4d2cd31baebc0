"""`llm-trainer report RUN`: a page about a run, finished or still training."""

from __future__ import annotations

from pathlib import Path

from llm_trainer.cli.setup.parse_command import parse_command
from llm_trainer.cli.specs import REPORT, ReportOptions


def run(argv: list[str]) -> int:
    """Write the page and print where it is; returns the exit code."""
    loaded = parse_command(REPORT, argv)
    if loaded is None:
        return 0
    assert isinstance(loaded.options, ReportOptions)
    from llm_trainer.reporting.run_report import write_report

    output = None if loaded.options.output is None else Path(loaded.options.output)
    print(f"report: {write_report(Path(loaded.options.run), output)}")
    return 0
