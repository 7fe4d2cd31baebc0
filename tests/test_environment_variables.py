"""Every environment variable of the package is documented."""

from __future__ import annotations

import re

from paths import ROOT


def test_the_reference_lists_every_variable() -> None:
    page = (ROOT / "docs" / "reference" / "configuration.md").read_text(encoding="utf-8")
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "llm_trainer").rglob("*.py")]
    read = {name for source in sources for name in re.findall(r"LLM_TRAINER_[A-Z_]+", source)}
    assert read
    assert read <= set(re.findall(r"LLM_TRAINER_[A-Z_]+", page))
