"""Preparation streams: ten times the text takes no more memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import hashlib, resource, sys
from dataclasses import dataclass
from llm_trainer.config import DataConfig
from llm_trainer.data.sources.base import TextChunk
from llm_trainer.data.pipeline.pipeline import prepare_dataset
from llm_trainer.data.tokenization.tokenizer import Tokenizer

@dataclass(frozen=True)
class Repeated:
    number: int
    size: int = 2**22

    @property
    def name(self):
        return f"partition {self.number}"

    def content_hash(self):
        return hashlib.sha256(str(self.number).encode()).hexdigest()

    def read_chunks(self):
        for line in range(2048):
            yield TextChunk(f"{self.number} {line} " + "so many words and no more " * 80)

class Source:
    name = "repeated"

    def __init__(self, partitions):
        self._partitions = [Repeated(number) for number in range(partitions)]

    def partitions(self):
        return self._partitions

source, tokenizer = Source(int(sys.argv[3])), Tokenizer.load(sys.argv[2])
prepare_dataset(DataConfig(deduplicate="exact"), sys.argv[1], source=source, tokenizer=tokenizer)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_ten_times_the_text_takes_no_more_memory(tmp_path: Path, tiny_data: Path) -> None:
    def peak(partitions: int) -> int:
        command = [
            sys.executable,
            "-c",
            PROGRAM,
            str(tmp_path / str(partitions)),
            str(tiny_data),
            str(partitions),
        ]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert peak(30) < 1.1 * peak(3)
