"""metadata.json: what a prepared folder contains and how it was made.

The file is written last, so a folder that has it is complete.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError, model_validator

from llm_trainer.errors import DataError

METADATA_FILE = "metadata.json"
FORMAT = 1


class SplitInfo(BaseModel):
    """One split: its size, and its files in `dataset/` (name → bytes)."""

    documents: int
    tokens: int
    bytes: int | None
    fingerprint: str
    files: dict[str, int]


class TokenizerInfo(BaseModel):
    """The tokenizer: `kind` is its type, or where it was loaded from; `hash` is `Tokenizer.hash`."""

    kind: str
    vocab_size: int
    hash: str
    eos_id: int | None


class Metadata(BaseModel):
    """The contents of the file; `documents_in` is always `documents_kept` plus all of `documents_rejected`.

    Attributes:
        format: Version of the format.
        key: Hash of everything that decides the result.
        source: Where the text comes from.
        tokenizer: The tokenizer.
        max_length: Tokens per row that the data was prepared for; becomes the model's context.
        split_method: How documents were assigned to splits, as a sentence.
        splits: train, validation, test → their sizes and files.
        documents_in: Documents that were read.
        documents_kept: Documents in the splits.
        documents_rejected: Reason → number of documents.
        rejected_examples: A few rejected documents, with their reasons.
        documents_cut: Documents that a split ends in the middle of.
        supervised_end_share: Fraction of the documents that keep their end-of-text token.
        options: The settings that decide the result.
        notes: Remarks for the user.
        leaks: Held-out documents that also occur in another split; None if this was not counted.
        leak_check: Whether nearly equal documents count as leaks (near), or equal ones alone (exact).
    """

    model_config = ConfigDict(extra="ignore")

    format: int
    key: str
    source: str
    tokenizer: TokenizerInfo
    max_length: int | None
    split_method: str
    splits: dict[str, SplitInfo]
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
            raise ValueError("documents_in is not documents_kept plus documents_rejected")
        return self

    @classmethod
    def read(cls, folder: Path) -> Metadata:
        """Read the metadata.json of a prepared folder.

        Raises:
            DataError: The file is missing, damaged or of another format.
        """
        file = folder / METADATA_FILE
        try:
            found = cls.model_validate_json(file.read_bytes())
        except FileNotFoundError:
            raise DataError(
                f"{folder} has no {METADATA_FILE}, so its preparation is missing or incomplete;"
                " run `llm-trainer prepare`"
            ) from None
        except (OSError, ValidationError) as error:
            raise DataError(
                f"{file} is damaged ({str(error).splitlines()[0]}); prepare the data again"
            ) from None
        if found.format != FORMAT:
            raise DataError(
                f"{file} has format {found.format}, and this program reads format {FORMAT};"
                " prepare the data again"
            )
        return found

    def write(self, folder: Path) -> None:
        """Write metadata.json atomically: temporary file, fsync, rename."""
        temporary = folder / f"{METADATA_FILE}.partial"
        with temporary.open("w", encoding="utf-8") as opened:
            opened.write(self.model_dump_json(indent=2) + "\n")
            opened.flush()
            os.fsync(opened.fileno())
        temporary.replace(folder / METADATA_FILE)
