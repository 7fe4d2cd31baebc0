"""Environment variables, `.env`, and what a launcher (torchrun) sets for its processes.

Only this module and `cli` read environment variables. `.env` holds accounts and keys, so that they are never
part of a settings file, which is saved with each checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llm_trainer.errors import UsageError

ENVIRONMENT_NAMES = ("HF_TOKEN", "HF_HOME", "WANDB_API_KEY", "WANDB_MODE", "LLM_TRAINER_API_KEYS")
_WANDB_MODES = ("online", "offline", "disabled", "shared")


@dataclass(frozen=True)
class LaunchEnvironment:
    """Rank and world size of this process. A process without a launcher is rank 0 of 1.

    Attributes:
        rank: Number of this process among all.
        local_rank: Number of this process among those of its machine.
        world_size: Number of processes.
        launched: Whether a launcher started the process.
        attempt: Count of torchrun's restarts.
        local_world_size: Number of processes on this machine.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    launched: bool = False
    attempt: str = "0"
    local_world_size: int = 1


def launch_environment(variables: Mapping[str, str] | None = None) -> LaunchEnvironment:
    """Read the launcher's RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE.

    Args:
        variables: Environment variables; None: those of this process.

    Raises:
        UsageError: They are not whole numbers, or do not fit together.
    """
    environment = os.environ if variables is None else variables
    if "WORLD_SIZE" not in environment or "RANK" not in environment:
        return LaunchEnvironment()
    numbers = {}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        text = environment.get(name, "1" if name == "LOCAL_WORLD_SIZE" else "0")
        if not text.strip().isdigit():
            raise UsageError(
                f"invalid value for the environment variable {name}: {text!r} is not a whole number; "
                "torchrun sets it"
            )
        numbers[name] = int(text)
    if not numbers["RANK"] < numbers["WORLD_SIZE"]:
        raise UsageError(
            f"the environment variable RANK={numbers['RANK']} is not below "
            f"WORLD_SIZE={numbers['WORLD_SIZE']}; torchrun "
            "sets both"
        )
    return LaunchEnvironment(
        numbers["RANK"],
        numbers["LOCAL_RANK"],
        numbers["WORLD_SIZE"],
        True,
        environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
        max(numbers["LOCAL_WORLD_SIZE"], numbers["LOCAL_RANK"] + 1),
    )


def read_dotenv(path: Path) -> dict[str, str]:
    """Read the variables that a `.env` file sets, of those that this package knows.

    Args:
        path: The file, which may be missing.

    Returns:
        Name → value, without empty values.

    Raises:
        UsageError: WANDB_MODE has an unknown value.
    """
    if not path.is_file():
        return {}
    from dotenv import dotenv_values

    found = {
        name: value
        for name, value in dotenv_values(path, encoding="utf-8").items()
        if name in ENVIRONMENT_NAMES and value
    }
    if found.get("WANDB_MODE", "online") not in _WANDB_MODES:
        raise UsageError(
            f"invalid value for WANDB_MODE in {path}: {found['WANDB_MODE']!r}; choose "
            f"{', '.join(_WANDB_MODES)}"
        )
    return found


def apply_dotenv(folder: Path | None = None) -> None:
    """Set the variables of `.env` in this process's environment, where the libraries of the hub and of W&B
    read them. Variables that are already set stay as they are.

    Args:
        folder: The folder with `.env`; None: the current one.
    """
    for name, value in read_dotenv((folder or Path.cwd()) / ".env").items():
        os.environ.setdefault(name, value)


def compile_cache_dir() -> Path:
    """Make PyTorch keep compiled code in the user's cache folder, for later runs.

    A TORCHINDUCTOR_CACHE_DIR that is already set stays as it is.

    Returns:
        The folder.
    """
    own = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm-trainer" / "compiled"
    return Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(own)))


def local_copy_dir(address: str) -> Path:
    """The user's cache folder for the local copy of a run at an address such as `s3://bucket/run`."""
    scheme, _, rest = address.partition("://")
    parts = [part for part in rest.split("/") if part not in ("", ".", "..")]
    return Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "llm-trainer", "runs", scheme, *parts
    )


def api_keys() -> tuple[str, ...]:
    """The keys that the server accepts, from LLM_TRAINER_API_KEYS (separated by commas). Empty: no key is
    needed.
    """
    return tuple(key.strip() for key in os.environ.get("LLM_TRAINER_API_KEYS", "").split(",") if key.strip())


def is_cpu_decoder_enabled(variables: Mapping[str, str] | None = None) -> bool:
    """Whether generation uses the fast decoder (`inference/cpu`): unless LLM_TRAINER_CPU_DECODER is 0.

    Args:
        variables: The environment. None: this process's own.

    Returns:
        True without the variable.

    Raises:
        UsageError: The variable is neither 0 nor 1.
    """
    environment = os.environ if variables is None else variables
    text = environment.get("LLM_TRAINER_CPU_DECODER", "1").strip()
    if text not in ("0", "1"):
        raise UsageError(f"invalid value for LLM_TRAINER_CPU_DECODER: {text!r}; set 0 (off) or 1 (on)")
    return text == "1"


def use_fast_tokenizer() -> bool:
    """Whether `data/tokenization/fast` encodes text and trains vocabularies.

    LLM_TRAINER_FAST_TOKENIZER=0 switches it off; the `tokenizers` library then does both, with the same ids.
    """
    value = os.environ.get("LLM_TRAINER_FAST_TOKENIZER", "1")
    if value not in ("0", "1"):
        raise UsageError(f"LLM_TRAINER_FAST_TOKENIZER={value!r} must be 0 or 1; unset it for the default, 1")
    return value == "1"
