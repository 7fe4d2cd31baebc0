"""Prepare Tiny Shakespeare with GPT-2's BPE, split as in nanoGPT (the last tenth is held out).

    python data/shakespeare/prepare.py [--input FILE_OR_FOLDER] [--ranks r50k_base.tiktoken]

It writes dataset/, tokenizer.json and metadata.json next to this file.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1]))  # run from a clone without installation

from llm_trainer.cli.errors import run_with_error_handling  # noqa: E402


def main() -> int:
    from llm_trainer.data.catalog.nanogpt_datasets import run_prepare_script

    return run_prepare_script("shakespeare", HERE, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(run_with_error_handling(main))
