"""`llm-trainer verify-resume RUN`: is resuming from a checkpoint the same as never having stopped?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm_trainer.cli.setup.parse_command import new_console, parse_command
from llm_trainer.cli.specs import VERIFY_RESUME, VerifyOptions
from llm_trainer.config.saved_run import read_run_config
from llm_trainer.run_dir import resolve_resume_folder

if TYPE_CHECKING:
    from llm_trainer.diagnostics.verify_resume import BuildTrainer
    from llm_trainer.training.callbacks.callback import Callback
    from llm_trainer.training.trainer import Trainer


def run(argv: list[str]) -> int:
    """Replay some steps of the run; returns 0 if they are bit-exact, 1 with the differences if not."""
    loaded = parse_command(VERIFY_RESUME, argv)
    if loaded is None:
        return 0
    assert isinstance(loaded.options, VerifyOptions)
    from llm_trainer.diagnostics.verify_resume import verify_resume

    folder = Path(loaded.options.run)
    report = verify_resume(folder, loaded.options.steps, trainer_builder(folder))
    print(report)
    return 0 if report.exact else 1


def trainer_builder(run_dir: Path) -> BuildTrainer:
    """What builds trainers with a run's own settings that write elsewhere.

    Args:
        run_dir: The run folder.

    Returns:
        A function of the checkpoint to resume from (None: the run's start), the folder to write to and
        callbacks.
    """
    from llm_trainer.cli.setup.build_dataset import find_data
    from llm_trainer.cli.setup.build_model import is_pretrained, load_matching_weights, load_pretrained_model
    from llm_trainer.cli.setup.scaling_schedule import build_orchestrator
    from llm_trainer.model.build import build_model
    from llm_trainer.training.trainer import Trainer

    saved = read_run_config(resolve_resume_folder(run_dir))
    console = new_console()
    prepared = find_data(saved.data, console).prepared

    def build(checkpoint: Path | None, folder: Path, callbacks: Sequence[Callback]) -> Trainer:
        source = saved.training.init_from
        replayed = saved.training.model_copy(
            update={
                "output_dir": str(folder),
                "remote_dir": None,
                "report_to": [],
                "resume_from": None if checkpoint is None else str(checkpoint),
                "init_from": source if is_pretrained(source) else "scratch",
            }
        )
        config = saved.model_copy(update={"training": replayed})
        if checkpoint is not None or not is_pretrained(source):
            model = build_model(config.model, replayed.seed)
        else:
            model = load_pretrained_model(source, config.model, adapter=replayed.adapter_from)
        if checkpoint is None and replayed.transfer_from is not None:
            load_matching_weights(model, replayed.transfer_from, replayed.transfer_modules)
        orchestrator = build_orchestrator(replayed)
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
