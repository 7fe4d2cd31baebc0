"""Loss, perplexity and bits per byte of a model."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # a clone runs without being installed

from llm_trainer.cli.main import script

if __name__ == "__main__":
    sys.exit(script("evaluate.py"))
