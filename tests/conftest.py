"""One tiny corpus, tokenizer and prepared folder for all tests; made once a session."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from pydoc_data.topics import topics

import hypothesis
import pytest

# Before torch reads it: tests run side by side, one thread each; and sums are in one order in a test and in
# the processes that it starts, which comparisons to the bit rely on.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from paths import SHARED

from llm_trainer.config import DataConfig
from llm_trainer.config.environment import compile_cache_dir
from llm_trainer.data.pipeline.pipeline import prepare_dataset
from llm_trainer.data.tokenization.tokenizer import Tokenizer

hypothesis.settings.register_profile("no times", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("no times")
compile_cache_dir()  # compiled code is kept from one session to the next


@pytest.fixture(scope="module", autouse=True)
def _frozen_imports() -> None:
    """Leaves what imports have made out of every later search for garbage.

    Training looks for garbage whenever the model changes, which takes a third of a second among so many
    modules.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_texts() -> list[str]:
    """Forty short English documents: topics of Python's own language reference."""
    return [str(text)[:1500] for _, text in sorted(topics.items())][:40]


@pytest.fixture(scope="session")
def tiny_text(tiny_texts: list[str]) -> str:
    """The same as one text of about 50 kB."""
    return "\n\n".join(tiny_texts)


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_texts: list[str]) -> Tokenizer:
    """A byte-level BPE of 300 ids."""
    return Tokenizer.train_bpe(tiny_texts, 300)


@pytest.fixture(scope="session")
def tiny_data(
    tmp_path_factory: pytest.TempPathFactory, tiny_texts: list[str], tiny_tokenizer: Tokenizer
) -> Path:
    """A prepared folder: forty documents, a tenth of the text held out, `tiny_tokenizer`'s ids."""
    folder = tmp_path_factory.mktemp("tiny")
    texts = folder / "texts"
    texts.mkdir()
    for index, text in enumerate(tiny_texts):
        (texts / f"{index:02d}.txt").write_text(text, encoding="utf-8")
    prepare_dataset(
        DataConfig(input=str(texts), val_ratio=0.1), folder / "prepared", tokenizer=tiny_tokenizer
    )
    return folder / "prepared"


@pytest.fixture(scope="session")
def shakespeare_path() -> Path:
    """Tiny Shakespeare from the folder `shared` beside the repository; skips without it."""
    path = SHARED / "data" / "shakespeare.txt"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return path
