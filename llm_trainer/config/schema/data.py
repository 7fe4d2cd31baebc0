"""Where text comes from and how it becomes token shards."""

from __future__ import annotations

from typing import ClassVar, Literal, TypeAlias

from llm_trainer.config.schema.base import MAX_SEED, Section, setting
from llm_trainer.config.schema.mixture import MixtureStage

Filter: TypeAlias = Literal[
    "length", "symbols", "repetition", "gopher_repetition", "gopher_quality", "c4", "fineweb"
]


class DataConfig(Section):
    """Training data: where it comes from, how it is prepared and how it is sampled."""

    help_heading: ClassVar[str] = "Data"

    data_dir: str | None = setting(
        None,
        "Folder of the prepared dataset (token shards, or a nanoGPT folder), relative to the current folder.",
        common=True,
    )
    dataset: str | None = setting(None, "Name of a dataset in nanoGPT's sense: the folder data/<dataset>.")
    input: str | None = setting(
        None,
        "Text to prepare: a file or a folder.",
        aliases=("input_dir", "text", "data_root", "raw_dir"),
        common=True,
    )
    output_dir: str | None = setting(
        None,
        "Folder that the prepared dataset is written to.",
        aliases=("output", "output_root"),
        common="preparation",
    )
    dataset_name: str | None = setting(
        None, "Name of a dataset on the Hugging Face hub.", aliases=("hub_dataset",), common="preparation"
    )
    dataset_config: str | None = setting(
        None, "Configuration of the hub dataset.", aliases=("dataset_config_name",)
    )
    dataset_split: str = setting("train", "Training split of the hub dataset.")
    validation_split: str | None = setting(
        None,
        "Validation split of the hub dataset. Unset: documents of the training split, chosen by their hash.",
    )
    dataset_streaming: bool = setting(
        False,
        "Read the hub dataset over the network each time instead of downloading it.",
        aliases=("streaming",),
    )
    text_column: str = setting("text", "Name of the column that holds the text.", aliases=("text_field",))
    one_document_per_line: bool = setting(
        False, "Treat each line of a .txt file as a document.", aliases=("line_documents",)
    )

    clean: bool = setting(
        False,
        "Normalize Unicode, line ends and whitespace, and remove control characters and boilerplate lines.",
        heading="Cleaning and deduplication",
        common="preparation",
    )
    unicode_form: Literal["nfc", "nfkc", "none"] = setting(
        "nfc",
        "Unicode normalization form of cleaned text. nfkc also turns ligatures and superscripts into plain "
        "letters.",
    )
    drop_boilerplate: bool = setting(
        True, "Remove lines such as cookie notices, menus and page numbers when cleaning."
    )
    filters: list[Filter] = setting(
        list,
        "Filters; a document that one of them rejects is left out. The last four are datatrove's (extra "
        "'quality').",
        aliases=("quality_filters",),
    )
    min_characters: int = setting(
        50, "Filter 'length': shortest document that is kept.", unit="characters", ge=0
    )
    max_characters: int = setting(
        2**31, "Filter 'length': longest document that is kept.", unit="characters", gt=0
    )
    max_symbol_fraction: float = setting(
        0.4,
        "Filter 'symbols': largest fraction of symbols among the characters other than whitespace.",
        gt=0,
        le=1,
    )
    max_repeated_fraction: float = setting(
        0.5, "Filter 'repetition': largest fraction of repeated lines or word sequences.", gt=0, le=1
    )
    languages: list[str] = setting(
        list,
        "ISO 639-1 codes of the languages that are kept (extra 'language'). Empty: all.",
        aliases=("language",),
    )
    min_language_confidence: float = setting(
        0.65,
        "Smallest probability at which a document counts as written in a language.",
        ge=0,
        le=1,
    )
    keep_rejected: bool = setting(
        False, "Write rejected documents and the reasons to a file in the output folder."
    )
    deduplicate: Literal["none", "exact", "near"] = setting(
        "none",
        "Keep only one of several equal documents (exact), or of nearly equal ones (near).",
        common="preparation",
    )
    near_duplicate_bands: int = setting(
        14, "Bands of the MinHash signature. The similarity threshold is (1/bands)^(1/rows).", ge=1, le=64
    )
    near_duplicate_rows: int = setting(8, "Hash functions per band of the MinHash signature.", ge=1, le=64)
    near_duplicate_ngram: int = setting(
        5, "Length of the word sequences by which documents are compared.", unit="words", ge=1, le=32
    )

    tokenizer_type: Literal["auto", "bpe", "char", "wordpiece", "tiktoken"] = setting(
        "auto",
        "Kind of tokenizer to train. auto: that of tokenizer_path, or else bpe. tiktoken is not trained: "
        "it is the encoding that tokenizer_path names, or else gpt2.",
        heading="Tokenizer",
        common="preparation",
    )
    tokenizer_path: str | None = setting(
        None,
        "Existing tokenizer: a tokenizer.json, a folder, a file of tiktoken ranks or a hub name.",
        aliases=("tokenizer", "tokenizer_name"),
        common="preparation",
    )
    vocab_size: int = setting(
        32000,
        "Largest vocabulary size of a tokenizer that is trained.",
        unit="tokens",
        common="preparation",
        gt=0,
    )
    tokenizer_sample_megabytes: float = setting(
        64.0, "Largest amount of training text that the tokenizer is trained on.", unit="MB", gt=0
    )
    special_tokens: list[str] = setting(
        list,
        "Additional special tokens. Their names in a text are not special: they are tokenized as text.",
    )

    max_length: int | None = setting(
        None,
        "Length of a training row; the model's context becomes the same.",
        unit="tokens",
        heading="Packing",
        common="preparation",
        gt=0,
    )
    min_length: int = setting(0, "Drop (and count) documents shorter than this.", unit="tokens", ge=0)
    stride: int = setting(
        0,
        "Overlap of consecutive chunks of a document. The repeated tokens are context only: their loss is "
        "counted once.",
        unit="tokens",
        ge=0,
    )
    pack_sequences: bool = setting(
        True,
        "Pack several documents into a row. False: each document has rows of its own, with padding.",
        common="preparation",
    )
    packing_strategy: Literal["greedy", "first_fit"] = setting(
        "greedy",
        "greedy: documents end to end, cut where a row is full. first_fit: uncut documents, each in the "
        "first row with "
        "room.",
    )
    mask_documents: bool = setting(True, "Restrict attention to the token's own document.")
    mixture_weights: dict[str, float] | None = setting(
        None,
        "Sampling weight of each corpus of a mixture, relative to the others. Unset: those of its "
        "mixture.json.",
        heading="Mixture and augmentation",
    )
    mixture_stages: list[MixtureStage] | None = setting(
        None,
        'Mixture weights that change during the run: [{"until": "1000 steps", "weights": {...}}, {"weights": '
        "{...}}].",
    )
    augment_span_drop: float = setting(
        0.0,
        "Fraction of the training tokens that are dropped in short spans, redrawn on each pass.",
        ge=0,
        lt=1,
    )
    augment_span_length: int = setting(4, "Average length of a dropped span.", unit="tokens", ge=1)
    augment_case: float = setting(
        0.0, "Fraction of the training words whose letter case is changed.", ge=0, le=1
    )
    augment_whitespace: float = setting(
        0.0, "Fraction of the training words whose preceding whitespace is changed.", ge=0, le=1
    )
    train_ratio: float | None = setting(
        None,
        "Fraction of documents for training. Unset: what validation and test leave.",
        heading="Splits and processing",
        ge=0,
        le=1,
    )
    val_ratio: float = setting(
        0.05,
        "Fraction of documents for validation.",
        aliases=("validation_ratio",),
        common="preparation",
        ge=0,
        le=1,
    )
    test_ratio: float = setting(0.0, "Fraction of documents for testing.", ge=0, le=1)
    seed: int = setting(42, "Random seed of the split.", ge=0, le=MAX_SEED)
    num_workers: int = setting(
        1,
        "Number of processes that read, clean and tokenize in parallel.",
        unit="workers",
        aliases=("preprocessing_num_workers", "num_proc"),
        common="preparation",
        ge=1,
    )
    executor: Literal["local", "ray"] = setting(
        "local", "Where the work runs: processes of this machine, or a Ray cluster (extra 'ray')."
    )
    ray_address: str | None = setting(
        None,
        "Address of a running Ray cluster, or auto. Unset: Ray is started on this machine.",
    )
    cache_stages: bool = setting(
        True,
        "Keep the results of the stages (.stages). A later run repeats only the stages that a change "
        "affects, at about "
        "twice the disk space.",
    )
