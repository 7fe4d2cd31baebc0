"""Convert splits to token shards, or run a trained model over them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone without installation

from llm_trainer.cli.scripts import script

if __name__ == "__main__":
    sys.exit(script("scripts/process_data.py"))
