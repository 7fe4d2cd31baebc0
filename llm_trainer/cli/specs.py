"""Every command and every manual's script: which settings it reads, its own options, and its defaults.

Learning rates, steps and intervals of a script default to what its manual shows; everything else to the
schema's defaults. A preset, a file and a flag override a command's default, in that order.
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
    "Train a Llama-shaped model on the data that data_prep_tool.py has prepared.",
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
    "Train from one settings file. A dataset or text that its data section names is prepared first; without "
    "one, data/processed is used.",
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
    "Train with every feature as a switch. Without prepared data, the built-in corpus is prepared first.",
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
    "Train with nanoGPT's settings and files. Without a file it trains GPT-2 124M on OpenWebText.",
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

# Settings of the section data that say what to train on, not how to prepare it.
OF_TRAINING = (
    "data_dir", "dataset", "mask_documents", "mixture_weights", "mixture_stages",
    "augment_span_drop", "augment_span_length", "augment_case", "augment_whitespace",
)  # fmt: skip
# Settings that preparation stores and training may override.
OF_BOTH = ("max_length", "pack_sequences", "packing_strategy", "stride")
PREPARING = tuple(f"data.{name}" for name in DataConfig.model_fields if name not in OF_TRAINING)

PREPARE = CommandSpec(
    "llm-trainer prepare", "Turn text into cleaned splits, a tokenizer and token shards.", PREPARING
)

PREPARE_SPLITS = CommandSpec(
    "scripts/prepare_data.py",
    "Turn raw files, or one file with a sample per line, into train, validation and test splits, a "
    "tokenizer and token shards.",
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
    "Turn a folder of raw text into tokenizer.json, dataset/ and metadata.json.",
    PREPARING,
    defaults={
        "data.input": "./raw_text_data",
        "data.output_dir": "./processed_data",
        "data.tokenizer_type": "bpe",
        "data.max_length": 2048,
    },
)


class ProcessOptions(Section):
    """What to make from the splits."""

    mode: Literal["train", "student", "inference"] = setting(
        "train",
        "What to write. train: token shards. student: shards and the teacher's log-probabilities. "
        "inference: a model's outputs on the held-out documents.",
    )
    student_model_path: str | None = setting(
        None,
        "Trained model: a run folder or a checkpoint. In mode student it is the teacher.",
        aliases=("model_path", "model"),
    )
    num_samples: int = setting(
        20, "Number of held-out documents whose beginnings the model continues.", unit="documents", ge=0
    )
    max_new_tokens: int = setting(
        50, "Maximum number of new tokens per document.", unit="tokens", aliases=("max_tokens",), ge=0
    )


PROCESS = CommandSpec(
    "scripts/process_data.py",
    "Turn splits into token shards, or write a trained model's outputs on them.",
    PREPARING,
    options=ProcessOptions,
    defaults={"data.input": "data/processed"},
)


class SampleOptions(Section):
    """The model, in nanoGPT's terms."""

    init_from: str = setting(
        "resume",
        "Model to sample from: resume for the one in out_dir, else the name or folder of a pretrained model "
        "(gpt2, gpt2-xl, …).",
    )
    out_dir: str = setting("out", "Run folder.", aliases=("output_dir",))


GENERATION_SECTIONS = ("generation", "inference")

GENERATE = CommandSpec(
    "llm-trainer generate",
    "Continue a prompt with a model.",
    GENERATION_SECTIONS,
    positional=("model", "prompt"),
)
GENERATE_ENHANCED = CommandSpec("generate.py", "Continue a prompt with a model.", GENERATION_SECTIONS)
GENERATE_L1 = CommandSpec("scripts/generate.py", "Continue a prompt with a model.", GENERATION_SECTIONS)
SAMPLE = CommandSpec(
    "sample.py",
    "Sample from a trained or a pretrained model, with nanoGPT's settings.",
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
    """What to evaluate on."""

    data: str | None = setting(
        None,
        "Text file, or prepared folder (its test split, else its validation split).",
        aliases=("text", "data_dir"),
    )
    eval_datasets: list[str] = setting(
        list, "Reasoning suites to run, by domain (math, science, …).", not_implemented=True
    )
    batch_size: int = setting(
        8, "Number of windows per batch. The result does not depend on it.", unit="windows", gt=0
    )
    stride: int | None = setting(
        None,
        "Tokens by which windows advance (default: the context). Fewer give each token more context.",
        unit="tokens",
        gt=0,
    )


SCORING = ("inference.model", "inference.device", "inference.precision", "inference.adapter")
EVALUATE = CommandSpec(
    "llm-trainer evaluate",
    "Measure loss, perplexity and bits per byte of a model on a text.",
    SCORING,
    options=EvaluateOptions,
    positional=("model", "data"),
)
EVALUATE_ENHANCED = CommandSpec(
    "evaluate.py",
    "Run benchmarks by domain, and measure the loss on a text.",
    SCORING,
    options=EvaluateOptions,
)
EVALUATE_L1 = CommandSpec(
    "scripts/evaluate.py",
    "Measure loss, perplexity and bits per byte of a model on a text.",
    SCORING,
    options=EvaluateOptions,
)


class AdapterOptions(Section):
    """What to write, and where."""

    output: str = setting("adapter", "PEFT folder to write.")
    base: str | None = setting(
        None,
        "Base model to name in the PEFT folder, unchecked (default: the model that the run started from, "
        "if its weights are unchanged).",
    )
    base_output: str | None = setting(None, "Folder to write the model without adapters to, as the base.")
    merged_output: str | None = setting(
        None,
        "Folder to write the model with the adapter merged into its weights to, instead of a PEFT folder.",
    )


EXPORT_ADAPTER = CommandSpec(
    "llm-trainer export-adapter",
    "Write a model's LoRA adapter as a PEFT folder, or merge it into the model.",
    ("inference.model", "inference.adapter"),
    options=AdapterOptions,
    positional=("model", "output"),
)


class VerifyOptions(Section):
    """Which run, and how many steps."""

    run: str = setting("checkpoints", "Run folder.")
    steps: int = setting(10, "Maximum number of steps to replay.", unit="steps", ge=2)


class ReportOptions(Section):
    """Which run, and where to write the page."""

    run: str = setting("checkpoints", "Run folder.")
    output: str | None = setting(None, "Page to write (default: report.html in the run folder).")


class QuickstartOptions(Section):
    """The few things to choose in the quickstart."""

    text: str | None = setting(None, "Text file or folder to train on (default: the built-in corpus).")
    output_dir: str = setting("runs/quickstart", "Run folder.", aliases=("output",))
    steps: int | None = setting(
        None,
        "Number of steps (default: as many as fit into the time on this machine).",
        unit="steps",
        aliases=("max_steps",),
        gt=0,
    )
    minutes: float = setting(1.6, "Time that the training may take.", unit="minutes", gt=0)
    vocab_size: int = setting(4096, "Vocabulary size of the tokenizer.", unit="tokens", gt=256)
    seed: int = setting(1337, "Random seed for weights, data order and samples.", ge=0)


VERIFY_RESUME = CommandSpec(
    "llm-trainer verify-resume",
    "Replay the steps after a checkpoint and check that resuming is bit-exact.",
    (),
    options=VerifyOptions,
    positional=("run",),
)
REPORT = CommandSpec(
    "llm-trainer report",
    "Write a page about a run: curves, samples, settings, machine.",
    (),
    options=ReportOptions,
    positional=("run",),
)
QUICKSTART = CommandSpec(
    "llm-trainer quickstart",
    "Train a small model on text and sample from it, in minutes.",
    (),
    options=QuickstartOptions,
)


class PreflightOptions(Section):
    """The machine to plan for."""

    memory_gb: float | None = setting(
        None,
        "Memory of one rank (default: the free memory of this machine's GPU, or of the machine without one).",
        unit="GB (1e9 bytes)",
        gt=0,
    )


class MemoryOptions(Section):
    """The model, and the step to measure."""

    model_path: str | None = setting(
        None, "Run folder, checkpoint, or name of a model on the hub.", aliases=("model",)
    )
    batch_size: int = setting(1, "Number of sequences per micro-batch.", unit="sequences", gt=0)
    precision: Literal["fp32", "bf16"] = setting("bf16", "Precision of the forward pass.")
    optimizer: Literal["adamw", "muon"] = setting("adamw", "Optimizer.")


PREFLIGHT = CommandSpec(
    "llm-trainer preflight",
    "Estimate the memory of a training step on one rank, before anything is allocated.",
    ("model", "training"),
    options=PreflightOptions,
    positional_config=True,
    uses_planned_ranks=True,
)
DEBUG_MEMORY = CommandSpec(
    "debug_memory.py",
    "Estimate and measure the memory of a model by part: weights, gradients, optimizer, activations, cache.",
    (),
    options=MemoryOptions,
    positional=("model_path",),
)
