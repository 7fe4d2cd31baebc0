"""verify-resume of a run that ended before its last step replays steps that the run has trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny_run import tiny_run, tiny_trainer

from llm_trainer.diagnostics.verify_resume import verify_resume
from llm_trainer.training.callbacks.callback import Callback
from llm_trainer.training.trainer import Trainer


@pytest.mark.parametrize("saves", [None, 3])
def test_a_run_that_stopped_early_is_not_replayed_past_its_end(tmp_path: Path, saves: int | None) -> None:
    settings = {
        "eval_interval": 4, "early_stopping_patience": 1, "early_stopping_min_delta": 9.0,
        "save_interval": saves, "max_steps": 40,
    }  # fmt: skip
    ended = tiny_run(tmp_path / "run", **settings)
    assert (ended.ended_by, ended.step) == ("stopped", 8)  # the best model is that of step 4

    def build(start: Path | None, into: Path, callbacks: Sequence[Callback]) -> Trainer:
        return tiny_trainer(into, resume_from=str(start) if start else None, callbacks=callbacks, **settings)

    report = verify_resume(tmp_path / "run", 3, build)
    assert report.exact, str(report)
    assert report.last_step <= 8
