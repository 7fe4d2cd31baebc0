"""Which checkpoint a run goes on from, found by all ranks together: each file is read once on each machine,
and all hear one verdict.

The main rank decides (it lists, and asks about one folder after another), and the ranks of each machine share
out the files of that folder by size: on a file system that all share, as on machines with copies of their
own, every machine is known to read what was written. The alternative not taken, to verify on each rank by
itself, reads a checkpoint as often as there are ranks, all at once, before the first step; and ranks that
found different things would go on from different places.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from llm_trainer.config import CheckpointError, LLMTrainerError
from llm_trainer.distributed.process_group import Ranks
from llm_trainer.run_dir import Verify, verify
from llm_trainer.training.checkpoint.resume import resume_folder

if TYPE_CHECKING:
    from llm_trainer.training.trainer import Trainer

_ASKS, _FOUND, _FAILED = "?", "=", "!"


def found_together(ranks: Ranks, find: Callable[[Verify], Path | None]) -> Path | None:
    """What `find` finds on the main rank, on all of them; the check that it is given has all ranks verify. A
    collective call.

    What `find` raises of ours there, all raise, as CheckpointError on the others.
    """
    if ranks.count == 1:
        return find(verify)
    if not ranks.is_main:
        return _help(ranks)

    def ask(folder: Path) -> list[str]:
        ranks.of_main(f"{_ASKS}{folder}")
        return _problems(ranks, folder)

    try:
        found = find(ask)
    except LLMTrainerError as error:
        ranks.of_main(f"{_FAILED}{error}")
        raise
    ranks.of_main(f"{_FOUND}{found or ''}")
    return found


def found_to_resume(trainer: Trainer) -> Path | None:
    """The checkpoint that a run's settings mean it to go on from; None for one that begins. A collective
    call.
    """
    spec = trainer.training.resume_from
    if spec is None:
        return None
    return found_together(
        trainer.ranks, lambda check: resume_folder(spec, trainer.run_dir, trainer.say, check)
    )


def _help(ranks: Ranks) -> Path | None:
    """Verify this rank's share of what the main one asks about, until it says what was found."""
    while (said := ranks.of_main("")).startswith(_ASKS):
        _problems(ranks, Path(said.removeprefix(_ASKS)))
    if said.startswith(_FAILED):
        raise CheckpointError(said.removeprefix(_FAILED))
    return Path(said.removeprefix(_FOUND)) if said != _FOUND else None


def _problems(ranks: Ranks, folder: Path) -> list[str]:
    """What any rank finds wrong with a folder."""
    told = ranks.texts(json.dumps(verify(folder, share=(ranks.machine_rank, ranks.machine_ranks))))
    return list(dict.fromkeys(problem for text in told for problem in json.loads(text)))
