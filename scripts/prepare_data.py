"""Prepare raw text: cleaned train, validation and test splits, a tokenizer and token shards."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone without installation

from llm_trainer.cli.scripts import script

if __name__ == "__main__":
    sys.exit(script("scripts/prepare_data.py"))
