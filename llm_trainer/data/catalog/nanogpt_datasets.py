"""nanoGPT's datasets, as `data/<name>/prepare.py` prepares them.

They are Tiny Shakespeare by character or with GPT-2's BPE, and OpenWebText. Each is downloaded, or read from
`--input`. GPT-2's vocabulary is downloaded through tiktoken, or read from `--ranks`. The validation fractions
are nanoGPT's: the last tenth of Shakespeare, and 0.05 % of OpenWebText's documents.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from llm_trainer.config.schema.data import DataConfig
from llm_trainer.data.catalog.http_download import RemoteFile, download
from llm_trainer.data.pipeline.pipeline import prepare_dataset
from llm_trainer.data.sources.base import Source
from llm_trainer.data.sources.hub_source import HubSource
from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.errors import DataError

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass(frozen=True)
class NanogptDataset:
    """One of the datasets.

    Attributes:
        summary: What it is, for help texts.
        val_ratio: The fraction that is held out for validation.
        seed: The seed of the split.
        uses_gpt2: Whether its tokens are GPT-2's instead of characters.
        is_on_hub: Whether it is downloaded from the Hugging Face hub.
    """

    summary: str
    val_ratio: float
    seed: int
    uses_gpt2: bool
    is_on_hub: bool


NANOGPT_DATASETS = {
    "shakespeare_char": NanogptDataset(
        "Tiny Shakespeare by character", 0.1, 1337, uses_gpt2=False, is_on_hub=False
    ),
    "shakespeare": NanogptDataset(
        "Tiny Shakespeare with GPT-2's BPE", 0.1, 1337, uses_gpt2=True, is_on_hub=False
    ),
    "openwebtext": NanogptDataset(
        "OpenWebText with GPT-2's BPE (54 GB of disk)", 0.0005, 2357, uses_gpt2=True, is_on_hub=True
    ),
}


def run_prepare_script(name: str, folder: Path, argv: Sequence[str]) -> int:
    """Run `python data/<name>/prepare.py`.

    Args:
        name: A key of `NANOGPT_DATASETS`.
        folder: The script's folder, which is the default output folder.
        argv: The script's arguments.

    Returns:
        The exit code.

    Raises:
        DataError: The text or the vocabulary cannot be downloaded or read.
    """
    dataset = NANOGPT_DATASETS[name]
    arguments = _parser(name, dataset, folder).parse_args([_with_underscores(word) for word in argv])
    console = Console()
    tokenizer = Tokenizer.tiktoken("gpt2", arguments.ranks) if dataset.uses_gpt2 else None
    source: Source | None = None
    text: Path | None = arguments.input
    if text is None and dataset.is_on_hub:
        source = HubSource(
            "Skylion007/openwebtext", "plain_text", "train", None, "text", revision="refs/convert/parquet"
        )
    elif text is None:
        text = download_shakespeare(arguments.output_dir, console)
    config = DataConfig(
        input=None if text is None else str(text),
        tokenizer_type="auto" if dataset.uses_gpt2 else "char",
        val_ratio=dataset.val_ratio,
        seed=dataset.seed,
        num_workers=arguments.num_workers,
    )
    summary = prepare_dataset(
        config, arguments.output_dir, console=console, tokenizer=tokenizer, source=source
    )
    for line in summary.lines():
        console.print(line, highlight=False, markup=False)
    return 0


def download_shakespeare(folder: Path, console: Console | None = None) -> Path:
    """Download Tiny Shakespeare as `input.txt`, unless it is already there.

    Args:
        folder: Where to save it.
        console: Where progress is shown.

    Raises:
        DataError: It cannot be downloaded, or the file has other contents.
    """
    try:
        return download(RemoteFile(SHAKESPEARE_URL, "input.txt", sha256=SHAKESPEARE_SHA256), folder, console)
    except DataError as error:
        raise DataError(
            f"{error}. Download it elsewhere and save it as {folder / 'input.txt'}, or give a text of "
            "your own with --input FILE"
        ) from None


def _parser(name: str, dataset: NanogptDataset, folder: Path) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"data/{name}/prepare.py", description=f"Prepare {dataset.summary}.", allow_abbrev=False
    )
    parser.add_argument(
        "--input", type=Path, help="Text file, or folder of text files, to use instead of the download."
    )
    if dataset.uses_gpt2:
        parser.add_argument(
            "--ranks",
            type=Path,
            help="File with GPT-2's vocabulary: tiktoken's ranks (r50k_base.tiktoken) or vocab.bpe.",
        )
    parser.add_argument(
        "--output_dir", type=Path, default=folder, help="Output folder (default: %(default)s)."
    )
    parser.add_argument(
        "--num_workers",
        type=int,
        default=1,
        help="Number of worker processes for tokenization (default: %(default)s).",
    )
    return parser


def _with_underscores(word: str) -> str:
    """`--output-dir=x` means `--output_dir=x`, as in every command."""
    name, equals, value = word.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if word.startswith("--") else word
