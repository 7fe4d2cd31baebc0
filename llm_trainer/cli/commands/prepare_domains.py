"""`llm-trainer prepare-domains` and `scripts/prepare_domain_datasets.py`: prepare datasets by domain."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llm_trainer.cli.setup.build_dataset import DOMAINS_DIR
from llm_trainer.config.environment import apply_dotenv
from llm_trainer.config.parse.cli_args import ParsedArgs, parse_args
from llm_trainer.config.parse.command import CommandSpec
from llm_trainer.config.parse.merge import normalize
from llm_trainer.config.schema.base import setting
from llm_trainer.config.schema.domain_loaders import DomainLoader
from llm_trainer.config.schema.domains import DomainBridge, parse_domain_bridge, read_bridge_file
from llm_trainer.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from llm_trainer.config import DataConfig

BRIDGE_FILE = "configs/domain_bridge_config.json"
BUILTIN = Path("data/domain_builtin")


class DomainOptions(DomainBridge):
    """The settings of a domain bridge file, and two options that need no file."""

    list_loaders: bool = setting(False, "Print the available loaders and exit.")
    builtin: bool = setting(
        False, "Use the built-in domains instead of datasets; they need no network.", aliases=("built_in",)
    )


DOMAINS = CommandSpec(
    "llm-trainer prepare-domains",
    f"Turn datasets by domain into splits, vocabulary lists, one tokenizer and a mixture to train on. "
    f"{BRIDGE_FILE} is an example.",
    (),
    options=DomainOptions,
)


DOMAINS_SCRIPT = replace(DOMAINS, name="scripts/prepare_domain_datasets.py")


def run(argv: list[str]) -> int:
    """`llm-trainer prepare-domains`."""
    return prepare_from_bridge(DOMAINS, argv)


def script(argv: list[str]) -> int:
    """`scripts/prepare_domain_datasets.py`."""
    return prepare_from_bridge(DOMAINS_SCRIPT, argv)


def prepare_from_bridge(spec: CommandSpec, argv: Sequence[str]) -> int:
    """Prepare the domains of a bridge file and the flags, or list the loaders.

    Args:
        spec: The command or script.
        argv: Its arguments.

    Returns:
        The exit code.
    """
    line = parse_args(argv, spec.names())
    if line.help or line.help_all:
        from llm_trainer.config.describe import help_text

        print(help_text(spec, show_all=line.help_all))
        return 0
    flags = {name: value.value for (_, name), value in normalize(line.values, spec.names()).items()}
    own = {name: bool(flags.pop(name, False)) for name in ("list_loaders", "builtin")}
    bridge = _bridge(spec, line, flags)
    if own["list_loaders"]:
        print("\n\n".join(format_loader(name, row) for name, row in bridge.all_loaders().items()))
        return 0
    if line.explain:
        print("\n".join(f"{name} = {getattr(bridge, name)!r}" for name in DomainBridge.model_fields))
        return 0
    return _prepare(bridge, own["builtin"])


def _bridge(spec: CommandSpec, line: ParsedArgs, flags: dict[str, object]) -> DomainBridge:
    if line.positional:
        raise UsageError(
            f"unexpected argument {line.positional[0]!r} of {spec.name}; a bridge file is given as "
            "--config FILE"
        )
    values: dict[str, object] = {}
    for name in line.files:
        values |= read_bridge_file(Path(name))
    place = ", ".join([*line.files, *(["the command line"] if flags else [])]) or "the command line"
    return parse_domain_bridge(
        {**values, **{DomainBridge.names()[name]: value for name, value in flags.items()}}, place
    )


def _prepare(bridge: DomainBridge, builtin: bool) -> int:
    if not bridge.loaders and not builtin:
        raise UsageError(
            f"no loaders are named; give --config FILE ({BRIDGE_FILE} is an example), or --builtin for "
            "domains that "
            "need no network"
        )
    from llm_trainer.cli.setup.parse_command import new_console
    from llm_trainer.data.domains.pipeline import prepare_builtin_domains, prepare_domains

    apply_dotenv()
    console = new_console()
    summary = prepare_builtin_domains(bridge, console) if builtin else prepare_domains(bridge, console)
    for text in summary.lines():
        console.print(text, markup=False)
    console.print(
        f"next: python train_aio.py --use_domain_specific_data --domain_data_dir {bridge.output_dir}",
        markup=False,
    )
    return 0


def format_loader(name: str, row: DomainLoader) -> str:
    """A loader as `--list_loaders` prints it."""
    where = [
        f"{part.name}{f' ({len(part.configurations)} configurations)' if part.configurations else ''}"
        for part in row.hub
    ]
    hub = where[0] + (f" and {len(where) - 1} more" if len(where) > 1 else "") if where else str(row.path)
    facts = {
        "domains": ", ".join(row.domains()),
        "fields": ", ".join(row.fields()),
        "options": ", ".join(row.options()),
        "licence": row.licence,
        "note": row.note,
        "verified": "; ".join(row.verified),
    }
    lines = [f"{name}  {hub}", *textwrap.wrap(row.about, 110, initial_indent="  ", subsequent_indent="  ")]
    for label, value in facts.items():
        if value:
            lines += textwrap.wrap(value, 110, initial_indent=f"  {label:<9} ", subsequent_indent=" " * 12)
    return "\n".join(lines)


def domains_to_train_on(requested: str | None, data: DataConfig, console: Console) -> Path:
    """The prepared domains, or else the built-in ones, which are prepared if need be.

    Args:
        requested: The folder that the settings name.
        data: How to prepare the built-in domains.
        console: Where to print.

    Returns:
        The folder of the mixture.
    """
    from llm_trainer.data.domains.pipeline import prepare_builtin_domains
    from llm_trainer.data.mixture_dataset import MIXTURE_FILE

    wanted = Path(requested or DOMAINS_DIR)
    if (wanted / MIXTURE_FILE).is_file():
        return wanted
    console.print(
        f"no domains are prepared in {wanted}; using the built-in ones in {BUILTIN} (see "
        "docs/domain_data_bridge.md)"
    )
    console.print(
        f"to prepare datasets: python scripts/prepare_domain_datasets.py --config {BRIDGE_FILE} --output_dir "
        f"{wanted}",
        markup=False,
    )
    if not (BUILTIN / MIXTURE_FILE).is_file():
        bridge = DomainBridge(
            output_dir=str(BUILTIN),
            tokenizer_path=data.tokenizer_path,
            tokenizer_vocab_size=data.vocab_size,
            num_workers=data.num_workers,
        )
        for text in prepare_builtin_domains(bridge, console).lines():
            console.print(text, markup=False)
    return BUILTIN
