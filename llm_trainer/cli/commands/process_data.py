"""`scripts/process_data.py`: turn splits into shards, or write a trained model's outputs on them with a
report.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from llm_trainer.cli.setup.parse_command import new_console, parse_command
from llm_trainer.cli.specs import PROCESS, ProcessOptions
from llm_trainer.config import DataConfig, UsageError
from llm_trainer.config.parse.command import LoadedRun

if TYPE_CHECKING:
    from rich.console import Console

    from llm_trainer.data.tokenization.tokenizer import Tokenizer

DEFAULT_OUTPUT = {"train": "data/ready", "inference": "data/inference"}
PROMPT_TOKENS = 32
OUTPUTS_FILE, REPORT_FILE = "outputs.jsonl", "validation_report.json"


def run(argv: list[str]) -> int:
    """Run the mode that `--mode` names; returns the exit code."""
    loaded = parse_command(PROCESS, argv)
    if loaded is None:
        return 0
    assert isinstance(loaded.options, ProcessOptions)
    own, data = loaded.options, loaded.config.data
    if own.mode == "student":
        raise UsageError(
            "--mode student (shards with the teacher's log-probabilities) is not implemented yet; use "
            "--mode train for the shards alone"
        )
    output = Path(data.output_dir or DEFAULT_OUTPUT[own.mode])
    console = new_console()
    if own.mode == "train":
        shard(loaded, output, console)
    else:
        infer(data, own, output, console)
    return 0


def check_preparation_flags(loaded: LoadedRun, folder: Path) -> None:
    """Check that no flag is about preparation, for a folder that is prepared already.

    Raises:
        UsageError: If one is; it would have no effect.
    """
    flags = {
        name
        for name, origin in loaded.origins.items()
        if name.startswith("data.") and origin.startswith("--")
    }
    unused = sorted(flags - {"data.input", "data.output_dir"})
    if unused:
        raise UsageError(
            f"--{unused[0]} has no effect: {folder} is prepared already; leave it out, or prepare the text "
            "again"
        )


def shard(loaded: LoadedRun, output: Path, console: Console) -> None:
    """Write the shards of the splits in `data.input`: existing ones, else made from train, val and test
    texts.

    Args:
        loaded: The settings.
        output: The folder to write to.
        console: Where to print.
    """
    from llm_trainer.cli.setup.export_splits import publish_shards
    from llm_trainer.data.mixture_dataset import MIXTURE_FILE
    from llm_trainer.data.pipeline.pipeline import prepare_dataset
    from llm_trainer.data.prepared_dataset import open_prepared_dataset
    from llm_trainer.data.sources.presplit_source import PresplitSource

    data = loaded.config.data
    folder = input_folder(data)
    if is_prepared(folder):
        check_preparation_flags(loaded, folder)
        open_prepared_dataset(folder)  # raises if anything is missing or damaged
        publish_shards(folder, output)
        console.print(f"wrote {output}: the shards of {folder}", markup=False)
    else:
        source = PresplitSource(folder)
        (output / MIXTURE_FILE).unlink(missing_ok=True)  # an earlier result
        ratios = {"val_ratio": source.fraction("validation"), "test_ratio": source.fraction("test")}
        settings = data.model_copy(update={"train_ratio": None, **ratios})
        for line in prepare_dataset(settings, output, console=console, source=source).lines():
            console.print(line, markup=False)
    console.print(f"next: llm-trainer train --data_dir {output}", markup=False)


def infer(data: DataConfig, own: ProcessOptions, output: Path, console: Console) -> None:
    """Continue the beginnings of held-out documents with a model, evaluate it on them, and write both.

    Args:
        data: The setting `input`.
        own: The model and how much to generate.
        output: The folder to write to.
        console: Where to print.

    Raises:
        UsageError: If no model is named.
    """
    if own.student_model_path is None:
        raise UsageError(
            "--mode inference needs a model; give --student_model_path with a run folder or a checkpoint"
        )
    from llm_trainer.cli.setup.run_summary import format_validation
    from llm_trainer.evaluation.perplexity import evaluate_text
    from llm_trainer.inference.load_model import load_model

    texts = list(held_out_texts(input_folder(data)))
    model, tokenizer = load_model(own.student_model_path)
    result = evaluate_text(model, "\n".join(texts))
    prompts = [beginning(text, tokenizer) for text in islice(texts, own.num_samples)]
    answers = (
        model.generate(
            prompts, max_new_tokens=min(own.max_new_tokens, model.context - PROMPT_TOKENS), temperature=0.0
        )
        if prompts
        else []
    )
    output.mkdir(parents=True, exist_ok=True)
    records = ({"prompt": prompt, "output": answer} for prompt, answer in zip(prompts, answers, strict=True))
    _write(
        output / OUTPUTS_FILE, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    )
    report = {
        "model": own.student_model_path,
        "documents": len(texts),
        "tokens": result.tokens,
        **result.metrics,
        "outputs": len(answers),
    }
    _write(output / REPORT_FILE, json.dumps(report, ensure_ascii=False, indent=1) + "\n")
    console.print(
        f"validation  {format_validation(result.metrics)} over {result.tokens:,} tokens of {len(texts):,} "
        "documents",
        markup=False,
    )
    console.print(f"wrote       {output / OUTPUTS_FILE}, {output / REPORT_FILE}", markup=False)


def input_folder(data: DataConfig) -> Path:
    """The folder with the splits.

    Raises:
        UsageError: If it does not exist.
    """
    folder = Path(data.input or "")
    if not folder.is_dir():
        raise UsageError(
            f"the folder {folder} does not exist; create it with scripts/prepare_data.py --output {folder}"
        )
    return folder


def is_prepared(folder: Path) -> bool:
    """Whether this is a prepared folder, or a mixture of such folders."""
    from llm_trainer.data.metadata import METADATA_FILE
    from llm_trainer.data.mixture_dataset import MIXTURE_FILE

    return (folder / METADATA_FILE).is_file() or (folder / MIXTURE_FILE).is_file()


def held_out_texts(folder: Path) -> Iterator[str]:
    """The documents of the test split, else of the validation split, from shards or from texts.

    Raises:
        UsageError: If there are none.
    """
    from llm_trainer.cli.setup.export_splits import documents
    from llm_trainer.data.prepared_dataset import open_prepared_dataset
    from llm_trainer.data.sources.presplit_source import PresplitSource

    if is_prepared(folder):
        prepared = open_prepared_dataset(folder)
        tokens = next(
            (split for split in (prepared.test, prepared.validation) if split is not None and len(split)),
            None,
        )
        if tokens is None or prepared.tokenizer is None:
            raise UsageError(
                f"{folder} has no test and no validation split; prepare it with val_ratio or test_ratio "
                "above 0"
            )
        yield from documents(tokens, prepared.tokenizer)
        return
    yield from PresplitSource(folder).held_out_texts()


def beginning(text: str, tokenizer: Tokenizer) -> str:
    """The first tokens of a document as text."""
    return tokenizer.decode(tokenizer.encode(text)[:PROMPT_TOKENS])


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
