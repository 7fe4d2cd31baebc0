"""What packing fills and costs: rows of 1,024 tokens from documents whose lengths are log-normal (median 245,
mean 449 tokens).

Filled is the share of the places that a label stands in. Rows a second are read in batches of 8 in the order of training. Laying out is
the table of rows, made once a corpus; its memory is the process's peak above what it held before, measured in a process of its own.
`first_fit, 16` and `first_fit, 4096` are first_fit with other numbers of open rows than the 256 that it has.

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
from common import Figure, alternate, finish, run_command, say_load

from llm_trainer.data.sampling import packing as packing_module
from llm_trainer.data.sampling.packing import Packing
from llm_trainer.data.sampling.samplers import open_sampler
from llm_trainer.data.token_shards import TokenDataset

CONTEXT, BATCH = 1024, 8
CONTESTANTS = ("greedy", "first_fit", "first_fit, 16", "first_fit, 4096", "none")


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=3_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="100,000 documents, one round")
    parser.add_argument(
        "--measure", metavar="CONTESTANT", help="(for the processes that this one starts) one measurement"
    )
    options = parser.parse_args()
    if options.quick:
        options.documents, options.rounds = 100_000, 1
    if options.measure:
        print(json.dumps(measure(options.measure, options.documents)))
        return 0
    notes = [say_load()]
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
    """One strategy over documents that are lengths alone: all ids are one number that is stored once."""
    strategy, _, rows = contestant.partition(", ")
    if rows:
        packing_module.OPEN_ROWS = int(rows)
    packing = Packing(strategy)  # type: ignore[arg-type]
    lengths = np.minimum(np.random.default_rng(0).lognormal(5.5, 1.1, documents), 20_000).astype(np.int64) + 2
    starts = np.cumsum(lengths) - lengths
    with tempfile.TemporaryDirectory() as folder:
        ids = [np.broadcast_to(np.uint16(5), (int(lengths.sum()),))]
        facts = {
            "vocab_size": 10,
            "tokenizer_hash": "0" * 64,
            "fingerprint": "lengths",
            "end_id": 0,
            "largest_id": 5,
        }
        tokens = TokenDataset(ids, [starts], source=str(Path(folder)), **facts)  # type: ignore[arg-type]
        del lengths
        before, began = _peak_megabytes(), time.perf_counter()
        sampler = open_sampler(tokens, CONTEXT, 0, packing)
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
