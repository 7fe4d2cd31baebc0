"""Where text comes from and how it becomes token shards."""

from __future__ import annotations

from typing import Literal, TypeAlias

from llm_trainer.config.schema.base import LARGEST_SEED, Section, setting
from llm_trainer.config.schema.mixture import MixtureStage

Filter: TypeAlias = Literal[
    "length", "symbols", "repetition", "gopher_repetition", "gopher_quality", "c4", "fineweb"
]


class DataConfig(Section):
    """Text in, shards out."""

    data_dir: str | None = setting(
        None, "prepared data (shards, or a nanoGPT folder); relative to the current folder"
    )
    dataset: str | None = setting(None, "nanoGPT's word: the folder data/<dataset>")
    input: str | None = setting(
        None, "text to prepare: a file or a folder", aliases=("input_dir", "text", "data_root", "raw_dir")
    )
    output_dir: str | None = setting(None, "where the prepared data goes", aliases=("output", "output_root"))
    dataset_name: str | None = setting(None, "a Hugging Face dataset", aliases=("hub_dataset",))
    dataset_config: str | None = setting(None, "its configuration", aliases=("dataset_config_name",))
    dataset_split: str = setting("train", "its training split")
    validation_split: str | None = setting(
        None, "its validation split; none: cut from the training split by document hash"
    )
    dataset_streaming: bool = setting(
        False, "read it over the network each time instead of downloading it", aliases=("streaming",)
    )
    text_column: str = setting("text", "the column that holds the text", aliases=("text_field",))
    clean: bool = setting(
        False, "normalise Unicode, line ends and blanks, drop control characters and boilerplate lines"
    )
    unicode_form: Literal["nfc", "nfkc", "none"] = setting(
        "nfc", "of cleaned text; nfkc also turns ligatures and superscripts into letters"
    )
    drop_boilerplate: bool = setting(True, "cleaning drops lines like cookie notices, menus and page numbers")
    filters: list[Filter] = setting(
        list,
        "a document that one of these refuses is rejected; the last four are datatrove's (extra 'quality')",
        aliases=("quality_filters",),
    )
    min_characters: int = setting(
        50, "shortest document that the filter 'length' keeps", unit="characters", ge=0
    )
    max_characters: int = setting(
        2**31, "longest document that the filter 'length' keeps", unit="characters", gt=0
    )
    max_symbol_fraction: float = setting(
        0.4, "signs among all characters but blanks, at most, for the filter 'symbols'", gt=0, le=1
    )
    max_repeated_fraction: float = setting(
        0.5, "repeated lines or runs of words, at most, for the filter 'repetition'", gt=0, le=1
    )
    languages: list[str] = setting(
        list,
        "ISO 639-1 codes; documents in other languages are rejected (extra 'language')",
        aliases=("language",),
    )
    min_language_confidence: float = setting(
        0.65, "probability of a language, at least, for a document to be in it", ge=0, le=1
    )
    keep_rejected: bool = setting(False, "write rejected documents and their reasons beside the result")
    deduplicate: Literal["none", "exact", "near"] = setting(
        "none", "drop all but one of equal, or also of nearly equal, documents"
    )
    near_duplicate_bands: int = setting(
        14, "bands of the MinHash signature; threshold (1/bands)^(1/rows)", ge=1, le=64
    )
    near_duplicate_rows: int = setting(8, "hash functions a band", ge=1, le=64)
    near_duplicate_ngram: int = setting(
        5, "documents are compared by runs of so many words", unit="words", ge=1, le=32
    )
    tokenizer_type: Literal["auto", "bpe", "char", "wordpiece", "tiktoken"] = setting(
        "auto",
        "kind to train; auto: bpe, or tokenizer_path's; tiktoken: not trained, the encoding that tokenizer_path names, else gpt2",
    )
    tokenizer_path: str | None = setting(
        None,
        "an existing one: a tokenizer.json, a folder, a file of tiktoken ranks or a hub name",
        aliases=("tokenizer", "tokenizer_name"),
    )
    vocab_size: int = setting(32000, "ids of a tokenizer to be trained, at most", unit="tokens", gt=0)
    tokenizer_sample_megabytes: float = setting(
        64.0, "a tokenizer is trained on at most so much of the training text", unit="MB", gt=0
    )
    special_tokens: list[str] = setting(
        list, "names that get an id of their own, beside the end of text; in a text they are text"
    )
    max_length: int | None = setting(
        None, "length of a chunk; becomes the model's context", unit="tokens", gt=0
    )
    min_length: int = setting(0, "shorter documents are dropped and counted", unit="tokens", ge=0)
    stride: int = setting(
        0,
        "overlap between neighbouring chunks; the repeated tokens are seen again, but learned once",
        unit="tokens",
        ge=0,
    )
    pack_sequences: bool = setting(True, "documents share rows; false: each has rows of its own, padded")
    packing_strategy: Literal["greedy", "first_fit"] = setting(
        "greedy",
        "how documents share rows; greedy: end to end, cut where a row is full; first_fit: whole into the first row with room",
    )
    mask_documents: bool = setting(True, "tokens see only their own document")
    mixture_weights: dict[str, float] | None = setting(
        None,
        "of a mixture: corpus → its share of the tokens, relative to the others; none: as its mixture.json says",
    )
    mixture_stages: list[MixtureStage] | None = setting(
        None,
        'of a mixture: weights that change, as [{"until": "1000 steps", "weights": {...}}, {"weights": {...}}]',
    )
    augment_span_drop: float = setting(
        0.0, "share of the training tokens that are left out in short spans, drawn anew each time", ge=0, lt=1
    )
    augment_span_length: int = setting(4, "length of such a span, on average", unit="tokens", ge=1)
    augment_case: float = setting(0.0, "share of the training words whose case is changed", ge=0, le=1)
    augment_whitespace: float = setting(
        0.0, "share of the training words whose space before them is changed", ge=0, le=1
    )
    one_document_per_line: bool = setting(
        False, "in .txt files each line is a document", aliases=("line_documents",)
    )
    train_ratio: float | None = setting(
        None, "share of documents for training; none: what the other two leave", ge=0, le=1
    )
    val_ratio: float = setting(0.05, "share for validation", aliases=("validation_ratio",), ge=0, le=1)
    test_ratio: float = setting(0.0, "share for testing", ge=0, le=1)
    seed: int = setting(42, "of the split", ge=0, le=LARGEST_SEED)
    num_workers: int = setting(
        1,
        "processes that read, clean and tokenise at once",
        unit="workers",
        aliases=("preprocessing_num_workers", "num_proc"),
        ge=1,
    )
    executor: Literal["local", "ray"] = setting(
        "local", "who does the work: processes of this machine, or a Ray cluster (extra 'ray')"
    )
    ray_address: str | None = setting(
        None, "of a running Ray cluster, or auto; none: Ray is started on this machine"
    )
    cache_stages: bool = setting(
        True,
        "keep what the stages made (.stages): a later run redoes only what a change touches, at about twice the disk space",
    )
