"""Tiny Shakespeare with GPT-2's BPE, as nanoGPT splits it (the last tenth held out).

    python data/shakespeare/prepare.py [--input FILE_OR_FOLDER] [--ranks r50k_base.tiktoken]

Writes dataset/, tokenizer.json and metadata.json beside this file.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1]))  # a clone runs without being installed

from llm_trainer.cli.errors import guarded  # noqa: E402


def main() -> int:
    from llm_trainer.data.catalog.nanogpt_datasets import run_prepare_script

    return run_prepare_script("shakespeare", HERE, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(guarded(main))
