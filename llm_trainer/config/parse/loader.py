"""From a command line to a `RunConfig`: one way for every command and every manual's script.

What is said later wins: the class's default, the door's default, a preset, files in their order, flags.
`LoadedRun.origins` keeps where each value came from, for `--explain` and for messages.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llm_trainer.config.environment import launch_environment
from llm_trainer.config.parse.cli_args import CommandLine, read_flags
from llm_trainer.config.parse.config_files import read_settings
from llm_trainer.config.parse.implied_defaults import derive
from llm_trainer.config.parse.merge import OWN, Field, Names, Said, Value, settle
from llm_trainer.config.parse.validation import check_start, check_whole
from llm_trainer.config.presets import preset
from llm_trainer.config.resolve.deepspeed import with_deepspeed_file
from llm_trainer.config.resolve.parallelism import planned_ranks
from llm_trainer.config.schema.base import Section, check_value
from llm_trainer.config.schema.features import SWITCHES
from llm_trainer.config.schema.run_config import RunConfig, path_aliases, section_types
from llm_trainer.errors import UsageError

MODEL_FILE = "model_config.json"


@dataclass(frozen=True)
class Door:
    """A command as its settings see it.

    name: how it is called (`train.py`); sections: what it reads, a section (`training`) or a single setting
    (`data.data_dir`), in the order in which flat flags look for their home; own: its own flags, which come
    first; defaults: dotted canonical name → value, above the classes' defaults; positional_config: arguments
    without a flag are settings files; positional: names of settings that arguments without a flag fill in
    order (`("run",)` for `llm-trainer report RUN`); is_a_plan: the settings are judged for as many ranks as
    they speak of, not for the processes that run; may_resume: it goes on with a run, whose own settings lie
    under what is said.
    """

    name: str
    summary: str
    sections: tuple[str, ...]
    own: type[Section] | None = None
    defaults: Mapping[str, object] = field(default_factory=dict)
    positional_config: bool = False
    positional: tuple[str, ...] = ()
    is_a_plan: bool = False
    may_resume: bool = False

    def read_sections(self) -> set[str]:
        """The sections of which this command reads something."""
        return {entry.partition(".")[0] for entry in self.sections}

    def names(self) -> Names:
        """What this command's flags mean."""
        return Names(self.sections, self.own)


@dataclass
class LoadedRun:
    """Settings, the command's own flags, where each value came from, and what the user should be told about
    that.
    """

    config: RunConfig
    own: Section | None
    origins: dict[str, str]
    explain: bool
    door: Door
    notes: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    ranks: int = 1
    is_resuming: bool = False

    def check(self, base: RunConfig | None = None) -> None:
        """Raises UsageError for settings that contradict each other.

        `base`: the settings of a run that goes on, with what was said here over them.
        """
        config = self.config if base is None else base
        said = self.said()
        origins = (
            self.origins
            if base is None
            else {name: origin for name, origin in self.origins.items() if name in said}
        )
        config.model.check_shape()
        check_whole(
            config,
            origins,
            self.door.read_sections(),
            self.ranks,
            "default" if base is None else "of the run",
        )

    def said(self) -> dict[str, object]:
        """Dotted name → value of everything that files, a preset or flags said, defaults aside."""
        sections = {name: getattr(self.config, name) for name in section_types()}
        return {
            f"{section}.{name}": getattr(values, name)
            for section, values in sections.items()
            for name in sorted(values.model_fields_set)
        }

    def over(self, base: RunConfig) -> RunConfig:
        """The settings of `base` (a run that is resumed) with everything that was said here laid over them."""
        sections = {name: dict(getattr(base, name)) for name in section_types()}
        for dotted, value in self.said().items():
            section, _, name = dotted.partition(".")
            sections[section][name] = value
        return RunConfig.model_validate(sections)


def load_run(door: Door, argv: Sequence[str]) -> LoadedRun:
    """Settings of one command from its arguments.

    Raises UsageError for anything unknown, contradictory, out of bounds or not read by this command. What was
    said to a run that goes on is judged by `LoadedRun.check` once the run's own settings lie under it.
    `--help` prints and leaves with 0. Notes are printed to stderr, on the first rank only.
    """
    names = door.names()
    line = read_flags(argv, names)
    if line.help:
        from llm_trainer.config.help import help_text

        print(help_text(door))
        raise SystemExit(0)
    _take_positional(door, line)
    notes: list[str] = []
    values, defaults = _gather(door, line, notes)
    notes += derive(values, defaults)
    is_resuming = door.may_resume and _goes_on(values)
    sections, own = _build(door, values, defaults, is_resuming)
    whole = RunConfig.model_construct(None, **sections) if is_resuming else RunConfig.model_validate(sections)
    config = with_deepspeed_file(whole)
    launch = launch_environment()
    ranks = planned_ranks(config.training) if door.is_a_plan else launch.world_size
    files = [Path(name) for name in line.files]
    loaded = LoadedRun(config, own, _origins(values), line.explain, door, notes, files, ranks, is_resuming)
    check_start(config, loaded.origins, door.read_sections(), ranks)
    if not is_resuming:
        loaded.check()
    if launch.rank == 0:
        for note in notes:
            print(note, file=sys.stderr)
    return loaded


def _take_positional(door: Door, line: CommandLine) -> None:
    """Give arguments without a flag their meaning: a settings file, or the next of the door's positional
    names.
    """
    waiting = list(door.positional)
    for argument in line.positional:
        if door.positional_config and Path(argument).suffix in (".py", ".json", ".yaml", ".yml"):
            line.files.append(argument)
        elif waiting:
            line.said.append(Said(waiting.pop(0), argument, f"the argument {argument!r}"))
        else:
            hint = (
                f"; a settings file is given as --config={argument}"
                if Path(argument).suffix in (".py", ".json", ".yaml", ".yml")
                else ""
            )
            raise UsageError(
                f"{door.name} does not know what to do with {argument!r}{hint}; settings are given as --name=value"
            )


def _gather(door: Door, line: CommandLine, notes: list[str]) -> tuple[dict[Field, Value], set[Field]]:
    """All values said, later sources over earlier ones, and which of them are still the door's defaults."""
    names = door.names()
    all_names = Names(
        (*door.sections, *(name for name in section_types() if name not in door.sections)), door.own
    )
    place = f"default of {door.name}"
    layers: list[list[Said]] = [[Said(name, value, place) for name, value in door.defaults.items()]]
    if line.preset is not None:
        if "model" not in door.sections:
            raise UsageError(f"--preset: {door.name} reads no model settings")
        layers.append(
            [
                Said(f"model.{name}", value, f"preset {line.preset}")
                for name, value in preset(line.preset).settings.items()
            ]
        )
    files = [_with_wandb(read_settings(Path(name))) for name in line.files]
    if "model" in door.sections and line.preset is None:
        layers += _model_file([Path(name) for name in line.files], files, all_names, notes)
    layers += files
    flags = line.said
    switched_off = _switched_off([*layers, flags], all_names)
    values: dict[Field, Value] = {}
    defaults = set(settle(layers[0], all_names))
    for number, layer in enumerate(layers):
        kept = [item for item in layer if _gate(item) not in switched_off]
        if len(kept) < len(layer):
            gates = sorted(
                {gate for item in layer if (gate := _gate(item)) in switched_off and gate is not None}
            )
            notes += [
                f"{layer[0].place}: the section {gate} is not applied, since {SWITCHES[gate]} is off"
                for gate in gates
            ]
        settled = settle(kept, all_names)
        defaults -= set(settled) if number else set()
        values |= settled
    settled_flags = settle(flags, names)
    _refuse_idle_flags(flags, settled_flags, switched_off)
    return values | settled_flags, defaults - set(settled_flags)


def _gate(item: Said) -> str | None:
    """The section whose switch decides about a setting that stands in that section but lives elsewhere, else
    None.
    """
    dotted = f"{item.section}.{item.name}" if item.section else item.name
    section = dotted.partition(".")[0]
    home = path_aliases().get(dotted)
    return section if home is not None and section in SWITCHES and home[1] != SWITCHES[section] else None


def _switched_off(layers: Sequence[list[Said]], names: Names) -> set[str]:
    """The feature sections whose switch is off once everything is said."""
    final: dict[Field, Value] = {}
    for layer in layers:
        final |= settle([item for item in layer if _gate(item) is None], names)
    truth = {section: final.get(("training", switch)) for section, switch in SWITCHES.items()}
    return {
        section
        for section, value in truth.items()
        if value is None or str(value.value).lower() in ("false", "0", "no", "off")
    }


def _refuse_idle_flags(flags: Sequence[Said], settled: Mapping[Field, Value], switched_off: set[str]) -> None:
    """A flag for a feature that is off would be accepted and ignored: an error."""
    for (section, name), value in settled.items():
        gate = "knowledge_distillation" if (section, name) == ("training", "teacher_model_path") else section
        if gate in switched_off:
            raise UsageError(
                f"{value.origin} has no effect, since {SWITCHES[gate]} is off; add --{SWITCHES[gate]}"
            )
    for item in flags:
        gate = _gate(item) or ""
        if gate in switched_off:
            raise UsageError(
                f"{item.place} has no effect, since {SWITCHES[gate]} is off; add --{SWITCHES[gate]}"
            )


def _with_wandb(said: list[Said]) -> list[Said]:
    """In JSON and YAML a `wandb_project` switches Weights & Biases on, unless the file says where metrics go;
    nanoGPT has `wandb_log`.
    """
    names = {item.name for item in said}
    project = next((item for item in said if item.name == "wandb_project" and item.value), None)
    if project is None or names & {"wandb_log", "report_to"} or project.place.endswith(".py"):
        return said
    return [
        *said,
        Said("report_to", ["tensorboard", "wandb"], f"{project.place} (wandb_project)", "training"),
    ]


def _model_file(
    paths: Sequence[Path], files: Sequence[list[Said]], names: Names, notes: list[str]
) -> list[list[Said]]:
    """The `model_config.json` beside a training file, where no file says anything about the model."""
    homes = [{names.find(item)[0] for item in said} for said in files]
    if not any("training" in home for home in homes) or any("model" in home for home in homes):
        return []
    for path, home in zip(paths, homes, strict=True):
        beside = path.parent / MODEL_FILE
        if "training" in home and path.suffix != ".py" and beside.is_file() and beside not in paths:
            notes.append(f"{path} has no model section: the model is that of {beside}")
            return [[item for item in read_settings(beside) if names.find(item)[0] == "model"]]
    return []


def _goes_on(values: Mapping[Field, Value]) -> bool:
    resumed, start = values.get(("training", "resume_from")), values.get(("training", "init_from"))
    return (resumed is not None and resumed.value is not None) or (
        start is not None and start.value == "resume"
    )


def _build(
    door: Door, values: Mapping[Field, Value], defaults: set[Field], is_resuming: bool
) -> tuple[dict[str, Section], Section | None]:
    """Validated sections; a value that does not fit its field is reported with the place it came from."""
    kinds: dict[str, type[Section]] = {**section_types(), **({OWN: door.own} if door.own else {})}
    built: dict[str, Section] = {}
    for section, kind in kinds.items():
        checked = {}
        for (home, name), value in values.items():
            if home == section:
                label = f"{section}.{name}" if section else name
                checked[name] = check_value(kind, name, value.value, f"{value.origin}: {label}")
        try:
            in_part = is_resuming and section == "model"  # a shape that fits only with the rest of the run's
            built[section] = kind.model_construct(None, **checked) if in_part else kind(**checked)
        except UsageError as error:
            origins = ", ".join(
                dict.fromkeys(
                    value.origin
                    for (home, name), value in values.items()
                    if home == section and name in str(error)
                )
            )
            raise UsageError(f"{origins}: {error}" if origins else str(error)) from None
        built[section].__pydantic_fields_set__.difference_update(
            name for home, name in defaults if home == section
        )
    return {name: section for name, section in built.items() if name != OWN}, built.get(OWN)


def _origins(values: Mapping[Field, Value]) -> dict[str, str]:
    return {
        (f"{section}.{name}" if section else name): value.origin for (section, name), value in values.items()
    }
