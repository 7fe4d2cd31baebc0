"""Train a byte-level BPE with 32,000 ids on 100 MB of text: seconds and peak memory, compared with the
tokenizers library.

The text consists of the standard library, the language reference and Shakespeare, with shuffled documents.
Each contestant is a fresh process that reads the text from a file, document by document, and trains.
"tokenizers, plainly" is the method of its documentation (`train_from_iterator` over the documents, with the
same words, alphabet and special token); "tokenizers, files" lets it read the file itself. Seconds are those
of the training alone. Memory is the process's high-water mark, next to its value before training. All
contestants must learn the same vocabulary, otherwise the benchmark fails ("files" sees lines instead of
documents and may differ).

This text repeats itself. With `--distinct` every tenth word gets a random ending, so that there are about
as many different words as in as much text that does not repeat itself.

    python benchmarks/bpe_training.py [--megabytes 100] [--rounds 3] [--distinct] [--quick]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from common import Figure, Target, alternate, finish, report_load, run_command

OURS, PLAINLY, FILES = "llm-trainer", "tokenizers, plainly", "tokenizers, files"
VOCABULARY = 32_000
KILOBYTE, MEGABYTE = 1024, 2**20
END = "\0\n"  # between documents, which contain no NUL


def main() -> int:
    """Measure, print and write the results; return 1 if a target is missed."""
    from workers import corpus

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, default=100.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--distinct", action="store_true", help="make words different")
    parser.add_argument("--quick", action="store_true", help="5 MB, one round")
    parser.add_argument("--shakespeare", type=Path, default=corpus.SHAKESPEARE)
    parser.add_argument(
        "--measure",
        nargs=2,
        metavar=("CONTESTANT", "FILE"),
        help="(internal) Used by the processes that this program starts.",
    )
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure[0], Path(options.measure[1]))))
        return 0
    load = report_load()
    megabytes, rounds = (5.0, 1) if options.quick else (options.megabytes, options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text"
        texts = corpus.shuffled(options.shakespeare, megabytes)
        size = _write(file, corpus.made_distinct(texts) if options.distinct else texts)
        return _compare(
            file, size, rounds, load, f"{megabytes:g} MB{', distinct' if options.distinct else ''}"
        )


def _compare(file: Path, size: int, rounds: int, load: str, work: str) -> int:
    kept: dict[str, list[dict[str, float | str]]] = {OURS: [], PLAINLY: [], FILES: []}

    def one(contestant: str) -> float:
        done = run_command([sys.executable, __file__, "--measure", contestant, str(file)])
        kept[contestant].append(json.loads(done.output.splitlines()[-1]))
        return float(kept[contestant][-1]["seconds"])

    alternate({name: (lambda name=name: one(name)) for name in kept}, rounds)
    learned = {str(result["vocabulary"]) for name in (OURS, PLAINLY) for result in kept[name]}
    assert len(learned) == 1, "the vocabularies differ"
    seconds = [
        Figure(f"seconds, {work}", name, "s", [round(float(one["seconds"]), 2) for one in kept[name]])
        for name in kept
    ]
    memory = [
        Figure(f"peak memory, {work}", name, "MB", [round(float(one["peak"])) for one in kept[name]])
        for name in kept
    ]
    for figure in memory:
        figure.note = f"{float(kept[figure.contestant][-1]['before']):.0f} MB before the training"
    targets = [
        Target(
            "rate of training, llm-trainer ÷ tokenizers, plainly", seconds[1].median / seconds[0].median, 1.0
        ),
        Target(
            "peak memory, llm-trainer ÷ tokenizers, plainly",
            memory[0].median / memory[1].median,
            1.0,
            is_ceiling=True,
        ),
    ]
    words = int(kept[OURS][-1]["words"])
    notes = [
        load,
        f"{size / 1e6:.1f} MB of text with {words:,} distinct words; the first two vocabularies are equal",
    ]
    baselines = {figure.work: PLAINLY for figure in (*seconds, *memory)}
    return finish(
        "bpe_training", [*seconds, *memory], baselines, " ".join(["python", *sys.argv]), targets, notes
    )


def measure(contestant: str, file: Path) -> dict[str, float | str]:
    """Train once; return seconds, megabytes before and at peak, and a hash of the vocabulary."""
    words = 0
    if contestant == OURS:
        from llm_trainer.data.tokenization import vocab_training as vocabulary_training
        from llm_trainer.data.tokenization.tokenizer import Tokenizer

        counts = vocabulary_training.count_words
        vocabulary_training.count_words = lambda *given: _remembered(counts(*given))
        before, begun = _peak(), time.perf_counter()
        vocabulary = Tokenizer.train("bpe", _read(file), VOCABULARY)._backend.get_vocab()
        words = _seen[0]
    else:
        from tokenizers import AddedToken, models, pre_tokenizers, trainers
        from tokenizers import Tokenizer as Backend

        from llm_trainer.data.tokenization.fast.pretokenizer import DEFAULT_PATTERN
        from llm_trainer.data.tokenization.tokenizer_json import END_OF_TEXT, byte_level_pre_tokenizer

        before, begun = _peak(), time.perf_counter()
        backend = Backend(models.BPE())
        backend.pre_tokenizer = byte_level_pre_tokenizer(DEFAULT_PATTERN)
        special = [AddedToken(END_OF_TEXT, special=True, normalized=False)]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        if contestant == FILES:
            backend.train([str(file)], trainer)
        else:
            backend.train_from_iterator(_read(file), trainer)
        vocabulary = backend.get_vocab()
    seconds = time.perf_counter() - begun
    learned = hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()
    return {"seconds": seconds, "before": before, "peak": _peak(), "vocabulary": learned, "words": words}


_seen = [0]


def _remembered(counts: dict[str, int]) -> dict[str, int]:
    _seen[0] = len(counts)
    return counts


def _peak() -> float:
    """Return the peak memory of this process, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KILOBYTE / MEGABYTE


def _write(file: Path, texts: Iterable[str]) -> int:
    with file.open("w", encoding="utf-8", newline="") as opened:
        return sum(opened.write(text + END) for text in texts)


def _read(file: Path) -> Iterator[str]:
    """Yield the documents one at a time."""
    held: list[str] = []
    with file.open(encoding="utf-8", newline="\n") as opened:
        for line in opened:
            if line.endswith(END):
                yield "".join([*held, line[: -len(END)]])
                held = []
            else:
                held.append(line)


if __name__ == "__main__":
    sys.exit(main())
