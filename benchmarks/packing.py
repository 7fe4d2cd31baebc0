"""Packing: filled positions and cost, for rows of 1,024 tokens from documents with log-normal lengths
(median 245, mean 449 tokens).

"Filled" is the fraction of positions that have a label. Rows per second are read in batches of 8 in
training order. "Laying out" is building the table of rows, once per corpus; its memory is the peak of a
fresh process above what it held before. `first_fit, 16` and `first_fit, 4096` are first_fit with other
numbers of open rows than its 256.

    python benchmarks/packing.py [--documents 3000000] [--rounds 3] [--quick]
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import Figure, alternate, finish, report_load, run_command

from llm_trainer.data.sampling import packing as packing_module
from llm_trainer.data.sampling.packing import Packing
from llm_trainer.data.sampling.samplers import build_sampler
from llm_trainer.data.token_shards import TokenDataset

CONTEXT, BATCH = 1024, 8
CONTESTANTS = ("greedy", "first_fit", "first_fit, 16", "first_fit, 4096", "none")


def main() -> int:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=3_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="Run one round with 100,000 documents.")
    parser.add_argument("--measure", metavar="CONTESTANT", help="(internal) Run one measurement.")
    options = parser.parse_args()
    if options.quick:
        options.documents, options.rounds = 100_000, 1
    if options.measure:
        print(json.dumps(measure(options.measure, options.documents)))
        return 0
    notes = [report_load()]
    kept: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}

    def one(name: str) -> float:
        command = [sys.executable, __file__, "--measure", name, "--documents", str(options.documents)]
        kept[name].append(json.loads(run_command(command).output.splitlines()[-1]))
        return kept[name][-1]["seconds"]

    alternate({name: (lambda name=name: one(name)) for name in CONTESTANTS}, options.rounds)
    units = {"filled": "%", "seconds": "s", "memory": "MB", "rows": "rows/s"}
    works = {"filled": "filled", "seconds": "laying out", "memory": "memory of laying out", "rows": "reading"}
    figures = [
        Figure(
            f"{works[what]}, {options.documents:,} documents",
            name,
            unit,
            [found[what] for found in kept[name]],
        )
        for what, unit in units.items()
        for name in CONTESTANTS
        if all(found[what] for found in kept[name])
    ]
    baselines = {figure.work: "greedy" for figure in figures if figure.unit in ("%", "rows/s")}
    return finish("packing", figures, baselines, " ".join(["python", *sys.argv]), notes=notes)


def measure(contestant: str, documents: int) -> dict[str, float]:
    """Measure one strategy over documents with lengths only: all ids are one number, stored once."""
    strategy, _, rows = contestant.partition(", ")
    if rows:
        packing_module.MAX_OPEN_ROWS = int(rows)
    packing = Packing(strategy)  # type: ignore[arg-type]
    lengths = np.minimum(np.random.default_rng(0).lognormal(5.5, 1.1, documents), 20_000).astype(np.int64) + 2
    starts = np.cumsum(lengths) - lengths
    with tempfile.TemporaryDirectory() as folder:
        ids = [np.broadcast_to(np.uint16(5), (int(lengths.sum()),))]
        facts = {
            "vocab_size": 10,
            "tokenizer_hash": "0" * 64,
            "fingerprint": "lengths",
            "eos_id": 0,
            "largest_id": 5,
        }
        tokens = TokenDataset(ids, [starts], source=str(Path(folder)), **facts)  # type: ignore[arg-type]
        del lengths
        before, began = _peak_megabytes(), time.perf_counter()
        sampler = build_sampler(tokens, CONTEXT, 0, packing)
        seconds, memory = time.perf_counter() - began, _peak_megabytes() - before
        began = time.perf_counter()
        for number in range(500):
            sampler.batch(number * BATCH, BATCH)
        rate = 500 * BATCH / (time.perf_counter() - began)
    laid = strategy != "greedy"
    return {
        "filled": 100 * sampler.tokens_per_sample / CONTEXT,
        "seconds": seconds if laid else 0.0,
        "memory": memory if laid else 0.0,
        "rows": rate,
    }


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(main())
