"""What the manuals tell a user to type: every command of their shell blocks, in order."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from paths import SHARED

FOLDER = SHARED / "manuals"
NAMES = {"000": "Enhanced", "001": "Framework", "002": "Trainer", "003": "L1", "004": "Orchestrator"}

_FENCE = re.compile(r"^\s*```\s*(\w*)\s*$")
_OURS = re.compile(r"(?:python|torchrun|tensorboard)\b")


@dataclass(frozen=True)
class Command:
    """One command line, continuation lines joined, comments dropped."""

    manual: str
    text: str

    def __str__(self) -> str:
        return f"{self.manual}: {self.text}"


def commands(folder: Path = FOLDER) -> list[Command]:
    """Every distinct command of each manual that runs something of this project's; empty when the manuals are
    not here.
    """
    found = []
    for path in sorted(folder.glob("00*.txt")):
        manual = NAMES[path.name[:3]]
        for language, lines in blocks(path.read_text(encoding="utf-8")):
            if language in ("bash", "sh", ""):
                found += [Command(manual, line) for line in shell_lines(lines) if _OURS.match(line)]
    return list(dict.fromkeys(found))


def blocks(text: str) -> list[tuple[str, list[str]]]:
    """The fenced blocks as (language, lines)."""
    found: list[tuple[str, list[str]]] = []
    inside: list[str] | None = None
    for line in text.splitlines():
        fence = _FENCE.match(line)
        if fence is None:
            if inside is not None:
                inside.append(line)
        elif inside is None:
            inside = []
            found.append((fence[1], inside))
        else:
            inside = None
    return found


def shell_lines(lines: list[str]) -> list[str]:
    """Command lines with continuations joined and blanks squeezed; comments and here-documents left out."""
    whole, until, pending = [], None, ""
    for line in lines:
        if until is not None:
            until = None if line.strip() == until else until
            continue
        if not pending and line.strip().startswith("#"):
            continue
        if heredoc := re.search(r"<<\s*'?(\w+)", line):
            until = heredoc[1]
            continue
        pending += line.rstrip("\\") + " "
        if not line.rstrip().endswith("\\"):
            whole.append(re.sub(r"\s+", " ", pending).strip())
            pending = ""
    return [line for line in whole if line]
