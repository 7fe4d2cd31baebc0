"""Reading settings from files: JSON, YAML, and nanoGPT's Python files. Each file becomes a list of raw
values.

JSON and YAML may hold sections, flat keys, or both. Names that begin with an underscore are comments. A name
that occurs twice in one mapping is an error, where the parsers would keep the last value.

A Python file is run by `runpy`, as nanoGPT runs its own by `exec`: it is the user's program. Names that begin
with an underscore, modules, functions and classes are ignored; everything else must be a setting.
"""

from __future__ import annotations

import json
import re
import runpy
import types
from collections.abc import Hashable, Mapping
from pathlib import Path

import yaml
from yaml.constructor import ConstructorError

from llm_trainer.config.parse.merge import RawValue
from llm_trainer.config.schema.run_config import section_types
from llm_trainer.errors import UsageError


def read_text(path: Path) -> str:
    """Read a text file; raises UsageError where it is missing, a folder or not UTF-8."""
    if not path.exists():
        others = (
            sorted(
                item.name for item in path.parent.glob(f"*{path.suffix}") if not item.name.startswith(".")
            )[:8]
            if path.parent.is_dir()
            else []
        )
        raise UsageError(
            f"there is no file {path}" + (f"; {path.parent} has {', '.join(others)}" if others else "")
        )
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a .json, .yaml or .py file in it")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None


def read_mapping_or_list(path: Path) -> object:
    """Parse a JSON or YAML file; raises UsageError where it does not parse."""
    text = read_text(path)
    try:
        if path.suffix.lower() == ".json":
            return json.loads(text, object_pairs_hook=_reject_duplicate_keys)
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}"
        ) from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:  # a whole number of more digits than Python reads
        raise UsageError(f"{path}: not {path.suffix.lstrip('.').upper()}: {error}") from None
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def read_settings(path: Path) -> list[RawValue]:
    """Read all settings of a file; raises UsageError where it cannot be read."""
    if path.suffix.lower() == ".py":
        return _from_python(path)
    if not path.is_dir() and path.suffix.lower() not in (".json", ".yaml", ".yml"):
        raise UsageError(
            f"{path} is not a settings file: settings are read from .json, .yaml, .yml and .py files"
        )
    content = read_mapping_or_list(path)
    if content is None:
        return []
    if isinstance(content, list):
        raise UsageError(
            f"{path} holds a list, as a scaling schedule does: pass it as --scaling_schedule_file={path}"
        )
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds a {type(content).__name__}, not a mapping of settings")
    return _from_mapping(content, str(path))


def _from_mapping(content: Mapping[str, object] | Mapping[object, object], source: str) -> list[RawValue]:
    _check_kind(content, source)
    values: list[RawValue] = []
    for key, value in content.items():
        name = str(key)
        if name in section_types() and (isinstance(value, Mapping) or value is None):
            values += [
                RawValue(str(inner), inner_value, source, name)
                for inner, inner_value in (value or {}).items()
            ]
        else:
            values.append(RawValue(name, value, source))
    return [item for item in values if not item.name.startswith("_")]


def _check_kind(content: Mapping[str, object] | Mapping[object, object], source: str) -> None:
    """Raises UsageError for a file of another kind, with the option or command that reads it."""
    if "train_micro_batch_size_per_gpu" in content or "zero_optimization" in content:
        raise UsageError(
            f"{source} is a DeepSpeed configuration: pass it as --use_deepspeed --deepspeed_config={source}"
        )
    if "loaders" in content:
        raise UsageError(
            f"{source} is a domain bridge file: pass it to python scripts/prepare_domain_datasets.py "
            f"--config {source}"
        )


def _from_python(path: Path) -> list[RawValue]:
    read_text(path)
    try:
        names = runpy.run_path(str(path))
    except SystemExit as error:
        raise UsageError(f"{path} exited with code {error.code} instead of setting names") from None
    except Exception as error:  # the file is the user's program, which may raise anything
        raise UsageError(f"{path} failed: {type(error).__name__}: {error}") from error
    plain = {
        name: value
        for name, value in names.items()
        if not isinstance(value, (types.ModuleType, type)) and not callable(value)
    }
    values = _from_mapping(plain, str(path))
    for item in values:
        if not isinstance(item.value, (bool, int, float, str, list, tuple, dict, type(None))):
            raise UsageError(
                f"{path}: {item.name} is a {type(item.value).__name__}; begin its name with an underscore if "
                "it is not a setting"
            )
    if any(
        item.name in ("gradient_accumulation_steps", "grad_accum", "accumulation_steps") for item in values
    ):
        values.append(
            RawValue(
                "global_grad_accumulation", True, f"{path} (nanoGPT's files count all ranks)", "training"
            )
        )
    return values


def _reject_duplicate_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found and found[name] != value:
            raise UsageError(f"{name} is set twice, to {found[name]!r} and {value!r}; keep one")
        found[name] = value
    return found


_MERGE = "tag:yaml.org,2002:merge"  # <<: *base


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_SURPRISING = re.compile(r"[-+]?0[0-7_]*[1-7][0-7_]*|[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: 5e-4 is a number (PyYAML follows YAML 1.1, where it is text), and a duplicate
    key is an error. So are numbers that only YAML 1.1 reads otherwise than they look: 010 (octal, 8) and 1:30
    (base 60, 90).
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        found: dict[Hashable, object] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:  # merged keys may be overridden
                continue
            line = f"line {key_node.start_mark.line + 1}"
            key, value = (
                self.construct_object(key_node, deep=True),
                self.construct_object(value_node, deep=True),
            )
            if not isinstance(key, Hashable):
                raise UsageError(
                    f"{line}: {key!r} cannot be a name; put text with braces or brackets in quotes"
                )
            if key in found and found[key] != value:
                raise UsageError(f"{line}: {key} is set twice, to {found[key]!r} and {value!r}; keep one")
            found[key] = value
        self.flatten_mapping(node)
        return super().construct_mapping(node, deep=True)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> object:
        if isinstance(node, yaml.ScalarNode) and node.tag in _NUMBERS and _SURPRISING.fullmatch(node.value):
            read = super().construct_object(node, deep)
            problem = f"YAML 1.1 reads {node.value} as the number {read}; write {read}, or put text in quotes"
            raise ConstructorError(None, None, problem, node.start_mark)
        try:
            return super().construct_object(node, deep)
        except (
            ValueError,
            KeyError,
            AttributeError,
        ) as error:  # PyYAML lets through what its scalars' own readers raise
            if not isinstance(node, yaml.ScalarNode):
                raise
            kind = node.tag.rpartition(":")[2]
            problem = f"{node.value!r} is not a valid {kind}, which YAML reads it as; put text in quotes"
            raise ConstructorError(None, None, problem, node.start_mark) from error


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:\d[\d_]*)(?:\.[\d_]*)?[eE][-+]?\d+|[-+]?\.\d+(?:[eE][-+]?\d+)?"),
    list("-+0123456789."),
)
