"""Write docs/reference/benchmarks.md from the results in benchmarks/results/<machine>/<name>.json.

    python benchmarks/report.py [--check]

The text about each benchmark is its own docstring; the figures come from the files. With `--check` nothing
is written, and the exit code is 1 if the page is out of date.
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

Each figure comes from one command, which measures its peers in the same run, alternating with llm-trainer,
and writes a file to `benchmarks/results/`. This page is generated from those files. Medians are over the
rounds, the spread is half of the difference between the largest and the smallest value, and the ratio is
relative to the row marked 1.00. Times are valid for the named machine only; ratios are comparable only within
one run. Targets that were missed are marked.

LitGPT cannot be installed next to our version of huggingface-hub. To include it:

    python3 -m venv .venv-peers
    .venv-peers/bin/pip install torch==2.13.0 litgpt

nanoGPT is not a package: the benchmarks that compare with it take `--nanogpt DIR`, the path of a clone.
"""


def main() -> int:
    """Write or compare the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="Write nothing; fail if the page is out of date."
    )
    options = parser.parse_args()
    text = page()
    if options.check:
        return int(not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    print("Wrote", PAGE)
    return 0


def page() -> str:
    """Return the text of the page."""
    results = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("*/*.json"))]
    names = sorted({result["name"] for result in results})
    sections = [OPENING]
    for name in names:
        of_this = [result for result in results if result["name"] == name]
        sections.append(f"## {name}\n\n{_docstring(of_this[0]['command'])}")
        sections += map(_section, of_this)
    return "\n".join(sections)


def _docstring(command: str) -> str:
    """Return the docstring of the benchmark that the command runs."""
    script = HERE / Path(command.split()[1]).name
    documented = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    return documented + "\n"


def _section(result: dict[str, Any]) -> str:
    """Return one machine's results."""
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
        f"**{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}**, "
        f"{result['date']}: `{result['command']}`",
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
