"""Every command and every manual's script as its settings see it: what it reads, and the defaults that its
manual shows.

Rates, steps and intervals default to what that manual shows; everything else to the schema's own defaults. A
door's default gives way to a preset, a file and a flag, in that order.
"""

from __future__ import annotations

from typing import Literal

from llm_trainer.config.parse.command import CommandSpec
from llm_trainer.config.schema.base import Section, setting
from llm_trainer.config.schema.data import DataConfig

TRAINING_SECTIONS = (
    "model",
    "training",
    "data",
    "knowledge_distillation",
    "computational_efficiency",
    "adaptive_reasoning",
)

TRAIN = CommandSpec(
    "llm-trainer train",
    "Train a model on prepared data, or on a text that is prepared first.",
    TRAINING_SECTIONS,
    positional_config=True,
    may_resume=True,
)

TRAIN_FRAMEWORK = CommandSpec(
    "train.py",
    "Train a Llama-shaped model on what data_prep_tool.py wrote.",
    TRAINING_SECTIONS,
    defaults={
        "model.model_type": "llama",
        "training.batch_size": 32,
        "training.max_steps": 100_000,
        "training.learning_rate": 3e-4,
    },
    may_resume=True,
)

TRAIN_FROM_FILE = CommandSpec(
    "scripts/train.py",
    "Train from one file; a data section that names a dataset or a text is prepared first, without one data/processed is used.",
    TRAINING_SECTIONS,
    defaults={
        "training.batch_size": 8,
        "training.num_epochs": 3.0,
        "training.learning_rate": 1e-4,
        "training.weight_decay": 0.01,
        "training.eval_interval": 1000,
        "training.save_interval": 1000,
        "training.logging_steps": 100,
    },
    may_resume=True,
)

TRAIN_ALL_IN_ONE = CommandSpec(
    "train_aio.py",
    "Train with every feature as a switch; with no data prepared, the built-in corpus is prepared first.",
    TRAINING_SECTIONS,
    defaults={
        "training.batch_size": 16,
        "training.eval_batch_size": 32,
        "training.gradient_accumulation_steps": 4,
        "training.num_epochs": 3.0,
        "training.learning_rate": 5e-5,
        "training.weight_decay": 0.01,
        "training.warmup_steps": 500,
        "training.eval_interval": 500,
        "training.save_interval": 500,
        "training.logging_steps": 10,
        "training.seed": 42,
        "training.num_workers": 4,
        "training.output_dir": "models/all_in_one",
    },
    may_resume=True,
)

TRAIN_ORCHESTRATOR = CommandSpec(
    "train_refactored.py",
    "Train with nanoGPT's names and files; with no file it is GPT-2 124M on OpenWebText.",
    TRAINING_SECTIONS,
    defaults={
        "model.bias": False,
        "model.activation": "gelu",
        "data.dataset": "openwebtext",
        "training.output_dir": "out",
        "training.batch_size": 12,
        "training.gradient_accumulation_steps": 40,
        "training.global_grad_accumulation": True,
        "training.max_steps": 600_000,
        "training.learning_rate": 6e-4,
        "training.warmup_steps": 2000,
        "training.eval_interval": 2000,
        "training.eval_iters": 200,
        "training.eval_at_start": True,
        "training.always_save_checkpoint": True,
        "training.save_interval": 2000,
        "training.logging_steps": 1,
        "training.wandb_project": "owt",
        "training.wandb_run_name": "gpt2",
    },
    positional_config=True,
    may_resume=True,
)

# Settings of data that say what is trained on, not how it is prepared.
OF_TRAINING = (
    "data_dir", "dataset", "mask_documents", "mixture_weights", "mixture_stages",
    "augment_span_drop", "augment_span_length", "augment_case", "augment_whitespace",
)  # fmt: skip
OF_BOTH = (
    "max_length",
    "pack_sequences",
    "packing_strategy",
    "stride",
)  # preparation remembers them, training may say otherwise
PREPARING = tuple(f"data.{name}" for name in DataConfig.model_fields if name not in OF_TRAINING)

PREPARE = CommandSpec("llm-trainer prepare", "Text → cleaned splits, tokenizer and token shards.", PREPARING)

PREPARE_SPLITS = CommandSpec(
    "scripts/prepare_data.py",
    "Raw files, or one file with a sample a line, → train, validation and test splits, tokenizer and token shards.",
    PREPARING,
    defaults={
        "data.input": "data/raw",
        "data.output_dir": "data/processed",
        "data.vocab_size": 50257,
        "data.train_ratio": 0.8,
        "data.val_ratio": 0.1,
        "data.test_ratio": 0.1,
        "data.one_document_per_line": True,
        "data.clean": True,
        "data.deduplicate": "near",
    },
)

PREPARE_FRAMEWORK = CommandSpec(
    "data_prep_tool.py",
    "A folder of raw text → tokenizer.json, dataset/ and metadata.json.",
    PREPARING,
    defaults={
        "data.input": "./raw_text_data",
        "data.output_dir": "./processed_data",
        "data.tokenizer_type": "bpe",
        "data.max_length": 2048,
    },
)


class ProcessOptions(Section):
    """What is made of the splits."""

    mode: Literal["train", "student", "inference"] = setting(
        "train",
        "train: token shards; student: shards and the teacher's log-probabilities; inference: a model's outputs on them",
    )
    student_model_path: str | None = setting(
        None,
        "the trained model (in mode student it is the one that teaches)",
        aliases=("model_path", "model"),
    )
    num_samples: int = setting(20, "inference: documents that the model goes on from", unit="documents", ge=0)
    max_new_tokens: int = setting(
        50, "inference: at most so many new tokens a document", unit="tokens", aliases=("max_tokens",), ge=0
    )


PROCESS = CommandSpec(
    "scripts/process_data.py",
    "Splits → token shards, or a trained model's outputs on them.",
    PREPARING,
    options=ProcessOptions,
    defaults={"data.input": "data/processed"},
)


class SampleOptions(Section):
    """Which model, in nanoGPT's words."""

    init_from: str = setting(
        "resume",
        "resume: the model in out_dir; else the name or folder of a pretrained model (gpt2, gpt2-xl, …)",
    )
    out_dir: str = setting("out", "run folder", aliases=("output_dir",))


GENERATION_SECTIONS = ("generation", "inference")

GENERATE = CommandSpec(
    "llm-trainer generate",
    "Let a model go on from a prompt.",
    GENERATION_SECTIONS,
    positional=("model", "prompt"),
)
GENERATE_ENHANCED = CommandSpec("generate.py", "Let a model go on from a prompt.", GENERATION_SECTIONS)
GENERATE_L1 = CommandSpec("scripts/generate.py", "Let a model go on from a prompt.", GENERATION_SECTIONS)
SAMPLE = CommandSpec(
    "sample.py",
    "Sample from a trained or a pretrained model, with nanoGPT's names.",
    GENERATION_SECTIONS,
    options=SampleOptions,
    defaults={
        "inference.prompt": "\n",
        "generation.num_samples": 10,
        "generation.max_new_tokens": 500,
        "generation.temperature": 0.8,
        "generation.top_k": 200,
        "generation.seed": 1337,
        "generation.sliding_context": True,
    },
    positional_config=True,
)


class EvaluateOptions(Section):
    """On what, and how much at once."""

    data: str | None = setting(
        None,
        "a text file, or a prepared folder (its test split, else its validation split)",
        aliases=("text", "data_dir"),
    )
    eval_datasets: list[str] = setting(
        list, "reasoning suites by domain (math, science, …)", not_implemented=True
    )
    batch_size: int = setting(8, "windows at once; the result does not depend on it", unit="windows", gt=0)
    stride: int | None = setting(
        None,
        "tokens by which windows advance; less than the context gives each token more to look back on; none: the context",
        unit="tokens",
        gt=0,
    )


SCORING = ("inference.model", "inference.device", "inference.precision", "inference.adapter")
EVALUATE = CommandSpec(
    "llm-trainer evaluate",
    "Loss, perplexity and bits per byte of a model on a text.",
    SCORING,
    options=EvaluateOptions,
    positional=("model", "data"),
)
EVALUATE_ENHANCED = CommandSpec(
    "evaluate.py", "Benchmarks by domain, and the loss on a text.", SCORING, options=EvaluateOptions
)
EVALUATE_L1 = CommandSpec(
    "scripts/evaluate.py",
    "Loss, perplexity and bits per byte of a model on a text.",
    SCORING,
    options=EvaluateOptions,
)


class AdapterOptions(Section):
    """What is written, and where."""

    output: str = setting("adapter", "the folder in PEFT's form")
    base: str | None = setting(
        None,
        "what peft opens under the adapter, taken as said; none: what the run began from, if its weights lie there unchanged",
    )
    base_output: str | None = setting(None, "also write the model without adapters there, as the base")
    merged_output: str | None = setting(
        None, "write the model with the adapter in its matrices there, and no adapter folder"
    )


ADAPTER = CommandSpec(
    "llm-trainer adapter",
    "A model's low-rank adapter as a folder of PEFT's, or merged.",
    ("inference.model", "inference.adapter"),
    options=AdapterOptions,
    positional=("model", "output"),
)


class VerifyOptions(Section):
    """Which run, and how much of it."""

    run: str = setting("checkpoints", "the run folder")
    steps: int = setting(10, "at most so many steps are replayed", unit="steps", ge=2)


class ReportOptions(Section):
    """Which run, and where the page goes."""

    run: str = setting("checkpoints", "the run folder")
    output: str | None = setting(None, "the page; none: report.html in the run folder")


class QuickstartOptions(Section):
    """The whole way with nothing to decide."""

    text: str | None = setting(None, "a text file or a folder of your own; none: the built-in corpus")
    output_dir: str = setting("runs/quickstart", "run folder", aliases=("output",))
    steps: int | None = setting(
        None, "steps; none: what fits the time on this machine", unit="steps", aliases=("max_steps",), gt=0
    )
    minutes: float = setting(1.6, "how long the training may take", unit="minutes", gt=0)
    vocab_size: int = setting(4096, "ids of the tokenizer", unit="tokens", gt=256)
    seed: int = setting(1337, "of weights, data order and samples", ge=0)


VERIFY_RESUME = CommandSpec(
    "llm-trainer verify-resume",
    "Replay the steps after a checkpoint and say whether resuming is exact.",
    (),
    options=VerifyOptions,
    positional=("run",),
)
REPORT = CommandSpec(
    "llm-trainer report",
    "Write one page about a run: curves, samples, settings, machine.",
    (),
    options=ReportOptions,
    positional=("run",),
)
QUICKSTART = CommandSpec(
    "llm-trainer quickstart", "From text to a talking model in minutes.", (), options=QuickstartOptions
)


class PreflightOptions(Section):
    """On what it would run."""

    memory_gb: float | None = setting(
        None,
        "memory of one rank; none: this machine's free memory, of its GPU where there is one",
        unit="GB (1e9 bytes)",
        gt=0,
    )


class MemoryOptions(Section):
    """Which model, and how much goes through it at once."""

    model_path: str | None = setting(
        None, "run folder, checkpoint or the name of a model on the hub", aliases=("model",)
    )
    batch_size: int = setting(1, "sequences at once", unit="sequences", gt=0)
    precision: Literal["fp32", "bf16"] = setting("bf16", "arithmetic of the forward pass")
    optimizer: Literal["adamw", "muon"] = setting("adamw", "what would train it")


PREFLIGHT = CommandSpec(
    "llm-trainer preflight",
    "Will it fit? A step's memory by part on one rank, before anything is allocated.",
    ("model", "training"),
    options=PreflightOptions,
    positional_config=True,
    uses_planned_ranks=True,
)
DEBUG_MEMORY = CommandSpec(
    "debug_memory.py",
    "A model's memory by part, estimated and measured: weights, gradients, optimizer, activations, cache.",
    (),
    options=MemoryOptions,
    positional=("model_path",),
)
