"""The one place where errors become messages: what a user can mend is said in a line or two, with an exit
status, never as a traceback.

`LLM_TRAINER_DEBUG=1` shows the traceback as well. An error that no user can mend is a defect of ours: its traceback is
left to appear, since it is what a report needs.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llm_trainer.errors import LLMTrainerError

INTERRUPTED = 130

# What the core cannot do without: import name → name to install.
CORE_PACKAGES = {
    "torch": "torch",
    "numpy": "numpy",
    "pydantic": "pydantic",
    "dotenv": "python-dotenv",
    "yaml": "pyyaml",
    "rich": "rich",
    "tokenizers": "tokenizers",
    "tiktoken": "tiktoken",
    "safetensors": "safetensors",
    "huggingface_hub": "huggingface-hub",
    "fsspec": "fsspec",
    "psutil": "psutil",
    "tensorboard": "tensorboard",
}
EXTRAS = {"datasets": "hub", "pyarrow": "formats", "wandb": "wandb", "torchao": "quantize"}


def guarded(run: Callable[[], int | None]) -> int:
    """Call `run` and return an exit status; errors that a user can mend are printed on stderr."""
    try:
        return run() or 0
    except KeyboardInterrupt:
        return _say("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "llm_trainer":
            raise
        return _say(missing_packages(error.name), 1)
    except (OSError, MemoryError) as error:
        return _say(system_message(error), 1)
    except our_errors() as error:
        return _say(str(error), error.exit_code)
    except RuntimeError as error:
        if "OutOfMemory" not in type(error).__name__ and "can't allocate memory" not in str(error):
            raise
        first = str(error).splitlines()[0]
        return _say(
            f"out of memory: {first}\nUse a smaller micro_batch_size, a shorter context, gradient_checkpointing or a smaller model.",
            1,
        )


def our_errors() -> tuple[type[LLMTrainerError], ...]:
    """The error classes of ours that can have been raised: none before their module, which needs pydantic, is
    imported.
    """
    module = sys.modules.get("llm_trainer.errors")
    return (module.LLMTrainerError,) if module is not None else ()


def system_message(error: OSError | MemoryError) -> str:
    """What the operating system refused, in words with a way out."""
    if isinstance(error, MemoryError):
        return "out of memory: use a smaller micro_batch_size, a shorter context or a smaller model"
    about = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the disk{about}; free some, or choose another output_dir. What was saved before is whole."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"not allowed to use {error.filename or 'a file'}: {error.strerror}; change its permissions or choose another folder"
    if error.errno == errno.ENOENT:
        return f"there is no {error.filename}"
    return f"{error.strerror or error}{about}"


def missing_packages(name: str | None) -> str:
    """One line: which packages are missing and the command that installs them."""
    missing = [
        install for module, install in CORE_PACKAGES.items() if importlib.util.find_spec(module) is None
    ]
    if missing:
        line = f"missing: {', '.join(missing)}. Install with: pip install {' '.join(missing)}"
        return f"{line}   (or everything: pip install -r requirements.txt)"
    top = (name or "").partition(".")[0]
    if top in EXTRAS:
        return f"this needs the package {top}. Install with: pip install 'llm-trainer[{EXTRAS[top]}]'"
    return f"missing: {top}. Install with: pip install {top}"


def _say(message: str, status: int) -> int:
    sys.stdout.flush()
    print(f"error: {message}" if status != INTERRUPTED else message, file=sys.stderr)
    if os.environ.get("LLM_TRAINER_DEBUG", "") not in ("", "0"):
        traceback.print_exc()
    return status
