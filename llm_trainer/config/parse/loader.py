"""From a command line to a `RunConfig`, in the same way for every command and every script of the manuals.

Later sources win: the schema's default, the command's default, a preset, files in their order, flags.
`LoadedRun.origins` records where each value came from, for `--explain` and for messages.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from llm_trainer.config.describe import help_text
from llm_trainer.config.environment import launch_environment
from llm_trainer.config.parse.cli_args import ParsedArgs, parse_args
from llm_trainer.config.parse.command import CommandSpec, LoadedRun
from llm_trainer.config.parse.config_files import read_settings
from llm_trainer.config.parse.implied_defaults import apply_implied_defaults
from llm_trainer.config.parse.merge import (
    COMMAND_OPTIONS,
    FieldKey,
    RawValue,
    ResolvedValue,
    SettingNames,
    normalize,
)
from llm_trainer.config.parse.validation import check_launch
from llm_trainer.config.presets import get_preset
from llm_trainer.config.resolve.parallelism import planned_ranks
from llm_trainer.config.schema.base import Section, check_value
from llm_trainer.config.schema.run_config import SWITCHES, RunConfig, dotted_aliases, section_types
from llm_trainer.errors import UsageError

MODEL_FILE = "model_config.json"
_SETTINGS_FILES = (".py", ".json", ".yaml", ".yml")


def load_run(spec: CommandSpec, argv: Sequence[str]) -> LoadedRun:
    """Parse the command line of one command.

    `--help` and `--help-all` print the help and exit with code 0. Notes about the settings are printed to
    stderr, on the first rank only. When a run is resumed, its saved settings are not known here: call
    `LoadedRun.resolve` after merging with them.

    Args:
        spec: The command.
        argv: Its arguments.

    Raises:
        UsageError: A setting is unknown, contradictory, out of bounds or not read by this command.
    """
    loaded = _load(spec, argv)
    if launch_environment().rank == 0:
        for note in loaded.notes:
            print(note, file=sys.stderr)
    return loaded


def _load(spec: CommandSpec, argv: Sequence[str]) -> LoadedRun:
    names = spec.names()
    parsed = parse_args(argv, names)
    if parsed.help or parsed.help_all:
        print(help_text(spec, show_all=parsed.help_all))
        raise SystemExit(0)
    _assign_positional(spec, parsed)
    notes: list[str] = []
    values, defaults = _merge_sources(spec, parsed, notes)
    notes += apply_implied_defaults(values, defaults)
    is_resuming = spec.may_resume and _resumes(values)
    sections, options = _build(spec, values, defaults, is_resuming)
    config = (
        RunConfig.model_construct(None, **sections) if is_resuming else RunConfig.model_validate(sections)
    )
    launch = launch_environment()
    ranks = planned_ranks(config.training) if spec.uses_planned_ranks else launch.world_size
    files = [Path(name) for name in parsed.files]
    origins = {
        (f"{section}.{name}" if section else name): value.origin for (section, name), value in values.items()
    }
    loaded = LoadedRun(config, options, origins, parsed.explain, spec, notes, files, ranks, is_resuming)
    check_launch(config, origins, spec.read_sections(), ranks)
    if not is_resuming:
        loaded.resolve()
    return loaded


def _assign_positional(spec: CommandSpec, parsed: ParsedArgs) -> None:
    """Assign positional arguments: to settings files, or to the command's positional settings."""
    remaining = list(spec.positional)
    for argument in parsed.positional:
        is_file = Path(argument).suffix in _SETTINGS_FILES
        if spec.positional_config and is_file:
            parsed.files.append(argument)
        elif remaining:
            parsed.values.append(RawValue(remaining.pop(0), argument, f"the argument {argument!r}"))
        else:
            hint = f"; a settings file is given as --config={argument}" if is_file else ""
            raise UsageError(
                f"unexpected argument {argument!r} of {spec.name}{hint}; settings are given as --name=value"
            )


def _merge_sources(
    spec: CommandSpec, parsed: ParsedArgs, notes: list[str]
) -> tuple[dict[FieldKey, ResolvedValue], set[FieldKey]]:
    """All values, later sources over earlier ones, and the keys of those that are still the command's
    defaults.
    """
    names = spec.names()
    unread = (name for name in section_types() if name not in spec.sections)
    all_names = SettingNames((*spec.sections, *unread), spec.options)
    source = f"default of {spec.name}"
    layers: list[list[RawValue]] = [[RawValue(name, value, source) for name, value in spec.defaults.items()]]
    if parsed.preset is not None:
        if "model" not in spec.sections:
            raise UsageError(f"unknown flag --preset: {spec.name} reads no model settings")
        preset = get_preset(parsed.preset)
        layers.append(
            [
                RawValue(f"model.{name}", value, f"preset {parsed.preset}")
                for name, value in preset.settings.items()
            ]
        )
    files = [_with_wandb(read_settings(Path(name))) for name in parsed.files]
    if "model" in spec.sections and parsed.preset is None:
        layers += _model_file([Path(name) for name in parsed.files], files, all_names, notes)
    layers += files
    flags = parsed.values
    disabled = _disabled_sections([*layers, flags], all_names)
    values: dict[FieldKey, ResolvedValue] = {}
    defaults = set(normalize(layers[0], all_names))
    for number, layer in enumerate(layers):
        kept = [item for item in layer if _gate(item) not in disabled]
        gates = sorted({gate for item in layer if (gate := _gate(item)) is not None and gate in disabled})
        notes += [
            f"{layer[0].source}: the section {gate} is not applied, since {SWITCHES[gate]} is off"
            for gate in gates
        ]
        normalized = normalize(kept, all_names)
        defaults -= set(normalized) if number else set()
        values |= normalized
    normalized_flags = normalize(flags, names)
    _check_flags_apply(flags, normalized_flags, disabled)
    return values | normalized_flags, defaults - set(normalized_flags)


def _gate(item: RawValue) -> str | None:
    """The section that enables a setting which is given in that section but belongs to another one, else
    None.
    """
    dotted = f"{item.section}.{item.name}" if item.section else item.name
    section = dotted.partition(".")[0]
    home = dotted_aliases().get(dotted)
    return section if home is not None and section in SWITCHES and home[1] != SWITCHES[section] else None


def _disabled_sections(layers: Sequence[list[RawValue]], names: SettingNames) -> set[str]:
    """The feature sections whose switch is off after merging all sources."""
    final: dict[FieldKey, ResolvedValue] = {}
    for layer in layers:
        final |= normalize([item for item in layer if _gate(item) is None], names)
    switches = {section: final.get(("training", switch)) for section, switch in SWITCHES.items()}
    return {
        section
        for section, value in switches.items()
        if value is None or str(value.value).lower() in ("false", "0", "no", "off")
    }


def _check_flags_apply(
    flags: Sequence[RawValue], normalized: Mapping[FieldKey, ResolvedValue], disabled: set[str]
) -> None:
    """Raises UsageError for a flag of a disabled feature, which would otherwise be accepted and ignored."""
    gates = {
        value.origin: "knowledge_distillation" if key == ("training", "teacher_model_path") else key[0]
        for key, value in normalized.items()
    }
    for flag, gate in [*gates.items(), *((item.source, _gate(item) or "") for item in flags)]:
        if gate in disabled:
            raise UsageError(f"{flag} has no effect, since {SWITCHES[gate]} is off; add --{SWITCHES[gate]}")


def _with_wandb(values: list[RawValue]) -> list[RawValue]:
    """In JSON and YAML, `wandb_project` enables Weights & Biases unless the file sets where metrics are
    logged. nanoGPT's Python files have `wandb_log` for that.
    """
    names = {item.name for item in values}
    project = next((item for item in values if item.name == "wandb_project" and item.value), None)
    if project is None or names & {"wandb_log", "report_to"} or project.source.endswith(".py"):
        return values
    return [
        *values,
        RawValue("report_to", ["tensorboard", "wandb"], f"{project.source} (wandb_project)", "training"),
    ]


def _model_file(
    paths: Sequence[Path], files: Sequence[list[RawValue]], names: SettingNames, notes: list[str]
) -> list[list[RawValue]]:
    """The `model_config.json` in the folder of a training file, where no file has model settings."""
    homes = [{names.find(item)[0] for item in values} for values in files]
    if not any("training" in home for home in homes) or any("model" in home for home in homes):
        return []
    for path, home in zip(paths, homes, strict=True):
        model_file = path.parent / MODEL_FILE
        if "training" in home and path.suffix != ".py" and model_file.is_file() and model_file not in paths:
            notes.append(f"{path} has no model section: the model settings are those of {model_file}")
            return [[item for item in read_settings(model_file) if names.find(item)[0] == "model"]]
    return []


def _resumes(values: Mapping[FieldKey, ResolvedValue]) -> bool:
    resumed, start = values.get(("training", "resume_from")), values.get(("training", "init_from"))
    return (resumed is not None and resumed.value is not None) or (
        start is not None and start.value == "resume"
    )


def _build(
    spec: CommandSpec,
    values: Mapping[FieldKey, ResolvedValue],
    defaults: set[FieldKey],
    is_resuming: bool,
) -> tuple[dict[str, Section], Section | None]:
    """Validated sections. An error about a value names the flag or the file that it came from."""
    own = {COMMAND_OPTIONS: spec.options} if spec.options else {}
    built: dict[str, Section] = {}
    for section, kind in {**section_types(), **own}.items():
        given = {name: value for (home, name), value in values.items() if home == section}
        checked = {
            name: check_value(kind, name, value.value, _label(section, name, value.origin))
            for name, value in given.items()
        }
        try:
            # A shape may fit only together with the settings of the resumed run.
            is_partial = is_resuming and section == "model"
            built[section] = kind.model_construct(None, **checked) if is_partial else kind(**checked)
        except UsageError as error:
            origins = ", ".join(
                dict.fromkeys(value.origin for name, value in given.items() if name in str(error))
            )
            raise UsageError(f"{origins}: {error}" if origins else str(error)) from None
        built[section].__pydantic_fields_set__.difference_update(
            name for home, name in defaults if home == section
        )
    return {name: section for name, section in built.items() if name != COMMAND_OPTIONS}, built.get(
        COMMAND_OPTIONS
    )


def _label(section: str, name: str, origin: str) -> str:
    """What a message calls a value: the flag, or the setting and where it came from."""
    dotted = f"{section}.{name}" if section else name
    return origin if origin.startswith("--") else f"{dotted} ({origin})"
