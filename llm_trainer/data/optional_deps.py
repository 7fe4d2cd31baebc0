"""Libraries that only one feature needs: looked for before work begins, so that a missing one is said at once
and by name.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util

from llm_trainer.errors import UsageError


def require_extra(module: str, extra: str, what: str) -> str:
    """The version of the distribution that has this module; raises UsageError, naming the extra, where it is
    not installed.
    """
    if importlib.util.find_spec(module) is None:
        raise UsageError(f"{what} needs the extra {extra!r}: pip install 'llm-trainer[{extra}]'")
    distributions = importlib.metadata.packages_distributions().get(module, [module])
    return importlib.metadata.version(distributions[0])
