"""What users read is in the field's words: docstrings, comments, messages, help and documentation.

Each pattern is a word of this project's earlier, private language, or a phrase that a reader has to decipher.
The message of a failure says what to write instead.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT

PHRASES = {
    r"doors?": "command, script",
    r"owed": "not implemented",
    r"(?:is|was|are|were|been|being|as|what|than|otherwise|be) said|said (?:is|was|are|that)": "set, given",
    r"unsaid": "not set",
    r"tell(?:s|ing)?|told": "print, log, report, say",
    r"take[sn]? up|took up": "resume, restore",
    r"go(?:es|ing)? on|went on|gone on": "continue, resume",
    r"go(?:es|ing)? back|went back|gone back": "roll back, return",
    r"(?:step's|steps') edge|edges? of (?:a |the )?steps?": "end of the step, between steps",
    r"anew": "again",
    r"whole (?:checkpoints?|tensors?|folders?|ones?|weights|copies|replicas? of)": "complete, full",
    r"cut (?:over|by) (?:ranks|tensor|the ranks|several)": "sharded",
    r"resting": "frozen",
    r"aloud": "logged",
    r"sew(?:s|n|ing)?": "remap",
    r"beside": "next to, in addition to",
    r"leaves? with (?:status|code|0|1|2)": "exits with code",
    r"to the bit": "bit-exactly, bit-exact",
    r"(?:do|does|did) not go (?:together|with)|goes? together with": "cannot be combined with",
    r"borne|told apart|by itself": "tolerated, distinguished, alone",
    r"(?:nats|bits|bytes|tokens|sequences|micro-batches|FLOPs|numbers|windows) an? "
    r"(?:token|rank|step|second|parameter|byte|sequence|micro-batch)": "per",
    r"(?:documents?|samples?) a line": "one document per line",
    r"that (?:is|are) none": "is not a",
    r"shall": "should, will",
    r"on the way": "meanwhile",
    r"the ones? that counts?|does not count(?! as)": "active, takes effect",
    r"lies? (?:in|at|under|beside|there|here)": "is in",
    r"somebody(?:'s)?|nobody(?:'s)?": "someone, no one: name who",
    r"built yet": "implemented yet",
}
PATTERN = re.compile(
    r"(?<![\w`-])(?:" + "|".join(f"(?P<p{i}>{p})" for i, p in enumerate(PHRASES)) + r")(?![\w`])", re.I
)
INSTEAD = list(PHRASES.values())
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")


def python_prose(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring, comment and string with a space in a Python file."""
    source = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        is_prose = isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value
        if is_prose and path.parent.name != "synthetic":  # whose strings are exercises, in which people talk
            yield node.lineno, node.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def page_prose(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every line of a page outside code blocks."""
    is_code = False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            is_code = not is_code
        elif not is_code:
            yield number, re.sub(r"`[^`]*`", "``", line)


def private_words(path: Path) -> list[str]:
    """Each private word of a file: place, word, what to write instead."""
    prose = python_prose(path) if path.suffix == ".py" else page_prose(path)
    found = []
    for line, text in prose:
        for match in PATTERN.finditer(text):
            instead = INSTEAD[int(str(match.lastgroup).removeprefix("p"))]
            found.append(f"{path.relative_to(ROOT)}:{line}: {match.group()!r} (write: {instead})")
    return found


def folders() -> list[str]:
    """The parts of the package, and what else users read."""
    package = ROOT / "llm_trainer"
    parts = {path.relative_to(ROOT).parts[:3] for path in package.rglob("*.py")}
    return sorted(
        {"/".join(part[:2] if len(part) < 3 or part[2].endswith(".py") else part) for part in parts}
    )


@pytest.mark.parametrize("folder", folders())
def test_the_package_speaks_the_fields_language(folder: str) -> None:
    place = ROOT / folder
    files = [place] if place.is_file() else sorted(place.glob("*.py"))
    if len(Path(folder).parts) > 2:
        files = sorted(place.rglob("*.py"))
    assert [problem for path in files for problem in private_words(path)] == []


@pytest.mark.parametrize("folder", ["docs", "examples", "benchmarks", "scripts", "configs", "."])
def test_documentation_speaks_the_fields_language(folder: str) -> None:
    place = ROOT / folder
    if folder == ".":
        files = [ROOT / name for name in PAGES] + sorted(ROOT.glob("*.py"))
    else:
        files = [
            path
            for path in sorted(place.rglob("*"))
            if path.suffix in (".py", ".md") and "results" not in path.parts
        ]
    assert [problem for path in files for problem in private_words(path)] == []


def test_a_private_word_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_plain_words.ROOT", tmp_path)
    file = tmp_path / "module.py"
    file.write_text('"""The run goes on beside the others."""\nwidth = "3 nats a token"\n', encoding="utf-8")
    assert len(private_words(file)) == 3
    file.write_text('"""A message says what is stored next to it, in nats per token."""\n', encoding="utf-8")
    assert private_words(file) == []
