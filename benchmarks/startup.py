"""Start-up time of `llm-trainer --help` and `import llm_trainer`, as complete processes.

For comparison: an interpreter that does nothing, the minimum for a Python program, and `import torch`,
which both must avoid.

    python benchmarks/startup.py [--rounds 9]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common import Figure, Target, alternate, finish, report_load, run_command

LIMIT_SECONDS = 0.5
IDLE = "python -c pass"
OURS = ("llm-trainer --help", "import llm_trainer")


def main() -> int:
    """Measure, print and write the results; return 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    load = report_load()
    commands: dict[str, list[str | Path]] = {
        IDLE: [sys.executable, "-c", "pass"],
        "llm-trainer --help": [Path(sys.executable).parent / "llm-trainer", "--help"],
        "import llm_trainer": [sys.executable, "-c", "import llm_trainer"],
        "import torch": [sys.executable, "-c", "import torch"],
    }
    contestants = {
        name: (lambda command=command: run_command(command).seconds) for name, command in commands.items()
    }
    for run in contestants.values():
        run()  # fills the page cache and writes bytecode
    figures = [
        Figure("start-up", name, "s", rounds)
        for name, rounds in alternate(contestants, options.rounds).items()
    ]
    medians = {figure.contestant: figure.median for figure in figures}
    targets = [Target(name, medians[name], LIMIT_SECONDS, "s", is_ceiling=True) for name in OURS]
    return finish("startup", figures, {"start-up": IDLE}, " ".join(["python", *sys.argv]), targets, [load])


if __name__ == "__main__":
    sys.exit(main())
