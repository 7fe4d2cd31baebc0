"""Opening a prepared folder: the splits, their tokenizer, and the proof that they belong together.

    <folder>/metadata.json                        what it is (written last)
    <folder>/tokenizer.json, tokenizer_config.json
    <folder>/dataset/train-00000.tokens, …        shards of train, validation, test

nanoGPT's folders (`train.bin`, `val.bin`, `meta.pkl`) are opened as well, see `nanogpt.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llm_trainer.data import nanogpt_format as nanogpt
from llm_trainer.data.metadata import FORMAT, METADATA_FILE, Metadata, SplitFacts, TokenizerFacts
from llm_trainer.data.mixture_dataset import MIXTURE_FILE, open_mixture
from llm_trainer.data.sampling.packing import Packing
from llm_trainer.data.token_shards import TokenDataset
from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.errors import DataError


@dataclass(frozen=True)
class PreparedData:
    """A prepared folder. `tokenizer` is None only for a nanoGPT folder in GPT-2's vocabulary when that cannot
    be had here.
    """

    train: TokenDataset
    validation: TokenDataset | None
    test: TokenDataset | None
    tokenizer: Tokenizer | None
    metadata: Metadata

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary that the ids are from."""
        return self.train.vocab_size

    @property
    def packing(self) -> Packing:
        """How it was prepared to be packed."""
        return Packing.from_json(self.metadata.options.get("packing"))


def open_prepared(data_dir: str | Path) -> PreparedData:
    """Open a prepared folder, a mixture of such folders (`mixture_folder.py`) or a nanoGPT folder.

    Raises DataError where it is missing or unfinished, a shard is missing or damaged, or shards and tokenizer
    do not belong together.
    """
    folder = Path(data_dir)
    if not folder.is_dir():
        raise DataError(f"the data folder {folder} does not exist; {_how_to_prepare(folder)}")
    if (folder / MIXTURE_FILE).is_file():
        return open_mixture(folder, open_prepared)
    if (folder / METADATA_FILE).is_file():
        return _open_ours(folder)
    if (folder / nanogpt.TRAIN_FILE).is_file():
        return _open_nanogpt(folder)
    raise DataError(
        f"{folder} holds no prepared data (no {METADATA_FILE}, no train.bin); {_how_to_prepare(folder)}"
    )


def require_vocabulary(tokens: TokenDataset, vocab_size: int) -> None:
    """Raise DataError where the stream has ids that an embedding of `vocab_size` lacks: checked before the
    first step.
    """
    if tokens.largest_id >= vocab_size:
        raise DataError(
            f"the data in {tokens.source} has the id {tokens.largest_id} (its tokenizer has {tokens.vocab_size} ids), but the model's "
            f"vocab_size is {vocab_size}; set vocab_size to {tokens.vocab_size} or more, or use the data that the model was trained with"
        )


def _how_to_prepare(folder: Path) -> str:
    return f"run `llm-trainer prepare --input TEXT --output_dir {folder}`"


def _open_ours(folder: Path) -> PreparedData:
    metadata = Metadata.read(folder)
    tokenizer = Tokenizer.load(folder)
    if tokenizer.hash != metadata.tokenizer.hash:
        raise DataError(
            f"the tokenizer in {folder} is not the one its data was prepared with; prepare the data again"
        )
    opened: dict[str, TokenDataset] = {}
    for split, facts in metadata.splits.items():
        for name, size in facts.files.items():
            file = folder / "dataset" / name
            if not file.is_file():
                raise DataError(f"{file} is missing; prepare the data again")
            if file.stat().st_size != size:
                raise DataError(
                    f"{file} is truncated or garbled: {file.stat().st_size} bytes instead of {size}; prepare the data again"
                )
        tokens = TokenDataset.open(folder / "dataset", split)
        if tokens.tokenizer_hash != tokenizer.hash:
            raise DataError(
                f"the shards of {split!r} in {folder} were made with another tokenizer than is there; prepare the data again"
            )
        if tokens.fingerprint != facts.fingerprint:
            raise DataError(
                f"the shards of {split!r} in {folder} are not those in its {METADATA_FILE}; prepare the data again"
            )
        opened[split] = tokens
    if "train" not in opened:
        raise DataError(f"{folder} has no training split; prepare the data again")
    return PreparedData(opened["train"], opened.get("validation"), opened.get("test"), tokenizer, metadata)


def _open_nanogpt(folder: Path) -> PreparedData:
    tokenizer, vocab_size, notes = nanogpt.read_vocabulary(folder)
    tokenizer_hash = tokenizer.hash if tokenizer is not None else nanogpt.UNKNOWN_TOKENIZER_HASH
    files = {"train": folder / nanogpt.TRAIN_FILE, "validation": folder / nanogpt.VALIDATION_FILE}
    opened = {
        split: nanogpt.open_bin(file, vocab_size, tokenizer_hash)
        for split, file in files.items()
        if file.is_file()
    }
    splits = {}
    for split, tokens in opened.items():
        sizes = {files[split].name: files[split].stat().st_size}
        splits[split] = SplitFacts(
            documents=1, tokens=len(tokens), bytes=None, fingerprint=tokens.fingerprint, files=sizes
        )
    metadata = Metadata(
        format=FORMAT, key=opened["train"].fingerprint, source="nanoGPT folder", max_length=None, split_method="as found", splits=splits,
        tokenizer=TokenizerFacts(
            kind="char" if tokenizer is not None and tokenizer.is_character_level else "gpt2", vocab_size=vocab_size, hash=tokenizer_hash,
            eos_id=None if tokenizer is None else tokenizer.eos_id,
        ),
        documents_in=len(opened), documents_kept=len(opened), documents_rejected={}, rejected_examples=[], documents_cut=0,
        supervised_end_share=0.0, options={}, notes=notes,
    )  # fmt: skip
    return PreparedData(opened["train"], opened.get("validation"), None, tokenizer, metadata)
