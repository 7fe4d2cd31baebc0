"""The one place where errors become messages: an error that a user can fix ends in a line or two and an exit
code.

`LLM_TRAINER_DEBUG=1` prints the traceback as well. An error that no user can fix is a defect of this package:
its traceback appears, since a bug report needs it.
"""

from __future__ import annotations

import contextlib
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

# The packages that the core needs: import name → name to install.
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


def run_with_error_handling(run: Callable[[], int | None], invocation: str | None = None) -> int:
    """Run a command, and print errors that a user can fix on stderr.

    Args:
        run: The command; None means exit code 0.
        invocation: The command as it is typed, whose `--help` a usage error points to.

    Returns:
        The exit code; 1 if the reader of the output has gone, as `| head` does.
    """
    try:
        return _run(run, invocation)
    finally:
        _discard_unread_output()


def _run(run: Callable[[], int | None], invocation: str | None) -> int:
    try:
        code = run() or 0
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a failure becomes a message, and not when Python ends
        return code
    except KeyboardInterrupt:
        return _print_error("interrupted", INTERRUPTED)
    except BrokenPipeError:
        return 1
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "llm_trainer":
            raise
        return _print_error(missing_packages(error.name), 1)
    except (OSError, MemoryError) as error:
        return _print_error(system_message(error), 1)
    except package_errors() as error:
        is_usage = type(error).__name__ == "UsageError" and invocation is not None
        hint = f"\nTry '{invocation} --help'." if is_usage else ""
        return _print_error(f"{error}{hint}", error.exit_code)
    except RuntimeError as error:
        if "OutOfMemory" not in type(error).__name__ and "can't allocate memory" not in str(error):
            raise
        first = str(error).splitlines()[0]
        return _print_error(
            f"out of memory: {first}\nUse a smaller micro_batch_size, a shorter context, "
            "gradient_checkpointing "
            "or a smaller model.",
            1,
        )


def package_errors() -> tuple[type[LLMTrainerError], ...]:
    """The error classes of this package; none before their module, which can be late, is imported."""
    module = sys.modules.get("llm_trainer.errors")
    return (module.LLMTrainerError,) if module is not None else ()


def system_message(error: OSError | MemoryError) -> str:
    """What the operating system refused, and what to do about it."""
    if isinstance(error, MemoryError):
        return "out of memory; use a smaller micro_batch_size, a shorter context or a smaller model"
    about = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"no space left on the disk{about}; free some, or choose another output_dir. Earlier "
            "checkpoints are intact."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (
            f"permission denied for {error.filename or 'a file'}: {error.strerror}; change its permissions "
            "or choose another folder"
        )
    if error.errno == errno.ENOENT:
        return f"{error.filename} does not exist"
    return f"{error.strerror or error}{about}"


def missing_packages(name: str | None) -> str:
    """Which packages are missing, and the command that installs them.

    Args:
        name: The module that could not be imported.
    """
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


def _print_error(message: str, code: int) -> int:
    with contextlib.suppress(OSError):  # stdout is closed or full: the message still counts
        if sys.stdout is not None:
            sys.stdout.flush()
    with contextlib.suppress(OSError):  # stderr has no reader: the code still counts
        print(f"error: {message}" if code != INTERRUPTED else message, file=sys.stderr)
        if os.environ.get("LLM_TRAINER_DEBUG", "") not in ("", "0"):
            traceback.print_exc()
    return code


def _discard_unread_output() -> None:
    """Let a stream that cannot be written lead nowhere: when Python ends it flushes what is left, and would
    print a traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):  # no reader, a full disk; closed
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
