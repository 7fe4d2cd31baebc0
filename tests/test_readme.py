"""README and documentation: links resolve, commands parse, code runs or imports what exists, and generated
pages are up to date.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT

from llm_trainer.cli.main import COMMANDS, main
from llm_trainer.cli.scripts import SCRIPTS, script

README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [
    README,
    *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted(DOCS.rglob("*.md")),
]
MANUALS_PAGES = (
    "README_ORCHESTRATOR.md",
    "LAYER_OPERATIONS_GUIDE.md",
    "domain_data_bridge.md",
    "dataset_preparation.md",
    "knowledge_distillation.md",
    "computational_efficiency.md",
)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _blocks(path: Path, *languages: str) -> Iterator[str]:
    return (code for language, code in _BLOCK.findall(_text(path)) if language in languages)


def test_the_readme_is_short() -> None:
    lines = _text(README).splitlines()
    assert len(lines) <= 130
    assert [line for line in lines if len(line) > 100] == []


def test_pages_of_the_manuals_are_at_their_paths() -> None:
    assert [name for name in MANUALS_PAGES if not (DOCS / name).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    broken = []
    for target in _LINK.findall(re.sub(r"^```.*?^```", "", _text(page), flags=re.MULTILINE | re.DOTALL)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in _anchors(file)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(
        r"`((?:llm_trainer|tests|benchmarks|examples|configs|docs)/[\w./-]+\.\w+)`", _text(page)
    )
    tests = re.findall(r"`(test_\w+\.py)`", _text(page))
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert [name for name in tests if not any((ROOT / "tests").rglob(name))] == []


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```", "", _text(page), flags=re.M | re.S), re.MULTILINE
    )
    plain = (re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in headings)
    return {re.sub(r"\s+", "-", heading) for heading in plain}


def _commands(page: Path) -> Iterator[list[str]]:
    """The words of each command in a page's shell blocks that llm-trainer or one of its scripts runs."""
    for block in _blocks(page, "bash", "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = [word for word in shlex.split(line, comments=True) if word != "…"]
            if line.startswith("llm-trainer "):
                yield words[1:]
            elif line.startswith(("python ", "torchrun ")):
                scripts = [index for index, word in enumerate(words) if word in SCRIPTS]
                if scripts:
                    yield words[scripts[0] :]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_understood(
    page: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "config").symlink_to(ROOT / "configs")
    monkeypatch.setattr(sys, "path", [*sys.path])  # a script moves folders on it
    for words in _commands(page):
        assert words[0] in COMMANDS or words[0] in SCRIPTS, words
        options = _options(words[0], capsys)
        given = {word[2:].split("=")[0].replace("-", "_") for word in words[1:] if word.startswith("--")}
        assert given <= options, (words, given - options)
        if "explain" in options and not given & {"config", "resume", "init_from", "adapter_from", "list"}:
            assert _exit_code([*words, "--explain"]) == 0, (words, capsys.readouterr().err)


def _options(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """Every option of a command, with its other names."""
    capsys.readouterr()
    assert _exit_code([command, "--help-all"]) == 0
    listed = re.findall(r"--([a-z][\w-]*)", capsys.readouterr().out)
    return {name.replace("-", "_") for name in listed} | {"help"}


def _exit_code(words: list[str]) -> int:
    try:
        return script(words[0], words[1:]) if words[0] in SCRIPTS else main(words)
    except SystemExit as end:
        return int(end.code or 0)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_blocks_import_what_exists(page: Path) -> None:
    for block in _blocks(page, "python"):
        if block.lstrip().startswith("--8<--"):
            continue
        for node in ast.walk(ast.parse(textwrap.dedent(block))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llm_trainer"):
                module = importlib.import_module(str(node.module))
                for name in node.names:
                    assert hasattr(module, name.name), f"{node.module} has no {name.name}"


def test_messages_that_troubleshooting_lists_are_in_the_code() -> None:
    """Capitals and … stand for values; what is between them has to be in one of the messages."""
    code = "\n".join(_text(path) for path in (ROOT / "llm_trainer").rglob("*.py"))
    code += _text(ROOT / "Makefile")
    code = re.sub(r'"\s*f?"', "", code)  # literals that are continued on the next line
    page = _text(DOCS / "how-to" / "troubleshooting.md")
    unknown = []
    for message in re.findall(r"^\| `([^`]+)`", page, re.MULTILINE):
        parts = [part.strip() for part in re.split(r"…|'?\b[A-Z]+\b'?", message)]
        unknown += [part for part in parts if len(part) > 12 and part not in code]
    assert unknown == []


@pytest.mark.slow
@pytest.mark.parametrize("page", [README, DOCS / "tutorials" / "python.md"], ids=lambda page: page.name)
def test_the_python_program_runs(page: Path, tmp_path: Path) -> None:
    program = next(iter(_blocks(page, "python")))
    _run(program, tmp_path)
    assert (tmp_path / "runs" / "python" / "final_model").is_dir()


@pytest.mark.slow
def test_the_extensions_run(tmp_path: Path) -> None:
    _run("\n".join(_blocks(DOCS / "how-to" / "extend.md", "python")), tmp_path)


def _run(program: str, folder: Path) -> None:
    (folder / "program.py").write_text(program, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("program", ["docs/generate_reference.py", "benchmarks/report.py"])
def test_generated_pages_are_up_to_date(program: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / program), "--check"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"run python {program}\n{done.stdout}{done.stderr[-2000:]}"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "--quiet",
            "--site-dir",
            str(tmp_path / "site"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "index.html").is_file()


# A page that is followed from top to bottom, and what makes its commands small enough for a test.
_FOLLOWED = {
    README: {"--preset framework-tiny": "--preset framework-tiny --max_steps 4 --context_length 64"},
    DOCS / "tutorials" / "your-own-text.md": {"--max_steps 2000": "--max_steps 4 --context_length 64"},
}
_SMALL = {
    "--max_steps 4000": "--max_steps 8",
    "verify-resume runs/mine": "verify-resume runs/mine --steps 2",  # steps after the run was extended
    "--batch_size 8": "--batch_size 2",
    "llm-trainer train": "llm-trainer train --batch_size 2 --compile off --save_interval 1",
}


@pytest.mark.slow
@pytest.mark.parametrize("page", _FOLLOWED, ids=lambda page: page.name)
def test_the_commands_of_a_page_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _make_texts(tmp_path / "my_texts")
    monkeypatch.chdir(tmp_path)
    for line in _shell_lines(page):
        words = shlex.split(line, comments=True)
        if words[:1] == ["llm-trainer"]:
            for large, small in {**_FOLLOWED[page], **_SMALL}.items():
                line = line.replace(large, small)
            assert _exit_code(shlex.split(line, comments=True)[1:]) == 0, (line, capsys.readouterr().err)


@pytest.mark.slow
def test_the_command_that_started_a_run_resumes_it_with_its_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The vocabulary and the context of a preset are suggestions; its other settings are compared with the
    run's, as every setting is.
    """
    _make_texts(tmp_path / "my_texts")
    monkeypatch.chdir(tmp_path)
    start = (
        "train --input my_texts --data.vocab_size 300 --data.max_length 32 --preset l1-tiny --batch_size 2"
    )
    assert _exit_code([*start.split(), "--compile=off", "--max_steps=2"]) == 0
    again = [
        "train",
        "--data_dir=data/prepared/my_texts",
        "--max_steps=3",
        "--lr_on_resume=extend",
        "--resume",
    ]
    assert _exit_code([*again, "--preset=l1-base"]) == 2
    assert "model.hidden_size: 128 → 768 cannot change on a resume" in capsys.readouterr().err
    assert _exit_code([*again, "--preset=l1-tiny", "--vocab_size=50257"]) == 2
    assert "model.vocab_size: 300 → 50257 cannot change" in capsys.readouterr().err
    assert _exit_code([*again, "--preset=l1-tiny"]) == 0


def _make_texts(folder: Path) -> None:
    folder.mkdir()
    for number in range(30):
        lines = (
            f"Line {row} of text {number}: {row * number} foxes and {row + number} dogs." for row in range(60)
        )
        (folder / f"text-{number}.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "chapter.txt").write_text("Once upon a time there was a fox.\n" * 40, encoding="utf-8")


def _shell_lines(page: Path) -> Iterator[str]:
    for block in _blocks(page, "bash", "sh"):
        yield from block.replace("\\\n", " ").splitlines()
