"""A mixture as a folder: `mixture.json` names prepared folders and their weights.

    {
      "format": 1,
      "members": {"math": "math", "code": "../code"},
      "weights": {"math": 1, "code": 3}
    }

Paths are relative to the folder. Instead of `weights` there may be `stages`: a list of `{"until": "2000
steps", "weights": {…}}`, the last one without `until`. With neither, the weight of each member is its number
of tokens. The held-out splits of all members are concatenated.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from llm_trainer.config.schema.data import DataConfig
from llm_trainer.config.schema.mixture import MixtureStage
from llm_trainer.data.metadata import FORMAT, Metadata, SplitInfo
from llm_trainer.data.prepared_splits import PreparedDataset
from llm_trainer.data.sampling.concat import concat_datasets
from llm_trainer.data.sampling.mixture import MixtureDataset
from llm_trainer.data.token_shards import TokenDataset
from llm_trainer.errors import DataError, UsageError

MIXTURE_FILE = "mixture.json"


class MixtureFile(BaseModel):
    """The contents of mixture.json.

    Attributes:
        format: Version of the format.
        members: Name → prepared folder, relative to the mixture's.
        weights: Name → weight, for the whole run.
        stages: Weights that change during a run.
    """

    model_config = ConfigDict(extra="forbid")

    format: int = 1
    members: dict[str, str]
    weights: dict[str, float] | None = None
    stages: list[MixtureStage] | None = None


def write_mixture(
    folder: Path,
    members: Mapping[str, Path],
    *,
    weights: Mapping[str, float] | None = None,
    stages: Sequence[MixtureStage] = (),
) -> Path:
    """Write `mixture.json` atomically.

    Args:
        folder: Where the file is written.
        members: Name → prepared folder.
        weights: Name → weight, for the whole run.
        stages: Weights that change during a run, instead of `weights`.

    Returns:
        The file.

    Raises:
        UsageError: Both weights and stages are given.
    """
    if weights is not None and stages:
        raise UsageError("a mixture has either weights or stages; put the weights into the stages")
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, JsonValue] = {
        "format": 1,
        "members": {name: _relative(path, folder) for name, path in members.items()},
    }
    if weights is not None:
        content["weights"] = dict(weights)
    if stages:
        content["stages"] = [stage.model_dump(mode="json") for stage in stages]
    temporary = folder / f"{MIXTURE_FILE}.partial"
    with temporary.open("w", encoding="utf-8") as opened:
        opened.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        opened.flush()
        os.fsync(opened.fileno())
    return temporary.replace(folder / MIXTURE_FILE)


def open_mixture(folder: Path, open_member: Callable[[Path], PreparedDataset]) -> PreparedDataset:
    """Open the members of a mixture as one `PreparedDataset` whose `train` is a `MixtureDataset`.

    Args:
        folder: The folder of `mixture.json`.
        open_member: Opens a prepared folder.

    Raises:
        DataError: The file or a member cannot be used, members have different tokenizers, or a member is a
            mixture itself.
    """
    file = _read(folder / MIXTURE_FILE)
    stages = _stages(file, folder)
    members: dict[str, PreparedDataset] = {}
    for name, path in file.members.items():
        if (folder / path / MIXTURE_FILE).is_file():
            raise DataError(
                f"{folder / MIXTURE_FILE}: {name} ({folder / path}) is a mixture itself;"
                " name its members instead"
            )
        members[name] = open_member(folder / path)
    stages = stages or [MixtureStage(weights={name: float(len(one.train)) for name, one in members.items()})]
    try:
        train = MixtureDataset({name: one.train for name, one in members.items()}, stages, str(folder))
    except UsageError as error:
        raise DataError(f"{folder / MIXTURE_FILE}: {error}") from None
    held_out: dict[str, TokenDataset | None] = {}
    for split in ("validation", "test"):
        parts = {
            name: part
            for name, one in members.items()
            if (part := getattr(one, split)) is not None and len(part)
        }
        held_out[split] = concat_datasets(parts, str(folder)) if parts else None
    streams = {"train": train, **{split: part for split, part in held_out.items() if part is not None}}
    metadata = _metadata({name: one.metadata for name, one in members.items()}, streams)
    tokenizer = next(iter(members.values())).tokenizer
    return PreparedDataset(train, held_out["validation"], held_out["test"], tokenizer, metadata)


def with_mixture_weights(prepared: PreparedDataset, config: DataConfig) -> PreparedDataset:
    """Apply the mixture weights of the settings, if there are any.

    Args:
        prepared: The data.
        config: `mixture_weights` or `mixture_stages` replace those of mixture.json.

    Raises:
        UsageError: The data is not a mixture, or both settings are given.
    """
    if config.mixture_weights is None and config.mixture_stages is None:
        return prepared
    if not isinstance(prepared.train, MixtureDataset):
        raise UsageError(
            f"mixture_weights and mixture_stages need a mixture, and {prepared.train.source} is a single"
            " corpus; remove these settings"
        )
    if config.mixture_weights is not None and config.mixture_stages is not None:
        raise UsageError("mixture_weights and mixture_stages both set the weights; give only one of them")
    stages = config.mixture_stages or [MixtureStage(weights=config.mixture_weights or {})]
    return replace(prepared, train=prepared.train.with_stages(stages))


def _read(file: Path) -> MixtureFile:
    try:
        found = MixtureFile.model_validate_json(file.read_bytes())
    except UsageError as error:
        raise DataError(f"{file}: {error}") from None
    except (OSError, ValidationError) as error:
        detail = error.errors(include_url=False)[0] if isinstance(error, ValidationError) else None
        what = f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" if detail else str(error)
        raise DataError(
            f"{file} is not a mixture ({what}); it needs members, and weights or stages"
        ) from None
    if found.format != 1:
        raise DataError(f"{file} has format {found.format}, and this program reads format 1")
    if not found.members:
        raise DataError(f"{file} has no members; give a name and a prepared folder for each corpus")
    if found.weights is not None and found.stages is not None:
        raise DataError(f"{file} has both weights and stages; put the weights into the stages")
    return found


def _stages(file: MixtureFile, folder: Path) -> list[MixtureStage]:
    """The stages of the file; none if the members are weighted by their size."""
    try:
        return file.stages or ([MixtureStage(weights=file.weights)] if file.weights is not None else [])
    except UsageError as error:
        raise DataError(f"{folder / MIXTURE_FILE}: {error}") from None


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


def _metadata(members: Mapping[str, Metadata], streams: Mapping[str, TokenDataset]) -> Metadata:
    """The members' numbers added up; the row length is the shortest that a member was prepared for."""
    first = next(iter(members.values()))
    lengths = {one.max_length for one in members.values() if one.max_length is not None}
    rejected: dict[str, int] = {}
    for one in members.values():
        for reason, count in one.documents_rejected.items():
            rejected[reason] = rejected.get(reason, 0) + count
    kept = sum(one.documents_kept for one in members.values())
    with_eos = sum(one.supervised_end_share * one.documents_kept for one in members.values())
    packings = [one.options.get("packing") for one in members.values()]
    same_packing = all(packing == packings[0] for packing in packings)
    notes = []
    if len(lengths) > 1:
        notes.append(
            f"the members were prepared for rows of {', '.join(map(str, sorted(lengths)))} tokens;"
            f" the default is {min(lengths)}"
        )
    if not same_packing:
        notes.append("the members were prepared with different packing; the default is greedy")
    key = hashlib.sha256(json.dumps({name: one.key for name, one in members.items()}).encode()).hexdigest()
    return Metadata(
        format=FORMAT,
        key=key,
        source=f"mixture of {', '.join(members)}",
        tokenizer=first.tokenizer,
        max_length=min(lengths, default=None),
        split_method=first.split_method,
        splits={split: _split_info(tokens) for split, tokens in streams.items()},
        documents_in=sum(one.documents_in for one in members.values()),
        documents_kept=kept,
        documents_rejected=rejected,
        rejected_examples=[],
        documents_cut=sum(one.documents_cut for one in members.values()),
        supervised_end_share=with_eos / kept if kept else 0.0,
        options={"packing": packings[0]} if same_packing else {},
        notes=notes,
    )


def _split_info(tokens: TokenDataset) -> SplitInfo:
    return SplitInfo(
        documents=tokens.num_documents,
        tokens=len(tokens),
        bytes=tokens.num_bytes,
        fingerprint=tokens.fingerprint,
        files={},
    )
