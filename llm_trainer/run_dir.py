"""The run folder: names of its contents, verification of checkpoints, and lookup of the folder that a user
names.

A checkpoint is trusted only if its `manifest.json`, which is written last, lists every file with its size and
SHA-256 and all of them agree. This detects an interrupted save, a faulty disk and an edited file without
opening a tensor. Nothing here needs torch, so the command line can answer in milliseconds.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast

from llm_trainer.errors import CheckpointError

CHECKPOINT_PREFIX = "checkpoint-"
EMERGENCY_PREFIX = "emergency-"
# Saved often and soon replaced, in addition to the checkpoints that are kept.
EPHEMERAL_PREFIX = "recent-"
BEST_MODEL = "best_model"
FINAL_MODEL = "final_model"
# A folder that is being written or deleted. It never counts as a checkpoint.
TEMPORARY_PREFIX = ".tmp-"
# The previous folder of a name while its replacement is renamed. At that moment it is the only complete one.
REPLACED_PREFIX = ".old-"
# Where a new run moves the files that an earlier run left in the same folder.
EARLIER_PREFIX = "earlier-"

MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.json"
RUN_FILE = "run.json"
RANDOM_FILE = "random.json"
OPTIMIZER_FOLDER = "optimizer"
METRICS_FILE = "metrics.jsonl"
OPERATIONS_FILE = "operations.jsonl"
LOGS_FOLDER = "logs"
TENSORBOARD_LINK = "tensorboard"
TEXT_LOG = "train.log"
WANDB_ID_FILE = "wandb_run_id"
LOCK_FILE = "run.lock"

MANIFEST_FORMAT = 1

_STEP_FOLDER = re.compile(
    rf"(?:{re.escape(REPLACED_PREFIX)})?(?:{CHECKPOINT_PREFIX}|{EMERGENCY_PREFIX}|{EPHEMERAL_PREFIX})(\d+)"
)
_STEP_NAME = re.compile(
    r"(?:checkpoint|ckpt|emergency|recent|step)(?:[-_]step)?[-_]?(\d+)(?:\.(?:pt|pth|ckpt|safetensors))?"
)
_MODEL_NAME = re.compile(r"(best|final)(?:[-_]model)?(?:\.(?:pt|pth|ckpt|safetensors))?")

Report = Callable[[str], None]
Verify = Callable[[Path], list[str]]  # returns the problems of a checkpoint folder
FileEntry: TypeAlias = "Mapping[str, int | str]"
JSON: TypeAlias = "str | int | float | bool | Sequence[JSON] | Mapping[str, JSON] | None"


@dataclass(frozen=True)
class FoundCheckpoint:
    """A checkpoint folder in a run folder, which is not verified yet."""

    path: Path
    step: int


def ephemeral_name(step: int) -> str:
    """Folder name of a short-lived checkpoint: `recent-<step>`."""
    return f"{EPHEMERAL_PREFIX}{step}"


def checkpoint_name(step: int) -> str:
    """Folder name of a checkpoint: `checkpoint-<step>`."""
    return f"{CHECKPOINT_PREFIX}{step}"


def emergency_name(step: int) -> str:
    """Folder name of an emergency checkpoint: `emergency-<step>`."""
    return f"{EMERGENCY_PREFIX}{step}"


def file_entries(folder: Path, paths: Iterable[Path]) -> dict[str, FileEntry]:
    """Size in bytes and SHA-256 of files under `folder`, by their relative names."""
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(paths)
    }


def write_manifest(folder: Path, files: Mapping[str, FileEntry] | None = None) -> Path:
    """Write `manifest.json`, the list of a checkpoint's files. The caller syncs it to disk.

    Args:
        folder: The checkpoint folder.
        files: Entries of the files, from `file_entries`; None: every file under `folder`.

    Returns:
        The path of the manifest.
    """
    if files is None:
        files = file_entries(
            folder, (path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST_FILE)
        )
    manifest = folder / MANIFEST_FILE
    manifest.write_text(
        json.dumps({"format": MANIFEST_FORMAT, "files": files}, indent=1) + "\n", encoding="utf-8"
    )
    return manifest


def verify(folder: Path, *, contents: bool = True, shard: tuple[int, int] = (0, 1)) -> list[str]:
    """Verify a checkpoint folder against its manifest.

    Args:
        folder: The checkpoint folder.
        contents: Also compare the hashes of the contents. False: sizes only, and no file is read.
        shard: (index, number) of the fraction of the contents that is read here, so that ranks can divide the
            work.

    Returns:
        The problems, one line each. Empty: the checkpoint is complete.
    """
    try:
        listed = _read_manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    read = _files_of(shard, listed) if contents else set()
    problems = [
        problem
        for name, entry in listed.items()
        for problem in _file_problems(folder / name, name, entry, name in read)
    ]
    # Readers of weights load every *.safetensors file that they find, so an unlisted one is a problem.
    found = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.safetensors")))
    return problems + [f"{name} is not in the manifest" for name in found if name not in listed]


def list_checkpoints(run_folder: Path) -> list[FoundCheckpoint]:
    """List the folders of `run_folder` that may be resumed.

    Returns:
        The checkpoints, not verified, by decreasing step. At the same step, checkpoints precede the best and
        the final model.
    """
    if not run_folder.is_dir():
        return []
    folders = sorted((path for path in run_folder.iterdir() if path.is_dir()), reverse=True)
    found = [FoundCheckpoint(path, step) for path in folders if (step := _step_of(path)) is not None]
    return sorted(
        found,
        key=lambda one: (
            -one.step,
            one.path.name.startswith(REPLACED_PREFIX),
            not _STEP_FOLDER.fullmatch(one.path.name),
        ),
    )


def resolve_resume_folder(spec: str | Path, report: Report | None = None, check: Verify = verify) -> Path:
    """Find the checkpoint to resume, and verify its contents.

    A run folder means its newest complete checkpoint. A checkpoint folder, a file in one, or a name such as
    `checkpoint_step_50000.pt` means that checkpoint.

    Args:
        spec: What the user named.
        report: Called with a line for each damaged checkpoint that is skipped; None: print it to stderr.
        check: Verifies a folder.

    Raises:
        CheckpointError: There is no such checkpoint, or it is damaged; the message names a complete one.
    """
    path = Path(spec)
    if path.is_dir() and not _is_model_folder(path):
        return _newest_complete(path, report or _to_stderr, check)
    folder = _named_folder(path)
    if folder.is_file():
        raise CheckpointError(
            f"{folder} holds only weights, which cannot be resumed; start from them with --init_from={folder}"
        )
    problems = check(folder)
    if problems:
        raise CheckpointError(f"{folder} cannot be resumed: {_briefly(problems)}{_another(folder, check)}")
    return folder


def resolve_model_folder(spec: str | Path, report: Report | None = None) -> Path:
    """Find the model folder whose weights are to be loaded.

    A run folder means best_model, else final_model, else its newest checkpoint.

    Args:
        spec: What the user named.
        report: Called with a line for each damaged folder that is skipped; None: print it to stderr.

    Returns:
        A folder with `config.json`, or an existing `.pt` file, which needs to be imported.

    Raises:
        CheckpointError: There is no such model, or it is damaged.
    """
    path = Path(spec)
    if path.is_dir() and not _is_model_folder(path):
        preferred = [
            folder for name in (BEST_MODEL, FINAL_MODEL) if (folder := _existing(path, name)) is not None
        ]
        for folder in preferred:
            if problems := verify(folder, contents=False):
                (report or _to_stderr)(f"skipping {folder}: {_briefly(problems)}")
            else:
                return folder
        if not preferred and not list_checkpoints(path) and (path / "ckpt.pt").is_file():
            return path / "ckpt.pt"
        return _newest_complete(path, report or _to_stderr, _sizes)
    folder = _named_folder(path)
    if folder.is_dir() and (folder / MANIFEST_FILE).exists() and (problems := verify(folder, contents=False)):
        raise CheckpointError(f"{folder} is damaged: {_briefly(problems)}{_another(folder, verify)}")
    return folder


def read_json(path: Path) -> dict[str, JSON]:
    """Read a JSON object from a file; raises CheckpointError where it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # not utf-8, or not JSON
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def _files_of(shard: tuple[int, int], listed: Mapping[str, Mapping[str, JSON]]) -> set[str]:
    """The files of one of several shards of about equal size in bytes."""

    def size_of(name: str) -> int:
        size = listed[name].get("size")
        return size if isinstance(size, int) else 0

    loads, own = [0] * shard[1], set()
    for name in sorted(listed, key=lambda name: (-size_of(name), name)):
        least = loads.index(min(loads))
        loads[least] += size_of(name)
        own |= {name} if least == shard[0] else set()
    return own


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(folder: Path) -> dict[str, Mapping[str, JSON]]:
    if not (folder / MANIFEST_FILE).exists():
        raise CheckpointError(
            f"no {MANIFEST_FILE}: the save did not finish" if folder.is_dir() else "no such folder"
        )
    manifest = read_json(folder / MANIFEST_FILE)
    files = manifest.get("files")
    if manifest.get("format") != MANIFEST_FORMAT or not isinstance(files, dict) or not files:
        raise CheckpointError(f"{MANIFEST_FILE} is damaged, or not of format {MANIFEST_FORMAT}")
    for name, entry in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts or not isinstance(entry, dict):
            raise CheckpointError(f"{MANIFEST_FILE} has an entry that is not a file of this folder: {name!r}")
    return cast("dict[str, Mapping[str, JSON]]", files)


def _file_problems(path: Path, name: str, entry: Mapping[str, JSON], contents: bool) -> Iterator[str]:
    try:
        size = path.stat().st_size
        if size != entry.get("size"):
            yield f"{name} has {size} bytes instead of {entry.get('size')}"
        elif contents and _sha256(path) != entry.get("sha256"):
            yield f"{name} has changed since it was saved"
    except FileNotFoundError:
        yield f"{name} is missing"
    except OSError as error:
        yield f"{name} cannot be read: {error.strerror}"


def step_from_name(name: str) -> int | None:
    """The step in a checkpoint folder's name; None for other names."""
    match = _STEP_FOLDER.fullmatch(name)
    return int(match[1]) if match else None


def _step_of(path: Path) -> int | None:
    """The step of a checkpoint folder, from its name or its state.json; None for other folders."""
    if (named := step_from_name(path.name)) is not None:
        return named
    if path.name.removeprefix(REPLACED_PREFIX) not in (BEST_MODEL, FINAL_MODEL):
        return None
    try:
        step = read_json(path / STATE_FILE).get("step")
    except CheckpointError:
        return None
    return step if isinstance(step, int) else None


def _existing(run_folder: Path, name: str) -> Path | None:
    """The folder of this name, or the previous one if the process was killed while it was being replaced."""
    return next(
        (
            folder
            for folder in (run_folder / name, run_folder / f"{REPLACED_PREFIX}{name}")
            if folder.is_dir()
        ),
        None,
    )


def _newest_complete(run_folder: Path, report: Report, check: Verify) -> Path:
    found = list_checkpoints(run_folder)
    for one in found:
        problems = check(one.path)
        if not problems:
            return one.path
        report(f"skipping {one.path}: {_briefly(problems)}")
    if found:
        raise CheckpointError(
            f"{run_folder}: all of its {len(found)} checkpoints are damaged; the lines above list the "
            "problems"
        )
    names = f"{CHECKPOINT_PREFIX}<step>, {BEST_MODEL} or {FINAL_MODEL}"
    raise CheckpointError(f"{run_folder} holds no checkpoint (no {names}); give the run folder")


def _is_model_folder(path: Path) -> bool:
    return (
        (path / "config.json").is_file()
        or (path / MANIFEST_FILE).is_file()
        or _STEP_FOLDER.fullmatch(path.name) is not None
    )


def _named_folder(path: Path) -> Path:
    """The folder that a path other than a run folder means: itself, the folder of a file, or the checkpoint
    that another tool's file name means.
    """
    if path.is_dir():
        return path
    if path.is_file():
        return path if path.suffix in (".pt", ".pth", ".ckpt") else path.parent
    run_folder, name = path.parent, path.name
    if match := _MODEL_NAME.fullmatch(name):
        found = _existing(run_folder, BEST_MODEL if match[1] == "best" else FINAL_MODEL)
    elif match := _STEP_NAME.fullmatch(name):
        step = int(match[1])
        found = _existing(run_folder, checkpoint_name(step)) or _existing(run_folder, emergency_name(step))
        found = found or next((one.path for one in list_checkpoints(run_folder) if one.step == step), None)
    else:
        found = None
    if found is None:
        there = ", ".join(one.path.name for one in list_checkpoints(run_folder))
        raise CheckpointError(
            f"{str(path)!r} is not a checkpoint, a model folder or a run folder"
            + (f"; {run_folder} holds {there}" if there else "; check the path")
        )
    return found


def _sizes(folder: Path) -> list[str]:
    return verify(folder, contents=False)


def _another(folder: Path, check: Verify) -> str:
    """A complete checkpoint next to a damaged one, as the end of a sentence."""
    for one in list_checkpoints(folder.parent):
        if one.path != folder and not check(one.path):
            return f"; {one.path} is complete"
    return "; no other checkpoint of the run is complete"


def _briefly(problems: list[str]) -> str:
    return "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)
