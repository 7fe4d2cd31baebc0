"""What comes from outside the settings: `.env`, environment variables, and what a launcher (torchrun) tells
its processes.

Only this module and `cli` read environment variables. `.env` holds accounts and keys, so that they never
stand in a settings file that is saved with a checkpoint.
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
    """Which of how many processes this is; one process that nobody launched is rank 0 of 1. `attempt` counts
    torchrun's restarts.

    `local_rank` and `local_size`: which this is of the processes of its machine, and how many these are.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    launched: bool = False
    attempt: str = "0"
    local_size: int = 1


def launch_environment(variables: Mapping[str, str] | None = None) -> LaunchEnvironment:
    """The launcher's RANK, LOCAL_RANK and WORLD_SIZE; raises UsageError where they are not whole numbers that
    fit together.
    """
    environment = os.environ if variables is None else variables
    if "WORLD_SIZE" not in environment or "RANK" not in environment:
        return LaunchEnvironment()
    numbers = {}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        text = environment.get(name, "1" if name == "LOCAL_WORLD_SIZE" else "0")
        if not text.strip().isdigit():
            raise UsageError(f"{name}={text!r} must be a whole number; torchrun sets it")
        numbers[name] = int(text)
    if not numbers["RANK"] < numbers["WORLD_SIZE"]:
        raise UsageError(
            f"RANK={numbers['RANK']} does not fit WORLD_SIZE={numbers['WORLD_SIZE']}; torchrun sets both"
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
    """The variables of ours that a `.env` file sets, empty ones left out; {} without a file. Raises
    UsageError for a bad WANDB_MODE.
    """
    if not path.is_file():
        return {}
    from dotenv import dotenv_values

    said = {
        name: value
        for name, value in dotenv_values(path, encoding="utf-8").items()
        if name in ENVIRONMENT_NAMES and value
    }
    if said.get("WANDB_MODE", "online") not in _WANDB_MODES:
        raise UsageError(f"{path}: WANDB_MODE={said['WANDB_MODE']!r}; choose {', '.join(_WANDB_MODES)}")
    return said


def apply_dotenv(folder: Path | None = None) -> None:
    """Put `.env`'s variables into this process's environment, where the hub's and W&B's libraries look; what
    is set already stays.
    """
    for name, value in read_dotenv((folder or Path.cwd()) / ".env").items():
        os.environ.setdefault(name, value)


def use_compile_cache() -> Path:
    """The user's folder for compiled code and what is known about it, kept between runs; PyTorch is told to
    use it too.

    A TORCHINDUCTOR_CACHE_DIR that is set already holds.
    """
    own = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm-trainer" / "compiled"
    return Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(own)))


def local_copy_dir(address: str) -> Path:
    """The user's folder for the local copy of a run that lives at an address such as `s3://bucket/run`."""
    scheme, _, rest = address.partition("://")
    place = [part for part in rest.split("/") if part not in ("", ".", "..")]
    return Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "llm-trainer", "runs", scheme, *place
    )


def api_keys() -> tuple[str, ...]:
    """The keys that the server accepts, from LLM_TRAINER_API_KEYS (separated by commas); none: no key is
    asked for.
    """
    return tuple(key.strip() for key in os.environ.get("LLM_TRAINER_API_KEYS", "").split(",") if key.strip())
