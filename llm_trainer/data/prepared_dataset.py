"""Opens prepared folders, and checks that shards, tokenizer and metadata belong together.

    <folder>/metadata.json                        written last, so a folder that has it is complete
    <folder>/tokenizer.json, tokenizer_config.json
    <folder>/dataset/train-00000.tokens, …        shards of train, validation, test

Mixtures of such folders (`mixture_dataset.py`) and nanoGPT's folders (`train.bin`, `val.bin`, `meta.pkl`, see
`nanogpt_format.py`) are opened as well.
"""

from __future__ import annotations

from pathlib import Path

from llm_trainer.data import nanogpt_format as nanogpt
from llm_trainer.data.metadata import FORMAT, METADATA_FILE, Metadata, SplitInfo, TokenizerInfo
from llm_trainer.data.mixture_dataset import MIXTURE_FILE, open_mixture
from llm_trainer.data.prepared_splits import PreparedDataset
from llm_trainer.data.token_shards import TokenDataset
from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.errors import DataError, UsageError

_SPLITS = ("train", "validation", "test")


def load_dataset(folder: str | Path, split: str = "train") -> TokenDataset:
    """Load one split of a prepared folder; its tokenizer is the attribute `tokenizer`.

        train = load_dataset("data/shakespeare")
        print(train.num_tokens, train.tokenizer.decode(train.read(0, 20)))

    The files are memory-mapped, so this takes no time and no memory for large data.

    Args:
        folder: A folder that `prepare_dataset` or `llm-trainer prepare` has written, a mixture of such
            folders, or a nanoGPT folder.
        split: train, validation or test.

    Raises:
        DataError: The folder is missing, incomplete or damaged, or it does not have the split.
        UsageError: There is no split of that name.
    """
    if split not in _SPLITS:
        raise UsageError(f"unknown split {split!r}; choose {', '.join(_SPLITS)}")
    prepared = open_prepared_dataset(folder)
    tokens: TokenDataset | None = getattr(prepared, split)
    if tokens is None:
        setting = {"validation": "val_ratio", "test": "test_ratio"}[split]
        raise DataError(f"{folder} has no {split} split; prepare the data with {setting} greater than 0")
    return tokens


def open_prepared_dataset(data_dir: str | Path) -> PreparedDataset:
    """Open all splits of a prepared folder, a mixture of such folders, or a nanoGPT folder.

    Args:
        data_dir: The folder.

    Raises:
        DataError: The folder is missing or incomplete, a shard is missing or damaged, or shards and
            tokenizer do not belong together.
    """
    folder = Path(data_dir)
    if not folder.is_dir():
        raise DataError(f"the data folder {folder} does not exist; {_how_to_prepare(folder)}")
    if (folder / MIXTURE_FILE).is_file():
        return open_mixture(folder, open_prepared_dataset)
    if (folder / METADATA_FILE).is_file():
        return _open_shards(folder)
    if (folder / nanogpt.TRAIN_FILE).is_file():
        return _open_nanogpt(folder)
    raise DataError(
        f"{folder} holds no prepared data (no {METADATA_FILE}, no train.bin); {_how_to_prepare(folder)}"
    )


def check_vocabulary(tokens: TokenDataset, vocab_size: int) -> None:
    """Check that a model's embedding has a row for every id of the data, before the first step.

    Args:
        tokens: The data.
        vocab_size: Rows of the embedding.

    Raises:
        DataError: An id is too large.
    """
    if tokens.largest_id >= vocab_size:
        raise DataError(
            f"the data in {tokens.source} has the id {tokens.largest_id} (its tokenizer has"
            f" {tokens.vocab_size} ids), but the model's vocab_size is {vocab_size}; set vocab_size to"
            f" {tokens.vocab_size} or more, or use the data that the model was trained with"
        )


def _how_to_prepare(folder: Path) -> str:
    return f"run `llm-trainer prepare --input TEXT --output_dir {folder}`"


def _open_shards(folder: Path) -> PreparedDataset:
    metadata = Metadata.read(folder)
    tokenizer = Tokenizer.load(folder)
    if tokenizer.hash != metadata.tokenizer.hash:
        raise DataError(
            f"the tokenizer in {folder} is not the one its data was prepared with; prepare the data again"
        )
    opened: dict[str, TokenDataset] = {}
    for split, info in metadata.splits.items():
        for name, size in info.files.items():
            file = folder / "dataset" / name
            if not file.is_file():
                raise DataError(f"{file} is missing; prepare the data again")
            if file.stat().st_size != size:
                raise DataError(
                    f"{file} is truncated or damaged: it has {file.stat().st_size} bytes instead of {size};"
                    " prepare the data again"
                )
        tokens = TokenDataset.open(folder / "dataset", split)
        if tokens.tokenizer_hash != tokenizer.hash:
            raise DataError(
                f"the shards of {split!r} in {folder} were made with another tokenizer than the one there;"
                " prepare the data again"
            )
        if tokens.fingerprint != info.fingerprint:
            raise DataError(
                f"the shards of {split!r} in {folder} are not those in its {METADATA_FILE};"
                " prepare the data again"
            )
        opened[split] = tokens
    if "train" not in opened:
        raise DataError(f"{folder} has no training split; prepare the data again")
    return PreparedDataset(opened["train"], opened.get("validation"), opened.get("test"), tokenizer, metadata)


def _open_nanogpt(folder: Path) -> PreparedDataset:
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
        splits[split] = SplitInfo(
            documents=1, tokens=len(tokens), bytes=None, fingerprint=tokens.fingerprint, files=sizes
        )
    is_character_level = tokenizer is not None and tokenizer.is_character_level
    metadata = Metadata(
        format=FORMAT,
        key=opened["train"].fingerprint,
        source="nanoGPT folder",
        tokenizer=TokenizerInfo(
            kind="char" if is_character_level else "gpt2",
            vocab_size=vocab_size,
            hash=tokenizer_hash,
            eos_id=None if tokenizer is None else tokenizer.eos_id,
        ),
        max_length=None,
        split_method="the files of the folder",
        splits=splits,
        documents_in=len(opened),
        documents_kept=len(opened),
        documents_rejected={},
        rejected_examples=[],
        documents_cut=0,
        supervised_end_share=0.0,
        options={},
        notes=notes,
    )
    return PreparedDataset(opened["train"], opened.get("validation"), None, tokenizer, metadata)
