"""`llm-trainer evaluate`, `evaluate.py` and `scripts/evaluate.py`: how well a model predicts a text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llm_trainer.cli.setup.parse_command import named_model, new_console, parse_command
from llm_trainer.cli.specs import EVALUATE, EVALUATE_ENHANCED, EVALUATE_L1, EvaluateOptions
from llm_trainer.config import UsageError
from llm_trainer.config.parse.command import CommandSpec


def run(argv: list[str]) -> int:
    """`llm-trainer evaluate`."""
    return evaluate(EVALUATE, argv)


def enhanced(argv: list[str]) -> int:
    """`evaluate.py`."""
    return evaluate(EVALUATE_ENHANCED, argv)


def l1(argv: list[str]) -> int:
    """`scripts/evaluate.py`."""
    return evaluate(EVALUATE_L1, argv)


def evaluate(spec: CommandSpec, argv: Sequence[str]) -> int:
    """Evaluate a model on a text and print the result.

    Args:
        spec: The command or script.
        argv: Its arguments.

    Returns:
        The exit code.
    """
    loaded = parse_command(spec, argv)
    if loaded is None:
        return 0
    assert isinstance(loaded.options, EvaluateOptions)
    inference, own = loaded.config.inference, loaded.options
    source = named_model(inference)
    if own.data is None:
        raise UsageError("no data is named; give --data with a text file or a prepared folder")
    if not Path(own.data).exists():
        raise UsageError(f"{own.data} does not exist; give --data with a text file or a prepared folder")
    from rich.progress import Progress

    from llm_trainer.cli.setup.run_summary import format_validation
    from llm_trainer.evaluation.perplexity import evaluate_source
    from llm_trainer.inference.load_model import load_model

    console = new_console()
    model, _ = load_model(
        source, device=inference.device, precision=inference.precision, adapter=inference.adapter
    )
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("windows", total=None)
        result = evaluate_source(
            model,
            own.data,
            batch_size=own.batch_size,
            stride=own.stride,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    console.print(
        f"{own.data}: {format_validation(result.metrics)} over {result.tokens:,} tokens", markup=False
    )
    return 0
