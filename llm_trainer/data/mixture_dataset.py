"""A mixture as a folder: `mixture.json` names prepared folders and says how they are mixed.

    {
      "format": 1,
      "members": {"math": "math", "code": "../code"},
      "weights": {"math": 1, "code": 3}
    }

Paths are relative to the folder. Instead of `weights` there may be `stages`: a list of `{"until": "2000
steps", "weights": {…}}`, the last one without `until`. With neither, each member weighs as many tokens as it
has. Held-out splits are those of all members, end to end.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from llm_trainer.config.schema.data import DataConfig
from llm_trainer.config.schema.mixture import MixtureStage
from llm_trainer.data.metadata import FORMAT, Metadata, SplitFacts
from llm_trainer.data.sampling.concat import joined
from llm_trainer.data.sampling.mixture import TokenMixture
from llm_trainer.data.token_shards import TokenDataset
from llm_trainer.errors import DataError, UsageError

if TYPE_CHECKING:
    from llm_trainer.data.prepared_dataset import PreparedData

MIXTURE_FILE = "mixture.json"


class MixtureFile(BaseModel):
    """The file: `members` are name → prepared folder; `weights` or `stages` say how they are mixed."""

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
    """Write `mixture.json` into `folder`, in one step; `members` are name → prepared folder. Returns the
    file.

    Raises UsageError for weights and stages together.
    """
    if weights is not None and stages:
        raise UsageError("a mixture has weights or stages, not both; put the weights into the stages")
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


def open_mixture(folder: Path, open_member: Callable[[Path], PreparedData]) -> PreparedData:
    """The members of `folder`'s mixture as one `PreparedData` whose `train` is a `TokenMixture`.

    Raises DataError where the file or a member cannot be used, tokenizers differ, or a mixture holds a
    mixture.
    """
    from llm_trainer.data.prepared_dataset import PreparedData

    said = _read(folder / MIXTURE_FILE)
    stages = _stages(said, folder)
    members: dict[str, PreparedData] = {}
    for name, path in said.members.items():
        if (folder / path / MIXTURE_FILE).is_file():
            raise DataError(
                f"{folder / MIXTURE_FILE}: {name} ({folder / path}) is a mixture itself; name its members instead"
            )
        members[name] = open_member(folder / path)
    stages = stages or [MixtureStage(weights={name: float(len(one.train)) for name, one in members.items()})]
    try:
        train = TokenMixture({name: one.train for name, one in members.items()}, stages, str(folder))
    except UsageError as error:
        raise DataError(f"{folder / MIXTURE_FILE}: {error}") from None
    held_out: dict[str, TokenDataset | None] = {}
    for split in ("validation", "test"):
        parts = {
            name: part
            for name, one in members.items()
            if (part := getattr(one, split)) is not None and len(part)
        }
        held_out[split] = joined(parts, str(folder)) if parts else None
    streams = {"train": train, **{split: part for split, part in held_out.items() if part is not None}}
    metadata = _metadata({name: one.metadata for name, one in members.items()}, streams)
    tokenizer = next(iter(members.values())).tokenizer
    return PreparedData(train, held_out["validation"], held_out["test"], tokenizer, metadata)


def reweighed(prepared: PreparedData, config: DataConfig) -> PreparedData:
    """The data in the shares that the settings say, if they say any. Raises UsageError where it is no
    mixture.
    """
    from dataclasses import replace

    if config.mixture_weights is None and config.mixture_stages is None:
        return prepared
    if not isinstance(prepared.train, TokenMixture):
        raise UsageError(
            f"mixture_weights and mixture_stages are for a mixture, and {prepared.train.source} is one corpus; leave them out"
        )
    if config.mixture_weights is not None and config.mixture_stages is not None:
        raise UsageError("mixture_weights and mixture_stages both say the shares; give one")
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
        raise DataError(f"{file} has format {found.format}, this program reads 1")
    if not found.members:
        raise DataError(f"{file} names no members; give name → prepared folder")
    if found.weights is not None and found.stages is not None:
        raise DataError(f"{file} has weights and stages; put the weights into the stages")
    return found


def _stages(said: MixtureFile, folder: Path) -> list[MixtureStage]:
    """The stages that the file gives; none where members weigh what they hold."""
    try:
        return said.stages or ([MixtureStage(weights=said.weights)] if said.weights is not None else [])
    except UsageError as error:
        raise DataError(f"{folder / MIXTURE_FILE}: {error}") from None


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


def _metadata(members: Mapping[str, Metadata], streams: Mapping[str, TokenDataset]) -> Metadata:
    """The members' facts added up; the row length is the shortest that one of them was prepared for."""
    first = next(iter(members.values()))
    lengths = {one.max_length for one in members.values() if one.max_length is not None}
    rejected: dict[str, int] = {}
    for one in members.values():
        for reason, count in one.documents_rejected.items():
            rejected[reason] = rejected.get(reason, 0) + count
    kept = sum(one.documents_kept for one in members.values())
    ended = sum(one.supervised_end_share * one.documents_kept for one in members.values())
    packings = [one.options.get("packing") for one in members.values()]
    alike = all(packing == packings[0] for packing in packings)
    notes = (
        [f"members were prepared for rows of {', '.join(map(str, sorted(lengths)))} tokens"]
        if len(lengths) > 1
        else []
    )
    notes += (
        []
        if alike
        else ["members were prepared with different packing; greedy is taken where nothing is said"]
    )
    return Metadata(
        format=FORMAT, key=hashlib.sha256(json.dumps({name: one.key for name, one in members.items()}).encode()).hexdigest(),
        source=f"mixture of {', '.join(members)}", tokenizer=first.tokenizer, max_length=min(lengths, default=None),
        split_method=first.split_method, documents_in=sum(one.documents_in for one in members.values()), documents_kept=kept,
        splits={split: _facts(tokens) for split, tokens in streams.items()}, documents_rejected=rejected, rejected_examples=[],
        documents_cut=sum(one.documents_cut for one in members.values()), supervised_end_share=ended / kept if kept else 0.0,
        options={"packing": packings[0]} if alike else {}, notes=notes,
    )  # fmt: skip


def _facts(tokens: TokenDataset) -> SplitFacts:
    return SplitFacts(
        documents=tokens.num_documents,
        tokens=len(tokens),
        bytes=tokens.num_bytes,
        fingerprint=tokens.fingerprint,
        files={},
    )
