"""`llm-trainer presets`: the named shapes, their parameter counts and the manuals' sizes."""

from __future__ import annotations

import sys

from llm_trainer.config.presets import PRESETS
from llm_trainer.errors import UsageError


def run(argv: list[str]) -> int:
    """Print the table; returns the exit code. The command takes no settings."""
    if argv and argv[0] not in ("-h", "--help"):
        raise UsageError(
            f"llm-trainer presets takes no settings, not {argv[0]!r}; use one with --preset NAME"
        )
    if argv:
        print("usage: llm-trainer presets\n\nList the named model shapes, which --preset NAME sets.\n")
    header = (
        "preset",
        "family",
        "width",
        "layers",
        "heads",
        "kv",
        "inner",
        "vocabulary",
        "context",
        "parameters",
        "nominal",
    )
    rows: list[tuple[str, ...]] = [header]
    for preset in PRESETS.values():
        model = preset.model()
        shape = (
            model.hidden_size,
            model.num_hidden_layers,
            model.num_attention_heads,
            model.kv_heads,
            model.mlp_width,
        )
        sizes = (model.vocab_size, model.max_position_embeddings)
        rows.append(
            (
                preset.name,
                model.model_type,
                *map(str, (*shape, *sizes)),
                f"{preset.parameters() / 1e6:,.1f} M",
                preset.nominal_size or "–",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    for row in rows:
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        sys.stdout.write("  ".join(cells).rstrip() + "\n")
    sys.stdout.write(
        "\nUse one with --preset NAME; any setting overrides it: --preset framework-tiny --num_layers 4\n"
    )
    return 0
