"""The quick start, scaled down: it ends with figures, samples and a report, on the user's text and on the
built-in corpus.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_trainer.cli.commands.quickstart import first_words
from llm_trainer.cli.main import main


def _samples(run: Path) -> list[dict[str, str]]:
    samples = json.loads((run / "report.json").read_text(encoding="utf-8"))["samples"]
    assert isinstance(samples, list)
    return samples


@pytest.mark.slow
def test_the_quick_start_on_ones_own_text(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quickstart", "--text=text.txt", "--steps=3", "--output_dir=quick", "--vocab_size=300"]) == 0
    said = capsys.readouterr().out
    for words in (
        "training tokens",
        "perplexity",
        "bits per byte",
        "report.html",
        "llm-trainer generate quick",
    ):
        assert words in said, words
    assert len(_samples(place / "quick")) == 3
    assert "line" in (place / "quick/report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("size", [200, 3000])
def test_the_quick_start_on_very_little_text(place: Path, size: int) -> None:
    text = (place / "text.txt").read_text(encoding="utf-8")[:size]
    (place / "little.txt").write_text(text, encoding="utf-8")
    assert main(["quickstart", "--text=little.txt", "--steps=2", "--output_dir=quick"]) == 0


@pytest.mark.slow
def test_the_quick_start_on_the_built_in_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["quickstart", "--steps=3"]) == 0
    assert "language reference" in capsys.readouterr().out
    assert _samples(Path("runs/quickstart"))[0]["prompt"].startswith("def ")


@pytest.mark.parametrize(
    ("piece", "prompt"),
    [
        ("alf a word and some mo", "a word"),
        ("ut\nincomprehensible the fox ran on", "the fox"),
        ("no", ""),
        ("没有空格的文本", ""),
        ("cut onlyonelongword cut", ""),
    ],
)
def test_prompts_from_a_text_are_whole_words_of_it(piece: str, prompt: str) -> None:
    assert first_words(piece, lambda text: len(text) <= 8) == prompt
