"""`llm-trainer report RUN`: one page about a run, finished or still going on."""

from __future__ import annotations

from pathlib import Path

from llm_trainer.cli.scripts import REPORT, ReportOptions
from llm_trainer.cli.setup.parse_command import open_door


def run(argv: list[str]) -> int:
    """Write the page and say where it is."""
    loaded = open_door(REPORT, argv)
    if loaded is None:
        return 0
    assert isinstance(loaded.own, ReportOptions)
    from llm_trainer.reporting.run_report import write_report

    print(
        f"report: {write_report(Path(loaded.own.run), Path(loaded.own.output) if loaded.own.output else None)}"
    )
    return 0
