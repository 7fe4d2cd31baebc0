"""Which data a run trains on. Prepared folders are opened; texts and hub datasets are prepared first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llm_trainer.cli.specs import OF_BOTH, OF_TRAINING
from llm_trainer.config import DataConfig, DataError, TrainingConfig, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from llm_trainer.config.parse.command import LoadedRun
    from llm_trainer.data.prepared_splits import PreparedDataset
    from llm_trainer.data.tokenization.tokenizer import Tokenizer

DOMAINS_DIR = "data/domain_specific"
HOW_TO_NAME_DATA = (
    "name prepared data with --data_dir FOLDER, a text with --input PATH (it is prepared first), "
    "or a Hugging Face dataset with --dataset_name NAME"
)
_NAMES_OF_DATA = ("data_dir", "input", "dataset_name", "dataset")


@dataclass(frozen=True)
class RunData:
    """Opened data.

    Attributes:
        folder: Its folder.
        prepared: Its splits, tokenizer and metadata.
        config: The settings that name it, with how it was packed and mixed.
    """

    folder: Path
    prepared: PreparedDataset
    config: DataConfig


def check_data_flags(loaded: LoadedRun) -> None:
    """Check that every flag about data has an effect.

    Args:
        loaded: The command line.

    Raises:
        UsageError: If two flags name data, or a flag asks for preparation of data that is prepared already.
    """
    data = loaded.config.data
    flags = {
        name for name in DataConfig.model_fields if loaded.origins.get(f"data.{name}", "").startswith("--")
    }
    names = [name for name in _NAMES_OF_DATA if name in flags]
    if loaded.config.training.use_domain_specific_data:
        names = [name for name in _NAMES_OF_DATA if data.is_set(name)] or names
        if names:
            raise UsageError(
                f"{names[0]} and use_domain_specific_data both name the data to train on; give one"
            )
    if len(names) > 1:
        raise UsageError(f"--{' and --'.join(names)} both name the data to train on; give one")
    needs_preparation = data.input is not None or data.dataset_name is not None
    is_prepared = not needs_preparation or "data_dir" in names or "dataset" in names
    unused = sorted(flags - {*OF_BOTH, *OF_TRAINING}) if is_prepared else []
    if unused:
        raise UsageError(
            f"--data.{unused[0]} has no effect: it is about preparing data, and the data is prepared "
            "already; "
            "leave it out, or give --input"
        )


def find_data(data: DataConfig, console: Console, fallbacks: Sequence[str] = ()) -> RunData:
    """Open the data that the settings name: data_dir, else what is to be prepared, else nanoGPT's dataset,
    else the first of `fallbacks` that exists.

    How the data was packed and mixed is kept, except for what the settings say.

    Args:
        data: The settings. They are not changed.
        console: Where to print.
        fallbacks: Prepared folders.

    Returns:
        The opened data.

    Raises:
        UsageError: If nothing is named.
        DataError: If what is named cannot be used.
    """
    from llm_trainer.data.mixture_dataset import with_mixture_weights

    folder, prepared = _open(data, console, fallbacks)
    config = data.model_copy(update={"data_dir": str(folder)})
    prepared.packing.apply_to_unset(config)
    return RunData(folder, with_mixture_weights(prepared, config), config)


def _open(data: DataConfig, console: Console, fallbacks: Sequence[str]) -> tuple[Path, PreparedDataset]:
    from llm_trainer.data.pipeline.pipeline import prepare_dataset
    from llm_trainer.data.prepared_dataset import open_prepared_dataset

    if data.data_dir is not None:
        return Path(data.data_dir), open_prepared_dataset(data.data_dir)
    if data.input is not None or data.dataset_name is not None:
        folder = prepared_dir(data)
        prepare_dataset(
            data, folder, console=console
        )  # data prepared from the same input and settings is kept
        return folder, open_prepared_dataset(folder)
    if data.dataset is not None:
        return _open_nanogpt_dataset(data.dataset)
    for fallback in fallbacks:
        if Path(fallback).is_dir():
            return Path(fallback), open_prepared_dataset(fallback)
    missing = f", and none of {', '.join(fallbacks)} exists" if fallbacks else ""
    raise UsageError(f"no data is named{missing}; {HOW_TO_NAME_DATA}")


def with_domain_data(data: DataConfig, training: TrainingConfig) -> DataConfig:
    """With use_domain_specific_data, settings that name the prepared domains.

    Args:
        data: The settings. They are not changed.
        training: The settings `use_domain_specific_data` and `domain_data_dir`.

    Raises:
        UsageError: If no domains are prepared.
    """
    if not training.use_domain_specific_data or data.data_dir is not None:
        return data
    folder = Path(training.domain_data_dir or DOMAINS_DIR)
    if not (folder / "mixture.json").is_file():
        raise UsageError(
            f"no domains are prepared in {folder}; prepare them with: python "
            "scripts/prepare_domain_datasets.py "
            f"--config configs/domain_bridge_config.json --output_dir {folder} (--builtin in place of "
            "--config "
            "for those that need no network)"
        )
    return data.model_copy(update={"data_dir": str(folder)})


def with_model_tokenizer(data: DataConfig, model: str) -> DataConfig:
    """Settings by which text for a pretrained model is prepared with the model's tokenizer, unless another
    existing one is set.

    A new vocabulary is never trained under pretrained weights: its ids would mean nothing to them.

    Args:
        data: The settings. They are not changed.
        model: A folder, a checkpoint or a hub name.

    Raises:
        UsageError: The settings ask for a new vocabulary.
        DataError: The model's folder has no tokenizer; the message says what is missing.
    """
    is_prepared_now = data.input is not None or data.dataset_name is not None
    if data.tokenizer_path is not None or data.tokenizer_type == "tiktoken" or not is_prepared_now:
        return data
    if data.tokenizer_type != "auto":
        raise UsageError(
            f"tokenizer_type {data.tokenizer_type} would train a new vocabulary, whose ids mean nothing to "
            f"the weights of {model}; leave it out to use the model's tokenizer, or train with "
            "--init_from scratch"
        )
    from llm_trainer.inference.load_model import PICKLES, resolve_model

    source = resolve_model(model)
    if source.suffix not in PICKLES:
        _load_model_tokenizer(source, model)
        return data.model_copy(update={"tokenizer_path": str(source)})
    return data.model_copy(update=_nanogpt_tokenizer(source))


def with_chat_template(data: RunData, model: str) -> RunData:
    """The data with the chat templates of a model's folder, where its own tokenizer has none.

    Args:
        data: The opened data.
        model: A folder, a checkpoint or a hub name.
    """
    from llm_trainer.data.tokenization.chat_templates import find_chat_templates
    from llm_trainer.inference.load_model import resolve_model

    tokenizer, source = data.prepared.tokenizer, resolve_model(model)
    if tokenizer is None or tokenizer.has_chat_template or not source.is_dir():
        return data
    templates = find_chat_templates(source)
    if not templates:
        return data
    return replace(data, prepared=replace(data.prepared, tokenizer=tokenizer.with_chat_templates(templates)))


def _load_model_tokenizer(source: Path, model: str) -> Tokenizer:
    """The tokenizer of a model's folder.

    Raises DataError with what is missing.
    """
    from llm_trainer.data.tokenization.tokenizer import Tokenizer

    try:
        return Tokenizer.load(source)
    except DataError as error:
        raise DataError(
            f"the tokenizer of {model} is needed, because its weights know no other ids, and cannot be used: "
            f"{error}"
        ) from None


def _nanogpt_tokenizer(file: Path) -> dict[str, object]:
    """The settings of the data that name the tokenizer of nanoGPT's file."""
    from llm_trainer.data.nanogpt_format import META_FILE
    from llm_trainer.inference.load_model import find_nanogpt_vocabulary

    folder = find_nanogpt_vocabulary(file)
    if folder is None:
        return {"tokenizer_type": "tiktoken"}  # nanoGPT's own rule: GPT-2's
    if (folder / META_FILE).is_file():
        raise DataError(
            f"the vocabulary of {file} is {folder / META_FILE}, and text cannot be prepared with it; name "
            "the data that nanoGPT's prepare.py made with --data_dir"
        )
    return {"tokenizer_path": str(folder)}


def prepared_dir(data: DataConfig) -> Path:
    """The folder that a text or dataset is prepared into: output_dir, else `data/prepared/<name>`."""
    if data.output_dir is not None:
        return Path(data.output_dir)
    dataset = "-".join(part for part in (data.dataset_name, data.dataset_config) if part)
    name = dataset or Path(data.input or "text").resolve().stem
    return Path("data/prepared") / (re.sub(r"[^\w.-]+", "-", name).strip("-") or "text")


def _open_nanogpt_dataset(dataset: str) -> tuple[Path, PreparedDataset]:
    """nanoGPT's `dataset`: the folder data/<dataset>, which its prepare.py fills."""
    from llm_trainer.data.prepared_dataset import open_prepared_dataset

    folder = Path("data") / dataset
    if (folder / "train.bin").exists() or (folder / "metadata.json").exists():
        return folder, open_prepared_dataset(folder)
    script = folder / "prepare.py"
    instead = f"run: python {script}" if script.exists() else HOW_TO_NAME_DATA
    raise UsageError(
        f"the dataset {dataset!r} is not prepared ({folder} has no train.bin and no metadata.json); {instead}"
    )
