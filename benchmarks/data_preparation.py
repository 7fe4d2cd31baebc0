"""From text to token shards: megabytes of text per second of `prepare` with two workers, compared with
`datasets.map` and nanoGPT's method.

The text consists of the standard library, the language reference and Shakespeare (11 MB), its documents
shuffled and repeated up to `--megabytes`, as JSON lines. The tokenizer is a byte-level BPE with 32,000 ids
trained on it, the same for all. Each contestant is a fresh process with two workers:

* `llm-trainer`: `llm_trainer.data.pipeline.pipeline.prepare`, from the JSON lines to shards, metadata and
  summary, everything included.
* `datasets.map`: batched, two processes, `tokenizers`' `encode_batch_fast`, then the ids into one memory
  map.
* `nanoGPT's way`: `datasets.map` document by document, two processes, tiktoken with the same vocabulary,
  then the same memory map.

The time of the two peers starts when `datasets` has read the JSON lines, which favors them; with reading
included they are listed as "with reading". Repeated text favors encoders that cache words; with
`--distinct` every tenth word is a new one.

`--memory` measures our peak memory instead (processes and children, proportional set size, sampled) at 0.1,
1 and 10 GB; the 10 GB are the files of the gigabyte, ten times, as hard links.

    python benchmarks/data_preparation.py [--megabytes 1000] [--rounds 1] [--distinct] [--memory]
        [--folder DIR] [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from common import Figure, Target, alternate, finish, report_load, run_command

OURS, MAP, NANOGPT = "llm-trainer", "datasets.map", "nanoGPT's way"
WORKERS = 2
VOCABULARY = 32_000
MAP_BATCHES = 1024  # nanoGPT writes its memory map in this many parts


def main() -> int:
    """Measure, print and write the results; return 1 if a target is missed."""
    from workers import corpus

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, default=1000.0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--distinct", action="store_true", help="make words different")
    parser.add_argument(
        "--memory",
        action="store_true",
        help="Measure our peak memory at a tenth, once and ten times the text.",
    )
    parser.add_argument("--quick", action="store_true", help="10 MB, one round")
    parser.add_argument(
        "--folder", type=Path, help="Folder for texts and results (default: a temporary folder)."
    )
    parser.add_argument("--shakespeare", type=Path, default=corpus.SHAKESPEARE)
    parser.add_argument(
        "--measure",
        nargs=3,
        metavar=("CONTESTANT", "TEXTS", "PLACE"),
        help="(internal) Used by the processes that this program starts.",
    )
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure[0], Path(options.measure[1]), Path(options.measure[2]))))
        return 0
    load = report_load()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        return _Run(options, Path(folder), load).measure()


class _Run:
    """Texts and a tokenizer in a folder, and the measurements with them."""

    def __init__(self, options: argparse.Namespace, folder: Path, load: str) -> None:
        self._options, self._folder, self._load = options, folder, load
        self._megabytes = 10.0 if options.quick else options.megabytes

    def measure(self) -> int:
        """Run the comparison of rates or of memory."""
        from workers import corpus

        self._texts(self._megabytes)
        self._learn(corpus.shuffled(self._options.shakespeare, 10.0))
        return self._memory() if self._options.memory else self._rate()

    def _rate(self) -> int:
        texts = self._texts(self._megabytes)
        size = int((texts / "size").read_text(encoding="utf-8"))
        kept: dict[str, list[dict[str, float]]] = {OURS: [], MAP: [], NANOGPT: []}

        def one(name: str) -> float:
            kept[name].append(self._process(name, texts))
            return size / 1e6 / kept[name][-1]["seconds"]

        rounds = 1 if self._options.quick else self._options.rounds
        measured = alternate({name: (lambda name=name: one(name)) for name in kept}, rounds)
        work = f"text to shards, {self._megabytes:g} MB{', distinct' if self._options.distinct else ''}"
        figures = [
            Figure(work, name, "MB/s", [round(rate, 2) for rate in rates]) for name, rates in measured.items()
        ]
        for name in (MAP, NANOGPT):
            with_reading = [
                round(size / 1e6 / (result["seconds"] + result["reading"]), 2) for result in kept[name]
            ]
            figures.append(Figure(work, f"{name}, with reading", "MB/s", with_reading))
        ours = figures[0].median
        targets = [
            Target("MB/s, llm-trainer ÷ datasets.map", ours / figures[1].median, 3.0),
            Target("MB/s, llm-trainer ÷ nanoGPT's way", ours / figures[2].median, 3.0),
        ]
        tokens = {name: int(results[-1]["tokens"]) for name, results in kept.items()}
        notes = [
            self._load,
            f"{size / 1e6:.1f} MB of text; tokens: "
            + ", ".join(f"{name} {count:,}" for name, count in tokens.items()),
        ]
        assert tokens[OURS] == tokens[MAP], "The same tokenizer gave different ids."
        return finish(
            "data_preparation", figures, {work: MAP}, " ".join(["python", *sys.argv]), targets, notes
        )

    def _memory(self) -> int:
        work = "peak memory of all processes, llm-trainer"
        sizes = (self._megabytes / 10, self._megabytes, self._megabytes * 10)
        peaks = [self._process(OURS, self._texts(megabytes))["peak"] for megabytes in sizes]
        figures = [
            Figure(work, f"{megabytes:g} MB of text", "MB", [round(peak)])
            for megabytes, peak in zip(sizes, peaks, strict=True)
        ]
        spread = max(peaks) / min(peaks)
        targets = [Target("largest ÷ smallest peak", spread, 1.1, is_ceiling=True)]
        base = {work: figures[0].contestant}
        return finish(
            "data_preparation_memory", figures, base, " ".join(["python", *sys.argv]), targets, [self._load]
        )

    def _process(self, name: str, texts: Path) -> dict[str, float]:
        with tempfile.TemporaryDirectory(dir=self._folder) as place:
            done = run_command([sys.executable, __file__, "--measure", name, texts, place])
        return json.loads(done.output.splitlines()[-1])

    def _texts(self, megabytes: float) -> Path:
        """Return a folder with this much text; above `--megabytes` through hard links."""
        from workers import corpus

        folder = self._folder / f"texts-{megabytes:g}"
        if folder.is_dir():
            return folder
        folder.mkdir()
        if megabytes <= self._megabytes:
            texts = corpus.shuffled(self._options.shakespeare, megabytes)
            size = corpus.write_jsonl(
                folder, corpus.made_distinct(texts) if self._options.distinct else texts
            )
        else:
            source, times = self._texts(self._megabytes), round(megabytes / self._megabytes)
            for number in range(times):
                for file in source.glob("*.jsonl"):
                    os.link(file, folder / f"{number:02d}-{file.name}")
            size = times * int((source / "size").read_text(encoding="utf-8"))
        (folder / "size").write_text(str(size), encoding="utf-8")
        return folder

    def _learn(self, texts: object) -> None:
        from llm_trainer.data.tokenization.tokenizer import Tokenizer

        Tokenizer.train("bpe", texts, VOCABULARY).save(self._folder / "tokenizer")


def measure(contestant: str, texts: Path, place: Path) -> dict[str, float]:
    """Run one contestant; return seconds, seconds of reading before, tokens and peak megabytes."""
    ways: dict[str, Callable[[Path, Path, Path], dict[str, float]]] = {
        OURS: _ours,
        MAP: _map,
        NANOGPT: _nanogpt,
    }
    peak = PeakMemory()
    with peak:
        result = ways[contestant](texts, texts.parent / "tokenizer", place)
    return {"reading": 0.0, **result, "peak": peak.megabytes}


def _ours(texts: Path, tokenizer: Path, place: Path) -> dict[str, float]:
    from llm_trainer.config.schema.data import DataConfig
    from llm_trainer.data.pipeline.pipeline import prepare_dataset

    config = DataConfig(input=str(texts), tokenizer_path=str(tokenizer), val_ratio=0.0, num_workers=WORKERS)
    begun = time.perf_counter()
    summary = prepare_dataset(config, place / "prepared")
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, "tokens": sum(split.tokens for split in summary.metadata.splits.values())}


def _map(texts: Path, tokenizer: Path, place: Path) -> dict[str, float]:
    import tokenizers

    os.environ["TOKENIZERS_PARALLELISM"] = (
        "false"  # two processes share two cores: threads within them cost a tenth
    )
    backend = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    backend.encode_special_tokens = True
    end = backend.token_to_id("<|endoftext|>")

    def encode(batch: dict[str, list[str]]) -> dict[str, list[object]]:
        ids = [
            [*encoding.ids, end]
            for encoding in backend.encode_batch_fast(batch["text"], add_special_tokens=False)
        ]
        return {"ids": ids, "len": [len(one) for one in ids]}

    return _mapped(texts, place, encode, is_batched=True)


def _nanogpt(texts: Path, tokenizer: Path, place: Path) -> dict[str, float]:
    import tiktoken

    from llm_trainer.data.tokenization.fast.pretokenizer import DEFAULT_PATTERN
    from llm_trainer.data.tokenization.tokenizer import Tokenizer

    ours = Tokenizer.load(tokenizer)
    ranks = {ours.token_bytes(i): i for i in range(ours.vocab_size) if i != ours.eos_id}
    encoding = tiktoken.Encoding(
        "benchmark",
        pat_str=DEFAULT_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": ours.eos_id},
    )

    def encode(example: dict[str, str]) -> dict[str, object]:
        ids = encoding.encode_ordinary(example["text"])
        ids.append(encoding.eot_token)
        return {"ids": ids, "len": len(ids)}

    return _mapped(texts, place, encode, is_batched=False)


def _mapped(
    texts: Path, place: Path, encode: Callable[[dict], dict], *, is_batched: bool
) -> dict[str, float]:
    """Run `datasets.map`, then write everything to one memory map, as nanoGPT's prepare.py does."""
    import datasets
    import numpy as np

    datasets.disable_progress_bars()
    files = sorted(str(file) for file in texts.glob("*.jsonl"))
    begun = time.perf_counter()
    loaded = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(place / "cache"))
    reading = time.perf_counter() - begun
    begun = time.perf_counter()
    tokenized = loaded.map(encode, batched=is_batched, remove_columns=["text"], num_proc=WORKERS)
    total = int(np.sum(tokenized["len"], dtype=np.uint64))
    mapped = np.memmap(place / "train.bin", dtype=np.uint16, mode="w+", shape=(total,))
    parts, written = min(MAP_BATCHES, len(tokenized)), 0
    for index in range(parts):
        batch = tokenized.shard(num_shards=parts, index=index, contiguous=True).with_format("numpy")
        ids = np.concatenate(list(batch["ids"]))
        mapped[written : written + len(ids)] = ids
        written += len(ids)
    mapped.flush()
    return {"seconds": time.perf_counter() - begun, "reading": reading, "tokens": total}


class PeakMemory:
    """The largest sum of proportional set sizes of this process and its children, sampled ten times a second.
    Linux only.
    """

    def __init__(self) -> None:
        self.megabytes = 0.0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        own = psutil.Process()
        while not self._is_over.wait(0.1):
            total = 0.0
            for process in (own, *own.children(recursive=True)):
                try:
                    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
                    total += next(float(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
                except (OSError, StopIteration):
                    continue  # it has ended in the meantime
            self.megabytes = max(self.megabytes, total)


if __name__ == "__main__":
    sys.exit(main())
