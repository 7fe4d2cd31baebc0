"""`llm-trainer verify-resume RUN`: is going on from a checkpoint the same as never having stopped?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm_trainer.cli.scripts import VERIFY_RESUME, VerifyOptions
from llm_trainer.cli.setup.parse_command import new_console, open_door
from llm_trainer.run_dir import read_run_config, resolve_resume_folder

if TYPE_CHECKING:
    from llm_trainer.diagnostics.verify_resume import BuildTrainer
    from llm_trainer.training.callbacks import Callback
    from llm_trainer.training.trainer import Trainer


def run(argv: list[str]) -> int:
    """Replay a stretch of the run; 0 when it comes out the same to the bit, 1 when not, with what differs."""
    loaded = open_door(VERIFY_RESUME, argv)
    if loaded is None:
        return 0
    assert isinstance(loaded.own, VerifyOptions)
    from llm_trainer.diagnostics.verify_resume import verify_resume

    folder = Path(loaded.own.run)
    report = verify_resume(folder, loaded.own.steps, builder(folder))
    print(report)
    return 0 if report.exact else 1


def builder(run_folder: Path) -> BuildTrainer:
    """What makes trainers with a run's own settings, from one of its checkpoints or its beginning, writing
    elsewhere.
    """
    from llm_trainer.cli.setup.build_dataset import find_data
    from llm_trainer.cli.setup.build_model import new_model, pretrained_model, transferred
    from llm_trainer.cli.setup.scaling_schedule import orchestrator_for
    from llm_trainer.training.trainer import Trainer

    saved = read_run_config(resolve_resume_folder(run_folder))
    console = new_console()
    prepared = find_data(saved.data, console).prepared

    def build(checkpoint: Path | None, folder: Path, callbacks: Sequence[Callback]) -> Trainer:
        config = saved.model_copy(deep=True)
        training = config.training
        training.output_dir, training.remote_dir, training.report_to = (
            str(folder),
            None,
            [],
        )  # the replay is nobody's but its own
        training.resume_from = str(checkpoint) if checkpoint else None
        source = training.init_from
        if checkpoint is not None or source in ("scratch", "resume"):
            model = new_model(config.model, training.seed)
        else:
            model = pretrained_model(source, config.model, adapter=training.adapter_from)
        if checkpoint is None and training.transfer_from is not None:
            transferred(model, training.transfer_from, training.transfer_parts)
        orchestrator = orchestrator_for(training)
        own = [orchestrator] if orchestrator else []
        return Trainer(
            model,
            config,
            prepared.train,
            prepared.validation,
            tokenizer=prepared.tokenizer,
            callbacks=[*own, *callbacks],
            console=console,
        )

    return build
