"""Summarizes a preparation: lines for the console, `summary.json` for programs, a histogram of lengths."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydantic import JsonValue

from llm_trainer.data.metadata import Metadata

SUMMARY_FILE, HISTOGRAM_FILE = "summary.json", "document_lengths.svg"
STAGES = ("read", "deduplicate", "split", "sample", "tokenizer", "encode", "texts", "assemble")


@dataclass(frozen=True)
class PreparationSummary:
    """What `prepare_dataset` made or found.

    Attributes:
        folder: The prepared folder.
        metadata: The contents of its metadata.json.
        from_cache: The folder was up to date, so nothing was done.
        num_computed: Stage → number of results that this run computed.
        num_cached: Stage → number of results of earlier runs that it used.
        seconds: Stage → time that it took.
        packing: Lines that compare the packing strategies.
    """

    folder: Path
    metadata: Metadata
    from_cache: bool
    num_computed: Mapping[str, int] = field(default_factory=dict)
    num_cached: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    packing: Sequence[str] = ()

    def lines(self) -> list[str]:
        """Lines for the console: documents, tokenizer, splits, packing, stages."""
        metadata = self.metadata
        number_rejected = metadata.documents_in - metadata.documents_kept
        lines = [
            f"{self.folder} is up to date (same input, same options)"
            if self.from_cache
            else f"prepared {self.folder}",
            f"documents: {metadata.documents_in} in = {metadata.documents_kept} kept"
            f" + {number_rejected} rejected",
            *_columns([(f"{count:,}", reason) for reason, count in metadata.documents_rejected.items()]),
            *(f"  rejected: {example}" for example in metadata.rejected_examples),
            f"tokenizer: {metadata.tokenizer.kind}, {metadata.tokenizer.vocab_size} ids",
            f"split: {metadata.split_method}",
        ]
        if metadata.leaks is not None:
            found = "have a near-duplicate" if metadata.leak_check == "near" else "also occur"
            lines.append(f"leakage check: {metadata.leaks:,} held-out documents {found} in another split")
        rows = [("split", "documents", "tokens", "MB", "bytes per token")]
        for name, split in metadata.splits.items():
            sizes = (
                ("", "")
                if split.bytes is None
                else (f"{split.bytes / 1e6:.2f}", f"{split.bytes / max(1, split.tokens):.2f}")
            )
            rows.append((name, f"{split.documents:,}", f"{split.tokens:,}", *sizes))
        lines += _columns(rows)
        if metadata.tokenizer.eos_id is not None:
            lines.append(f"documents that keep their end-of-text token: {metadata.supervised_end_share:.0%}")
        return [*lines, *self.packing, *metadata.notes, *self._stage_lines()]

    def to_json(self) -> dict[str, JsonValue]:
        """The same for programs; the times are all that differs between two equal preparations."""
        metadata: dict[str, JsonValue] = self.metadata.model_dump(mode="json")
        wanted = (
            "key",
            "documents_in",
            "documents_kept",
            "documents_rejected",
            "split_method",
            "leaks",
            "supervised_end_share",
            "notes",
        )
        splits: dict[str, JsonValue] = {
            name: split.model_dump(mode="json", include={"documents", "tokens", "bytes"})
            for name, split in self.metadata.splits.items()
        }
        stages: dict[str, JsonValue] = {
            stage: {
                "made": self.num_computed.get(stage, 0),
                "found": self.num_cached.get(stage, 0),
                "seconds": round(self.seconds[stage], 3),
            }
            for stage in STAGES
            if stage in self.seconds
        }
        return {
            **{name: metadata[name] for name in wanted},
            "splits": splits,
            "packing": list(self.packing),
            "stages": stages,
        }

    def write(self, folder: Path) -> None:
        """Write `summary.json`."""
        (folder / SUMMARY_FILE).write_text(
            json.dumps(self.to_json(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
        )

    def _stage_lines(self) -> list[str]:
        rows = [("stage", "computed", "cached", "seconds")]
        for stage in STAGES:
            if stage in self.seconds:
                rows.append(
                    (
                        stage,
                        str(self.num_computed.get(stage, 0)),
                        str(self.num_cached.get(stage, 0)),
                        f"{self.seconds[stage]:.1f}",
                    )
                )
        return _columns(rows) if len(rows) > 1 else []


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of a table as aligned lines: text to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if cell[:1].isdigit() else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def document_length_histogram(lengths: Mapping[str, np.ndarray]) -> str:
    """Draw the lengths of documents, with logarithmic bins and one bar per split.

    Args:
        lengths: Split → tokens of each document, int64 `(documents,)`.

    Returns:
        An SVG image; the height of a bar is the fraction of the split's documents.
    """
    longest = max((int(values.max()) for values in lengths.values() if len(values)), default=1)
    bins = max(1, longest.bit_length())
    bar, gap, height, left, top = 14, 10, 160, 44, 46
    group = bar * max(1, len(lengths)) + gap
    width = left + bins * group + 10
    colours = dict(zip(("train", "validation", "test"), ("#4269d0", "#efb118", "#ff725c"), strict=True))
    fractions = {
        split: np.bincount(np.log2(np.maximum(values, 1)).astype(int), minlength=bins) / max(1, len(values))
        for split, values in lengths.items()
    }
    highest = max((float(values.max()) for values in fractions.values()), default=1.0) or 1.0
    drawn = [f'<text x="{left}" y="16" font-size="13">tokens per document</text>']
    for row, (split, values) in enumerate(fractions.items()):
        drawn.append(f'<rect x="{left + 90 * row}" y="24" width="10" height="10" fill="{colours[split]}"/>')
        drawn.append(f'<text x="{left + 14 + 90 * row}" y="33">{split}</text>')
        for index, value in enumerate(values.tolist()):
            bar_height = height * value / highest
            x, y = left + index * group + bar * row, top + height - bar_height
            drawn.append(
                f'<rect x="{x}" y="{y:.1f}" width="{bar - 2}" height="{bar_height:.1f}"'
                f' fill="{colours[split]}"><title>{value:.1%}</title></rect>'
            )
    for index in range(bins):
        label = _abbreviated(2**index)
        drawn.append(f'<text x="{left + index * group}" y="{top + height + 14}">{label}</text>')
    for level in (0.0, 0.5, 1.0):
        drawn.append(f'<text x="4" y="{top + height - level * height + 4:.0f}">{level * highest:.0%}</text>')
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top + height + 24}"'
        ' font-family="sans-serif" font-size="11">'
    )
    return "\n".join([opening, '<rect width="100%" height="100%" fill="white"/>', *drawn, "</svg>"]) + "\n"


def _abbreviated(number: int) -> str:
    for size, letter in ((2**30, "G"), (2**20, "M"), (2**10, "k")):
        if number >= size:
            return f"{number // size}{letter}"
    return str(number)
