"""nanoGPT's classic data sets, as `data/<name>/prepare.py` makes them: Tiny Shakespeare by character or with
GPT-2's BPE, and OpenWebText.

Each is downloaded, or taken from `--input`. GPT-2's vocabulary is downloaded through tiktoken, or taken from
`--ranks`. The shares are nanoGPT's: the last tenth of Shakespeare is held out, and 0.05 % of OpenWebText's
documents.
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
    """One of the data sets: how it is split, and whether its ids are GPT-2's or characters."""

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
    """`python data/<name>/prepare.py`: prepare into `folder`, where the script lies. Raises DataError where
    something cannot be had.
    """
    classic = NANOGPT_DATASETS[name]
    arguments = _parser(name, classic, folder).parse_args([_with_underscores(word) for word in argv])
    console = Console()
    tokenizer = Tokenizer.tiktoken("gpt2", arguments.ranks) if classic.uses_gpt2 else None
    source: Source | None = None
    text: Path | None = arguments.input
    if text is None and classic.is_on_hub:
        source = HubSource(
            "Skylion007/openwebtext", "plain_text", "train", None, "text", revision="refs/convert/parquet"
        )
    elif text is None:
        text = download_shakespeare(arguments.output_dir, console)
    config = DataConfig(
        input=None if text is None else str(text),
        tokenizer_type="auto" if classic.uses_gpt2 else "char",
        val_ratio=classic.val_ratio,
        seed=classic.seed,
        num_workers=arguments.num_workers,
    )
    summary = prepare_dataset(
        config, arguments.output_dir, console=console, tokenizer=tokenizer, source=source
    )
    for line in summary.lines():
        console.print(line, highlight=False, markup=False)
    return 0


def download_shakespeare(folder: Path, console: Console | None = None) -> Path:
    """`input.txt` in the folder, downloaded unless it is there. Raises DataError without a network, and for
    other contents.
    """
    try:
        return download(RemoteFile(SHAKESPEARE_URL, "input.txt", sha256=SHAKESPEARE_SHA256), folder, console)
    except DataError as error:
        place = folder / "input.txt"
        raise DataError(
            f"{error}. Fetch it elsewhere and save it as {place}, or give a text of your own with --input FILE"
        ) from None


def _parser(name: str, classic: NanogptDataset, folder: Path) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"data/{name}/prepare.py", description=f"Prepare {classic.summary}.", allow_abbrev=False
    )
    parser.add_argument(
        "--input", type=Path, help="a text file, or a folder of them, instead of the download"
    )
    if classic.uses_gpt2:
        parser.add_argument(
            "--ranks",
            type=Path,
            help="GPT-2's vocabulary as a file: tiktoken ranks (r50k_base.tiktoken) or vocab.bpe",
        )
    parser.add_argument("--output_dir", type=Path, default=folder, help="where to (default: %(default)s)")
    parser.add_argument(
        "--num_workers", type=int, default=1, help="workers that tokenise at once (default: %(default)s)"
    )
    return parser


def _with_underscores(word: str) -> str:
    """`--output-dir=x` is `--output_dir=x`, as everywhere."""
    name, equals, value = word.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if word.startswith("--") else word
