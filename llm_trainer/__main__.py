"""`python -m llm_trainer` is the command `llm-trainer`."""

import sys

from llm_trainer.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
