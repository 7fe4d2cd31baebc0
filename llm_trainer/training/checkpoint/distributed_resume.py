"""A search for a checkpoint by all ranks together: each machine reads each file once, and all ranks agree.

The main rank decides: it lists the candidates and asks about one folder after another. The ranks of each
machine divide the files of that folder among themselves by size and verify them. So every machine is known to
read what was written, on a shared file system as on copies of its own. The alternative not taken, verifying
on every rank alone, reads a checkpoint as often as there are ranks, all at once, before the first step; and
ranks that found different things would resume from different checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from llm_trainer.distributed.process_group import ProcessGroup
from llm_trainer.errors import CheckpointError, LLMTrainerError
from llm_trainer.run_dir import Verify, verify

_QUESTION, _FOUND, _FAILED = "?", "=", "!"


def find_together(process_group: ProcessGroup, find: Callable[[Verify], Path | None]) -> Path | None:
    """Run a search on the main rank, with all ranks verifying. A collective call.

    Args:
        process_group: The ranks.
        find: The search. It is called on the main rank with a check that all ranks take part in.

    Returns:
        What `find` returned, on every rank.

    Raises:
        LLMTrainerError: What `find` raised; a CheckpointError with the same message on the other ranks.
    """
    if process_group.world_size == 1:
        return find(verify)
    if not process_group.is_main:
        return _assist(process_group)

    def ask(folder: Path) -> list[str]:
        process_group.broadcast_text(f"{_QUESTION}{folder}")
        return _problems(process_group, folder)

    try:
        found = find(ask)
    except LLMTrainerError as error:
        process_group.broadcast_text(f"{_FAILED}{error}")
        raise
    process_group.broadcast_text(f"{_FOUND}{found or ''}")
    return found


def _assist(process_group: ProcessGroup) -> Path | None:
    """Verify this rank's part of each folder that the main rank asks about, until it sends the result."""
    while (message := process_group.broadcast_text("")).startswith(_QUESTION):
        _problems(process_group, Path(message.removeprefix(_QUESTION)))
    if message.startswith(_FAILED):
        raise CheckpointError(message.removeprefix(_FAILED))
    return Path(message.removeprefix(_FOUND)) if message != _FOUND else None


def _problems(process_group: ProcessGroup, folder: Path) -> list[str]:
    """What any rank finds wrong with a folder."""
    part = (process_group.local_rank, process_group.local_world_size)
    found = process_group.all_gather_text(json.dumps(verify(folder, shard=part)))
    return list(dict.fromkeys(problem for text in found for problem in json.loads(text)))
