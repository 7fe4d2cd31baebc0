"""Write docs/reference/benchmarks.md from what the benchmarks left in benchmarks/results/<machine>/<name>.json.

    python benchmarks/report.py [--check]

The words about each benchmark are its own docstring; the figures are the files'. With `--check` nothing is
written, and the exit status is 1 where the page is not what the files say.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from pathlib import Path
from typing import Any

from common import RESULTS, Figure, Target, table

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "reference" / "benchmarks.md"
OPENING = """\
# Benchmarks

<!-- Written by `python benchmarks/report.py`; edit the benchmarks, not this page. -->

Each figure comes from one command, which measures its peers in the same run, alternating with ours, and leaves a file in
`benchmarks/results/`. This page is made from those files. Median is over the rounds, spread is half of the distance between the
largest and the smallest, and ratio is the median over that of the row marked 1.00. Times hold for the machine named and no other; a
ratio counts only within one run.

LitGPT does not install beside our version of huggingface-hub. To let it take part:

    python3 -m venv .venv-peers
    .venv-peers/bin/pip install torch==2.13.0 litgpt

nanoGPT is not a package: the benchmarks that compare with it take `--nanogpt DIR`, a clone of it.
"""


def main() -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where the page is out of date"
    )
    options = parser.parse_args()
    text = page()
    if options.check:
        return int(not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    print("written to", PAGE)
    return 0


def page() -> str:
    """The whole page."""
    results = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("*/*.json"))]
    names = sorted({result["name"] for result in results})
    sections = [OPENING]
    for name in names:
        of_this = [result for result in results if result["name"] == name]
        sections.append(f"## {name}\n\n{_docstring(of_this[0]['command'])}")
        sections += map(_section, of_this)
    return "\n".join(sections)


def _docstring(command: str) -> str:
    """The own words of the benchmark that the command runs, its usage as code."""
    script = HERE / Path(command.split()[1]).name
    documented = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    return documented + "\n"


def _section(result: dict[str, Any]) -> str:
    """One machine's figures."""
    machine = result["machine"]
    figures = [
        Figure(one["work"], one["contestant"], one["unit"], one["rounds"], one["note"])
        for one in result["figures"]
    ]
    targets = [
        Target(one["what"], one["reached"], one["wanted"], one["unit"], one["is_ceiling"])
        for one in result.get("targets", [])
    ]
    lines = [
        f"**{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}**, {result['date']}: `{result['command']}`",
        "",
        table(figures, result["baselines"]),
        "",
        *[f"- {target}" for target in targets],
        *[f"- {note}" for note in result.get("notes", [])],
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
