"""`PreparedDataset`: the splits of a prepared folder with their tokenizer and metadata.

The class is below the two modules that open such folders, `prepared_dataset.py` and `mixture_dataset.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from llm_trainer.data.metadata import Metadata
from llm_trainer.data.sampling.packing import Packing
from llm_trainer.data.token_shards import TokenDataset
from llm_trainer.data.tokenization.tokenizer import Tokenizer


@dataclass(frozen=True)
class PreparedDataset:
    """A prepared folder.

    Attributes:
        train: The training split.
        validation: The validation split, if there is one.
        test: The test split, if there is one.
        tokenizer: None only for a nanoGPT folder in GPT-2's vocabulary, if that cannot be loaded here.
        metadata: The contents of metadata.json.
    """

    train: TokenDataset
    validation: TokenDataset | None
    test: TokenDataset | None
    tokenizer: Tokenizer | None
    metadata: Metadata

    def __post_init__(self) -> None:
        for tokens in (self.train, self.validation, self.test):
            if tokens is not None:
                tokens.tokenizer = self.tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of ids in the vocabulary."""
        return self.train.vocab_size

    @property
    def packing(self) -> Packing:
        """The packing that the data was prepared for."""
        return Packing.from_json(self.metadata.options.get("packing"))
