"""What a command reads, and what it gets: `CommandSpec` declares a command, `LoadedRun` is its parsed command
line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llm_trainer.config.parse.merge import SettingNames
from llm_trainer.config.parse.validation import check_complete
from llm_trainer.config.presets import is_suggested
from llm_trainer.config.resolve.parallelism import resolve_plan
from llm_trainer.config.resolve.settings import ResolvedSettings, resolve_settings
from llm_trainer.config.schema.base import Section
from llm_trainer.config.schema.run_config import RunConfig, section_types


@dataclass(frozen=True)
class CommandSpec:
    """A command, or a script of the manuals, and the settings that it reads.

    Attributes:
        name: How the command is called (`llm-trainer train`, `train.py`).
        summary: What it does, in a sentence.
        sections: What it reads: sections (`training`) or single settings (`data.data_dir`), in the order in
            which a flat flag is looked up.
        options: The command's own options, which are looked up first.
        defaults: Dotted canonical name → default of this command, which overrides the schema's.
        positional_config: Whether positional arguments may be settings files.
        positional: Names of the settings that positional arguments fill, in order (`("run",)` for
            `llm-trainer report RUN`).
        uses_planned_ranks: Settings are checked for the number of ranks that they ask for, not for the number
            of processes that run.
        may_resume: The command may resume a run, whose saved settings are merged with the given ones.
    """

    name: str
    summary: str
    sections: tuple[str, ...]
    options: type[Section] | None = None
    defaults: Mapping[str, object] = field(default_factory=dict)
    positional_config: bool = False
    positional: tuple[str, ...] = ()
    uses_planned_ranks: bool = False
    may_resume: bool = False

    @property
    def invocation(self) -> str:
        """The command as it is typed in a shell."""
        return f"python {self.name}" if self.name.endswith(".py") else self.name

    def read_sections(self) -> set[str]:
        """The sections of which this command reads at least one setting."""
        return {entry.partition(".")[0] for entry in self.sections}

    def names(self) -> SettingNames:
        """What the names on this command's command line mean."""
        return SettingNames(self.sections, self.options)


@dataclass
class LoadedRun:
    """The settings of one call of a command.

    Attributes:
        config: All settings.
        options: The command's own options.
        origins: Dotted name → where the value came from, for values that are not defaults of the schema.
        explain: Whether `--explain` was given.
        spec: The command.
        notes: Lines that were printed about the settings.
        files: The settings files, in order.
        ranks: Number of ranks that the settings were checked for.
        is_resuming: Whether a run is resumed; its saved settings are not in `config` yet.
        settings: The complete settings; None until `resolve` is called.
    """

    config: RunConfig
    options: Section | None
    origins: dict[str, str]
    explain: bool
    spec: CommandSpec
    notes: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    ranks: int = 1
    is_resuming: bool = False
    settings: ResolvedSettings | None = None

    def resolve(self, resumed: RunConfig | None = None) -> ResolvedSettings:
        """Complete the settings and check that they do not contradict each other; once per start.

        When resuming, call this after merging with the saved configuration.

        Args:
            resumed: The merged configuration (`merged_over`); None where no run is resumed.

        Returns:
            The complete settings, which are also kept as `settings`.

        Raises:
            UsageError: Two settings contradict each other.
        """
        config, origins = self.config, self.origins
        if resumed is not None:
            given = self._values_for_resume()
            config = resumed
            origins = {name: origin for name, origin in self.origins.items() if name in given}
        config.model.check_shape()
        default_origin = "default" if resumed is None else "of the resumed run"
        self.settings = resolve_settings(config, resolve_plan(config.training, self.ranks))
        check_complete(self.settings, origins, self.spec.read_sections(), default_origin)
        self.config = self.settings.config
        return self.settings

    def set_values(self) -> dict[str, object]:
        """Dotted name → value of every setting that files, a preset or flags set."""
        sections = {name: getattr(self.config, name) for name in section_types()}
        return {
            f"{section}.{name}": getattr(values, name)
            for section, values in sections.items()
            for name in sorted(values.model_fields_set)
        }

    def merged_over(self, saved: RunConfig) -> RunConfig:
        """The saved configuration of a run that is resumed, with the settings that were given here."""
        sections = {name: dict(getattr(saved, name)) for name in section_types()}
        for dotted, value in self._values_for_resume().items():
            section, _, name = dotted.partition(".")
            sections[section][name] = value
        return RunConfig.model_validate(sections)

    def _values_for_resume(self) -> dict[str, object]:
        """What was set, without a preset's suggestions, which the resumed run has settled."""
        return {
            name: value for name, value in self.set_values().items() if not is_suggested(name, self.origins)
        }
