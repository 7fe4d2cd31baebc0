"""How long the doors take to open: `llm-trainer --help` and `import llm_trainer`, whole processes.

Beside them the interpreter that does nothing, which is the least a Python program can take, and `import
torch`, which both must avoid.

    python benchmarks/startup.py [--rounds 9]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common import Figure, Target, alternate, finish, run_command, say_load

LIMIT_SECONDS = 0.5
IDLE = "python -c pass"
OURS = ("llm-trainer --help", "import llm_trainer")


def main() -> int:
    """Measure, print, write; 1 where a limit is passed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    load = say_load()
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
        run()  # files into the page cache, bytecode written
    figures = [
        Figure("start-up", name, "s", rounds)
        for name, rounds in alternate(contestants, options.rounds).items()
    ]
    medians = {figure.contestant: figure.median for figure in figures}
    targets = [Target(name, medians[name], LIMIT_SECONDS, "s", is_ceiling=True) for name in OURS]
    return finish("startup", figures, {"start-up": IDLE}, " ".join(["python", *sys.argv]), targets, [load])


if __name__ == "__main__":
    sys.exit(main())
