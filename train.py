"""Train a Llama-shaped model on a dataset that data_prep_tool.py prepared."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # run from a clone without installation

from llm_trainer.cli.scripts import script

if __name__ == "__main__":
    sys.exit(script("train.py"))
