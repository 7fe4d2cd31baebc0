"""Checks for packages that only one feature needs.

They are looked for before work begins, so that a missing package is reported at once, with the command that
installs it. The message is the same wherever it is raised.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Mapping

from llm_trainer.errors import UsageError


def missing_extra(feature: str, extra: str) -> str:
    """Return the message for a feature whose optional packages are not installed.

    Args:
        feature: What needs the extra; the message begins with it, for instance "reading a.parquet".
        extra: The extra of this package that brings what is missing.
    """
    return f"{feature} needs the extra {extra!r}; install it with: pip install 'llm-trainer[{extra}]'"


def require_extra(module: str, extra: str, feature: str) -> str:
    """Check that an optional module is installed, without importing it.

    Args:
        module: The top-level module to look for.
        extra: The extra of this package that brings it.
        feature: What needs the module, for the message.

    Returns:
        The version of the distribution that provides the module.

    Raises:
        UsageError: The module is not installed; the message names the extra.
    """
    if importlib.util.find_spec(module) is None:
        raise UsageError(missing_extra(feature, extra))
    distributions = _distributions().get(module, [module])
    return importlib.metadata.version(distributions[0])


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    """Return the distributions that provide each top-level module; reading them takes 0.25 s."""
    return importlib.metadata.packages_distributions()
