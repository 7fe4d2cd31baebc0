"""Sample from a trained or a pretrained model, with nanoGPT's names."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # a clone runs without being installed

from llm_trainer.cli.main import script

if __name__ == "__main__":
    sys.exit(script("sample.py"))
