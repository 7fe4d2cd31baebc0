"""Documents from a data set on the Hugging Face hub, through the `datasets` library (an extra)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from llm_trainer.config.errors import DataError
from llm_trainer.data.documents import Reading, Rejected, judged

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class HubSource:
    """One column of a hub data set; with `validation_split` that split is the validation set as it stands."""

    name: str
    configuration: str | None
    train_split: str
    validation_split: str | None
    text_column: str
    revision: str | None = None

    def pieces(self) -> Iterator[Reading]:
        """Every row's text."""
        for split, rows in self._splits.items():
            for index, row in enumerate(rows):
                text, where = row.get(self.text_column), f"{self.name}, {split} row {index}"
                if isinstance(text, str):
                    role = None if self.validation_split is None else ("train" if split == self.train_split else "validation")
                    yield from judged(text, where, role)
                else:
                    yield Rejected(f"no text in the column {self.text_column!r}", where)

    def content_hash(self) -> str:
        """sha256 over all texts and their splits."""
        digest = hashlib.sha256()
        for split, rows in self._splits.items():
            digest.update(f"\0{split}\0".encode())
            for row in rows:
                digest.update(str(row.get(self.text_column)).encode("utf-8", "surrogatepass") + b"\0")
        return digest.hexdigest()

    def size(self) -> None:
        """Unknown."""
        return None

    @cached_property
    def _splits(self) -> dict[str, Dataset]:
        try:
            import datasets
        except ImportError:
            raise DataError("reading data sets from the hub needs the extra 'hub': pip install 'llm-trainer[hub]'") from None
        import httpx
        from huggingface_hub.errors import HfHubHTTPError

        wanted = [self.train_split, *([self.validation_split] if self.validation_split else [])]
        try:
            found = {split: datasets.load_dataset(self.name, self.configuration, split=split, revision=self.revision) for split in wanted}
        except (OSError, ValueError, RuntimeError, HfHubHTTPError, httpx.HTTPError, datasets.exceptions.DatasetsError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise DataError(
                f"the data set {self.name!r} could not be loaded from the hub ({first}); without a network, download it elsewhere "
                "and give its text files or .jsonl with --input"
            ) from None
        for split, rows in found.items():
            if self.text_column not in rows.column_names:
                columns = ", ".join(rows.column_names)
                raise DataError(f"{self.name} ({split}) has no column {self.text_column!r}, it has {columns}; name one with --text_column")
        return found
