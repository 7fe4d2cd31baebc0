"""A fast path for byte-level BPE and WordPiece: bulk encoding, and the training of vocabularies.

**What.** Five modules replace the slow parts of the `tokenizers` library for the pre-tokenizers that are
known here (GPT-2's, GPT-4's, Llama 3's, Qwen 2's, o200k's and BERT's). Any other tokenizer is left to the
library.

    pretokenizer        splits any text into words with Python's `re`
    ascii_pretokenizer  splits ASCII text into words with numpy, many texts at once
    word_cache          looks up the ids of words that have been encoded before, with numpy
    bulk_encoder        combines these to encode many texts
    bpe_trainer         learns merges from counted words, with numpy

**Why.** A corpus repeats its words (Zipf 1935), and the library merges the bytes of every word again.
Preparing 1 GB of text with two workers runs at 56 MB/s, against 6 MB/s for `datasets.map` with the library's
`encode_batch_fast` and 18 MB/s for tiktoken (`benchmarks/data_preparation.py`). Training a BPE vocabulary of
32,000 ids on 100 MB takes 0.79 of the library's time and 0.70 of its memory (`benchmarks/bpe_training.py`).

**What it must equal.** Encoding gives exactly the ids of the library, and training exactly its vocabulary and
merges. Tests compare both: `tests/data/tokenization/test_fast_tokenizer_switch.py` the two complete paths,
and `test_pretokenizer.py`, `test_ascii_pretokenizer.py`, `test_bulk_encoder.py` and `test_vocab_training.py`
each part, on random text. At run time the first 262,144 characters of each process are encoded by the library
as well; if one id differs, the library encodes everything.

**How to switch it off.** Set the environment variable LLM_TRAINER_FAST_TOKENIZER=0. The `tokenizers` library
then encodes all text and trains all vocabularies. The ids are the same, so prepared data and checkpoints
remain valid.
"""
