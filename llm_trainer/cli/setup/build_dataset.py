"""Which data a run trains on: prepared folders are opened, texts and data sets are prepared first, through
the cache.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llm_trainer.cli.scripts import OF_BOTH, OF_TRAINING
from llm_trainer.config import DataConfig, TrainingConfig, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from llm_trainer.config.parse.loader import LoadedRun
    from llm_trainer.data.prepared_dataset import PreparedData

DOMAINS_FOLDER = "data/domain_specific"
WAYS_OUT = (
    "name prepared data with --data_dir FOLDER, a text with --input PATH (it is prepared first), "
    "or a Hugging Face data set with --dataset_name NAME"
)


@dataclass(frozen=True)
class RunData:
    """Opened data and the folder that it lies in."""

    folder: Path
    prepared: PreparedData


def refuse_idle(loaded: LoadedRun) -> None:
    """Raises UsageError for flags about data that would have no effect: two corpora named, or preparation
    asked of what is prepared.
    """
    data = loaded.config.data
    flags = {
        name for name in DataConfig.model_fields if loaded.origins.get(f"data.{name}", "").startswith("--")
    }
    named = [name for name in ("data_dir", "input", "dataset_name", "dataset") if name in flags]
    if loaded.config.training.use_domain_specific_data:
        named = [
            name for name in ("data_dir", "input", "dataset_name", "dataset") if data.is_said(name)
        ] or named
        if named:
            raise UsageError(
                f"{named[0]} and use_domain_specific_data each name the data to train on; give one"
            )
    if len(named) > 1:
        raise UsageError(f"--{' and --'.join(named)} each name the data to train on; give one")
    is_prepared_already = (
        (data.input is None and data.dataset_name is None) or "data_dir" in named or "dataset" in named
    )
    idle = sorted(flags - {*OF_BOTH, *OF_TRAINING}) if is_prepared_already else []
    if idle:
        raise UsageError(
            f"--data.{idle[0]} is about preparing data and has no effect on what is prepared already; leave it out, or give --input"
        )


def find_data(data: DataConfig, console: Console, fallbacks: Sequence[str] = ()) -> RunData:
    """Open what `data` means: data_dir, else what is to be prepared, else nanoGPT's dataset, else the first
    of `fallbacks` there is.

    How it was packed and mixed holds, but for what `data` says; `data` then says all of it. Raises UsageError
    where nothing is named and DataError where what is named cannot be used.
    """
    from llm_trainer.data.mixture_dataset import reweighed

    found = _find(data, console, fallbacks)
    found.prepared.packing.adopt_into(data)
    return replace(found, prepared=reweighed(found.prepared, data))


def _find(data: DataConfig, console: Console, fallbacks: Sequence[str]) -> RunData:
    from llm_trainer.data.prepared_dataset import open_prepared

    if data.data_dir is not None:
        return RunData(Path(data.data_dir), open_prepared(data.data_dir))
    if data.input is not None or data.dataset_name is not None:
        folder = prepared_folder(data)
        prepare_into(data, folder, console)
        return RunData(folder, open_prepared(folder))
    if data.dataset is not None:
        return _classic(data.dataset)
    for fallback in fallbacks:
        if Path(fallback).is_dir():
            return RunData(Path(fallback), open_prepared(fallback))
    missing = (
        f"no data is named and there is no {' or '.join(fallbacks)}; " if fallbacks else "no data is named; "
    )
    raise UsageError(missing + WAYS_OUT)


def use_domains(training: TrainingConfig, data: DataConfig) -> None:
    """With use_domain_specific_data, make the prepared domains the data. Raises UsageError where none are
    prepared.
    """
    if not training.use_domain_specific_data or data.data_dir is not None:
        return
    folder = Path(training.domain_data_dir or DOMAINS_FOLDER)
    if not (folder / "mixture.json").is_file():
        raise UsageError(
            f"no domains are prepared in {folder}; prepare them with: python scripts/prepare_domain_datasets.py --config "
            f"configs/domain_bridge_config.json --output_dir {folder} (--builtin in place of --config for those that need no network)"
        )
    data.data_dir = str(folder)


def prepared_folder(data: DataConfig) -> Path:
    """Where a text or data set is prepared to: output_dir, else `data/prepared/<name>`."""
    if data.output_dir is not None:
        return Path(data.output_dir)
    name = (
        "-".join(part for part in (data.dataset_name, data.dataset_config) if part)
        or Path(data.input or "text").resolve().stem
    )
    return Path("data/prepared") / (re.sub(r"[^\w.-]+", "-", name).strip("-") or "text")


def prepare_into(data: DataConfig, folder: Path, console: Console) -> None:
    """Prepare what `data` names into `folder`; what lies there already from the same input and settings is
    kept.
    """
    from llm_trainer.data.pipeline.pipeline import prepare

    prepare(data, folder, console=console)


def _classic(dataset: str) -> RunData:
    """nanoGPT's `dataset`: the folder data/<dataset>, which its prepare.py fills."""
    from llm_trainer.data.prepared_dataset import open_prepared

    folder = Path("data") / dataset
    if (folder / "train.bin").exists() or (folder / "metadata.json").exists():
        return RunData(folder, open_prepared(folder))
    script = folder / "prepare.py"
    way_out = f"run: python {script}" if script.exists() else WAYS_OUT
    raise UsageError(
        f"the data set {dataset!r} is not prepared ({folder} has no train.bin and no metadata.json); {way_out}"
    )
