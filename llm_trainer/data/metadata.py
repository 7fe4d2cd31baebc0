"""metadata.json: what a prepared folder holds and how it came to be. Written last, so a folder that has it is
whole.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError, model_validator

from llm_trainer.errors import DataError

METADATA_FILE = "metadata.json"
FORMAT = 1


class SplitFacts(BaseModel):
    """One split: how much there is, and in which files of `dataset/` (name → bytes)."""

    documents: int
    tokens: int
    bytes: int | None
    fingerprint: str
    files: dict[str, int]


class TokenizerFacts(BaseModel):
    """The tokenizer: `kind` is bpe, char or the name that it was loaded by; `hash` is `Tokenizer.hash`."""

    kind: str
    vocab_size: int
    hash: str
    eos_id: int | None


class Metadata(BaseModel):
    """The whole file. Documents in = documents kept + documents rejected, always.

    `key` is the hash of everything that decided the result. `max_length` becomes the model's context. `supervised_end_share` is the share
    of documents after which an end of text stands for the model to learn. `leaks` counts the held-out documents that have an equal (or
    also, as `leak_check` says, a nearly equal) one in another split. `notes` are in words.
    """

    model_config = ConfigDict(extra="ignore")

    format: int
    key: str
    source: str
    tokenizer: TokenizerFacts
    max_length: int | None
    split_method: str
    splits: dict[str, SplitFacts]
    documents_in: int
    documents_kept: int
    documents_rejected: dict[str, int]
    rejected_examples: list[str]
    documents_cut: int
    supervised_end_share: float
    options: dict[str, JsonValue]
    notes: list[str]
    leaks: int | None = None
    leak_check: Literal["exact", "near"] = "exact"

    @model_validator(mode="after")
    def _documents_are_conserved(self) -> Metadata:
        if self.documents_in != self.documents_kept + sum(self.documents_rejected.values()):
            raise ValueError("documents in are not documents kept plus documents rejected")
        return self

    @classmethod
    def read(cls, folder: Path) -> Metadata:
        """Read a prepared folder's metadata.json. Raises DataError where it is missing, damaged or of another
        format.
        """
        file = folder / METADATA_FILE
        try:
            found = cls.model_validate_json(file.read_bytes())
        except FileNotFoundError:
            raise DataError(
                f"{folder} has no {METADATA_FILE}: it was not prepared, or not to the end; run `llm-trainer prepare`"
            ) from None
        except (OSError, ValidationError) as error:
            raise DataError(
                f"{file} is damaged ({str(error).splitlines()[0]}); prepare the data again"
            ) from None
        if found.format != FORMAT:
            raise DataError(
                f"{file} has format {found.format}, this program reads {FORMAT}; prepare the data again"
            )
        return found

    def write(self, folder: Path) -> None:
        """Write metadata.json in one step: temporary file, fsync, rename."""
        temporary = folder / f"{METADATA_FILE}.partial"
        with temporary.open("w", encoding="utf-8") as opened:
            opened.write(self.model_dump_json(indent=2) + "\n")
            opened.flush()
            os.fsync(opened.fileno())
        temporary.replace(folder / METADATA_FILE)
