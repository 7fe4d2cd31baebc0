"""The splits of a prepared folder elsewhere: as texts again, and as shards in a folder of their own."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from llm_trainer.data.mixture_dataset import MIXTURE_FILE, MixtureFile, write_mixture
from llm_trainer.data.token_shards import TokenDataset
from llm_trainer.data.tokenization.tokenizer import Tokenizer


def documents(tokens: TokenDataset, tokenizer: Tokenizer) -> Iterator[str]:
    """The text of each document of a split, in order."""
    starts = [*tokens.document_starts_in(0, len(tokens)).tolist(), len(tokens)]
    for start, end in itertools.pairwise(starts):
        yield tokenizer.decode(tokens.read(start, end - start).tolist())


def publish_shards(source: Path, target: Path) -> None:
    """Give `target` the shards, tokenizer and metadata of the prepared folder `source`: hard links where the
    disk allows, else copies.

    metadata.json comes last, so that an interrupted copy does not pass for prepared data. Of a mixture, each
    member goes into a folder of its own.
    """
    if (source / MIXTURE_FILE).is_file():
        _publish_mixture(source, target)
        return
    (target / MIXTURE_FILE).unlink(missing_ok=True)
    files = (
        [path for path in sorted(source.glob("dataset/*.tokens"))]
        + sorted(source.glob("tokenizer*.json"))
        + [source / "metadata.json"]
    )
    (target / "dataset").mkdir(parents=True, exist_ok=True)
    (target / "metadata.json").unlink(missing_ok=True)
    for stale in (target / "dataset").glob("*.tokens"):
        stale.unlink()
    for path in files:
        place = target / path.relative_to(source)
        place.unlink(missing_ok=True)
        try:
            os.link(path, place)
        except OSError:
            shutil.copy2(path, place)


def _publish_mixture(source: Path, target: Path) -> None:
    said = MixtureFile.model_validate_json((source / MIXTURE_FILE).read_bytes())
    (target / MIXTURE_FILE).unlink(missing_ok=True)
    for name, path in said.members.items():
        publish_shards(source / path, target / name)
    members = {name: target / name for name in said.members}
    write_mixture(target, members, weights=said.weights, stages=said.stages or ())
