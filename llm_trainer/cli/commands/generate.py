"""`llm-trainer generate`, `generate.py`, `scripts/generate.py` and `sample.py`: text from a model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm_trainer.cli.setup.parse_command import named_model, parse_command
from llm_trainer.cli.specs import GENERATE, GENERATE_ENHANCED, GENERATE_L1, SAMPLE, SampleOptions
from llm_trainer.config import GenerationConfig, UsageError
from llm_trainer.config.parse.command import CommandSpec, LoadedRun

if TYPE_CHECKING:
    from llm_trainer.inference.engine import LanguageModel

FROM_FILE = "FILE:"
RULE = "-" * 15  # between samples, as in nanoGPT


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
    """Continue a prompt and print it.

    Args:
        spec: The command or script.
        argv: Its arguments.

    Returns:
        The exit code.
    """
    loaded = parse_command(spec, argv)
    if loaded is None:
        return 0
    config = loaded.config
    source = model_source(loaded)
    prompt = read_prompt(config.inference.prompt)
    from llm_trainer.inference.load_model import load_model

    inference = config.inference
    model, _ = load_model(source, inference.device, inference.precision, inference.compile, inference.adapter)
    if inference.domain is not None:
        model.model.set_domain(inference.domain)
    print_samples(model, prompt, config.generation)
    return 0


def model_source(loaded: LoadedRun) -> str:
    """The model that the settings name.

    Raises:
        UsageError: If there is none.
    """
    own = loaded.options
    if isinstance(own, SampleOptions) and loaded.config.inference.model is None:
        return own.out_dir if own.init_from == "resume" else own.init_from
    return named_model(loaded.config.inference)


def read_prompt(prompt: str | None) -> str:
    """The prompt's text.

    Args:
        prompt: The text, or `FILE:path` to read it from a file.

    Raises:
        UsageError: If there is no prompt, or the file is missing or not UTF-8.
    """
    if prompt is None:
        raise UsageError("no prompt; give --prompt TEXT, or --prompt FILE:path")
    if not prompt.startswith(FROM_FILE):
        return prompt
    path = Path(prompt.removeprefix(FROM_FILE))
    if not path.is_file():
        raise UsageError(f"the prompt file {path} does not exist")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None


def print_samples(model: LanguageModel, prompt: str, settings: GenerationConfig) -> None:
    """Print each sample after its prompt: a single one while it is generated, several as a batch with a line
    after each, as nanoGPT does.

    Args:
        model: The model.
        prompt: The prompt.
        settings: How to sample.
    """
    if settings.num_samples == 1 and settings.stream:
        pieces = model.stream(prompt, settings)  # raises for a bad prompt before it is printed
        sys.stdout.write(prompt)
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
        return
    for text in model.generate([prompt], settings):
        sys.stdout.write(f"{prompt}{text}\n" + (f"{RULE}\n" if settings.num_samples > 1 else ""))
