"""Sample from a trained or pretrained model, with nanoGPT's options."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # run from a clone without installation

from llm_trainer.cli.scripts import script

if __name__ == "__main__":
    sys.exit(script("sample.py"))
