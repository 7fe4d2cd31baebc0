"""What preparation came to: lines for a person, `summary.json` for programs, a picture of how long the
documents are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydantic import JsonValue

from llm_trainer.data.metadata import Metadata

SUMMARY_FILE, PICTURE_FILE = "summary.json", "document_lengths.svg"
STAGES = ("read", "deduplicate", "split", "sample", "tokenizer", "encode", "texts", "assemble")


@dataclass(frozen=True)
class PreparedSummary:
    """What `prepare` made, or found.

    `made` and `found` count the results of each stage that this run made, and those of earlier runs that it could use; `seconds` is
    the time that each stage took. `packing` says in words what each way of packing would waste.
    """

    folder: Path
    metadata: Metadata
    from_cache: bool
    made: Mapping[str, int] = field(default_factory=dict)
    found: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    packing: Sequence[str] = ()

    def lines(self) -> list[str]:
        """For the console: documents by verdict, tokenizer, splits, packing, stages."""
        facts = self.metadata
        number_rejected = facts.documents_in - facts.documents_kept
        lines = [
            f"{self.folder} is up to date (same input, same options)"
            if self.from_cache
            else f"prepared {self.folder}",
            f"documents: {facts.documents_in} in = {facts.documents_kept} kept + {number_rejected} rejected",
            *_columns([(f"{count:,}", reason) for reason, count in facts.documents_rejected.items()]),
            *(f"  rejected: {example}" for example in facts.rejected_examples),
            f"tokenizer: {facts.tokenizer.kind}, {facts.tokenizer.vocab_size} ids",
            f"split: {facts.split_method}",
        ]
        if facts.leaks is not None:
            lines.append(
                f"leak check: {facts.leaks:,} held-out documents {_LEAK_WORDS[facts.leak_check]} in another split"
            )
        rows = [("split", "documents", "tokens", "MB", "bytes a token")]
        for name, split in facts.splits.items():
            sizes = (
                ("", "")
                if split.bytes is None
                else (f"{split.bytes / 1e6:.2f}", f"{split.bytes / max(1, split.tokens):.2f}")
            )
            rows.append((name, f"{split.documents:,}", f"{split.tokens:,}", *sizes))
        lines += _columns(rows)
        if facts.tokenizer.eos_id is not None:
            lines.append(f"documents with a supervised end: {facts.supervised_end_share:.0%}")
        return [*lines, *self.packing, *facts.notes, *self._stage_lines()]

    def to_json(self) -> dict[str, JsonValue]:
        """The same for programs. The times are the only thing in a prepared folder that differs between two
        runs.
        """
        facts: dict[str, JsonValue] = self.metadata.model_dump(mode="json")
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
                "made": self.made.get(stage, 0),
                "found": self.found.get(stage, 0),
                "seconds": round(self.seconds[stage], 3),
            }
            for stage in STAGES
            if stage in self.seconds
        }
        return {
            **{name: facts[name] for name in wanted},
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
        rows = [("stage", "made", "found", "seconds")]
        for stage in STAGES:
            if stage in self.seconds:
                rows.append(
                    (
                        stage,
                        str(self.made.get(stage, 0)),
                        str(self.found.get(stage, 0)),
                        f"{self.seconds[stage]:.1f}",
                    )
                )
        return _columns(rows) if len(rows) > 1 else []


_LEAK_WORDS = {"exact": "are equal to one", "near": "are nearly equal to one"}


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines, the cells of a column one below the other: words to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if cell[:1].isdigit() else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def lengths_picture(lengths: Mapping[str, np.ndarray]) -> str:
    """A histogram (SVG) of document lengths in tokens for each split, over doublings: bars are shares of the
    split's documents.
    """
    most = max((int(values.max()) for values in lengths.values() if len(values)), default=1)
    bins = max(1, most.bit_length())
    bar, gap, height, left, top = 14, 10, 160, 44, 46
    group = bar * max(1, len(lengths)) + gap
    width = left + bins * group + 10
    colours = dict(zip(("train", "validation", "test"), ("#4269d0", "#efb118", "#ff725c"), strict=True))
    shares = {
        split: np.bincount(np.log2(np.maximum(values, 1)).astype(int), minlength=bins) / max(1, len(values))
        for split, values in lengths.items()
    }
    highest = max((float(share.max()) for share in shares.values()), default=1.0) or 1.0
    drawn = [f'<text x="{left}" y="16" font-size="13">tokens a document</text>']
    for row, (split, share) in enumerate(shares.items()):
        drawn.append(f'<rect x="{left + 90 * row}" y="24" width="10" height="10" fill="{colours[split]}"/>')
        drawn.append(f'<text x="{left + 14 + 90 * row}" y="33">{split}</text>')
        for place, value in enumerate(share.tolist()):
            tall = height * value / highest
            x, y = left + place * group + bar * row, top + height - tall
            drawn.append(
                f'<rect x="{x}" y="{y:.1f}" width="{bar - 2}" height="{tall:.1f}" fill="{colours[split]}"><title>{value:.1%}</title></rect>'
            )
    for place in range(bins):
        drawn.append(f'<text x="{left + place * group}" y="{top + height + 14}">{_short(2**place)}</text>')
    for part in (0.0, 0.5, 1.0):
        drawn.append(f'<text x="4" y="{top + height - part * height + 4:.0f}">{part * highest:.0%}</text>')
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top + height + 24}" font-family="sans-serif" font-size="11">'
    return "\n".join([opening, '<rect width="100%" height="100%" fill="white"/>', *drawn, "</svg>"]) + "\n"


def _short(number: int) -> str:
    for size, letter in ((2**30, "G"), (2**20, "M"), (2**10, "k")):
        if number >= size:
            return f"{number // size}{letter}"
    return str(number)
