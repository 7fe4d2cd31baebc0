"""Tiny Shakespeare by character, as nanoGPT numbers and splits it (65 characters, the last tenth held out).

    python data/shakespeare_char/prepare.py [--input FILE_OR_FOLDER]

Writes dataset/, tokenizer.json and metadata.json beside this file.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1]))  # a clone runs without being installed

from llm_trainer.cli.errors import guarded  # noqa: E402


def main() -> int:
    from llm_trainer.data.catalog.nanogpt_datasets import run_prepare_script

    return run_prepare_script("shakespeare_char", HERE, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(guarded(main))
