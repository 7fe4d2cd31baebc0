"""The splits of a prepared folder as texts, and their shards in another folder."""

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
    """The text of each document of a split, in order.

    Args:
        tokens: The split.
        tokenizer: Its tokenizer.
    """
    starts = [*tokens.document_starts_in(0, len(tokens)).tolist(), len(tokens)]
    for start, end in itertools.pairwise(starts):
        yield tokenizer.decode(tokens.read(start, end - start).tolist())


def publish_shards(source: Path, target: Path) -> None:
    """Link or copy shards, tokenizer and metadata of a prepared folder to another: hard links where the disk
    allows.

    metadata.json comes last, so that an interrupted copy is not taken for prepared data. Each member of a
    mixture goes into a folder of its own.

    Args:
        source: The prepared folder.
        target: The folder to fill.
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
    mixture = MixtureFile.model_validate_json((source / MIXTURE_FILE).read_bytes())
    (target / MIXTURE_FILE).unlink(missing_ok=True)
    for name, path in mixture.members.items():
        publish_shards(source / path, target / name)
    members = {name: target / name for name in mixture.members}
    write_mixture(target, members, weights=mixture.weights, stages=mixture.stages or ())
