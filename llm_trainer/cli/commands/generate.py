"""`llm-trainer generate`, `generate.py`, `scripts/generate.py` and nanoGPT's `sample.py`: text from a model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm_trainer.cli.scripts import GENERATE, GENERATE_ENHANCED, GENERATE_L1, SAMPLE, SampleOptions
from llm_trainer.cli.setup.parse_command import parse_command
from llm_trainer.config import GenerationConfig, UsageError
from llm_trainer.config.parse.command import CommandSpec, LoadedRun

if TYPE_CHECKING:
    from llm_trainer.inference.engine import LanguageModel

FROM_FILE = "FILE:"
RULE = "-" * 15  # between samples, as nanoGPT prints it


def run(argv: list[str]) -> int:
    """`llm-trainer generate`."""
    return generate(GENERATE, argv)


def enhanced(argv: list[str]) -> int:
    """`generate.py`."""
    return generate(GENERATE_ENHANCED, argv)


def l1(argv: list[str]) -> int:
    """`scripts/generate.py`."""
    return generate(GENERATE_L1, argv)


def sample(argv: list[str]) -> int:
    """`sample.py`."""
    return generate(SAMPLE, argv)


def generate(spec: CommandSpec, argv: Sequence[str]) -> int:
    """Draw what one door's settings say and print prompt and text; returns the exit status."""
    loaded = parse_command(spec, argv)
    if loaded is None:
        return 0
    config = loaded.config
    source = model_source(loaded)
    prompt = prompt_text(config.inference.prompt)
    from llm_trainer.inference.load_model import load_model

    inference = config.inference
    model, _ = load_model(source, inference.device, inference.precision, inference.compile, inference.adapter)
    if inference.domain is not None:
        model.model.set_domain(inference.domain)
    print_samples(model, prompt, config.generation)
    return 0


def model_source(loaded: LoadedRun) -> str:
    """Which model is meant; raises UsageError where none is named."""
    own = loaded.options
    if isinstance(own, SampleOptions) and loaded.config.inference.model is None:
        return own.out_dir if own.init_from == "resume" else own.init_from
    if loaded.config.inference.model is None:
        raise UsageError(
            "no model is named: give --model with a run folder, a checkpoint or the name of a model on the hub"
        )
    return loaded.config.inference.model


def prompt_text(said: str | None) -> str:
    """The prompt itself; `FILE:path` reads it from a file. Raises UsageError for a missing prompt or file."""
    if said is None:
        raise UsageError("no prompt: give --prompt TEXT, or --prompt FILE:path")
    if not said.startswith(FROM_FILE):
        return said
    path = Path(said.removeprefix(FROM_FILE))
    if not path.is_file():
        raise UsageError(f"there is no prompt file {path}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not utf-8 (byte {error.start}); save it as utf-8") from None


def print_samples(model: LanguageModel, prompt: str, settings: GenerationConfig) -> None:
    """Print each sample after its prompt: a single one as it is drawn, several from one batch, a rule after
    each as nanoGPT has it.
    """
    if settings.num_samples == 1 and settings.stream:
        pieces = model.stream(prompt, settings)  # what is wrong with the prompt is said before it is echoed
        sys.stdout.write(prompt)
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
        return
    for text in model.generate([prompt], settings):
        sys.stdout.write(f"{prompt}{text}\n" + (f"{RULE}\n" if settings.num_samples > 1 else ""))
