"""A run small enough for a test: made-up tokens, a network of a few thousand weights, the real trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from llm_trainer.config import ModelConfig, RunConfig
from llm_trainer.data.token_shards import TokenDataset
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.callbacks.callback import Callback
from llm_trainer.training.trainer import Trainer, TrainingResult

VOCABULARY = 32
CONTEXT = 8
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "max_position_embeddings": CONTEXT,
    "dropout": 0.1,
}
# 40 windows an epoch: five steps of 8, so that ten steps cross an epoch's end.
SETTINGS = {
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 10,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "eval_interval": 4,
    "save_interval": 3,
    "logging_steps": 1,
    "precision": "fp32",
    "compile": "off",
    "device": "cpu",
    "report_to": [],
    "num_workers": 0,
}


def tokens(
    count: int = 40 * CONTEXT + 1,
    seed: int = 0,
    tokenizer_hash: str = "0" * 64,
    document_every: int | None = None,
) -> TokenDataset:
    """Ids that repeat with noise, so that there is something to learn; in documents of so many, or in one."""
    generator = np.random.default_rng(seed)
    ids = (np.arange(count) * 3 + generator.integers(0, 2, count)) % VOCABULARY
    return TokenDataset(
        [ids.astype(np.uint16)],
        [np.arange(0, count, document_every or count)],
        vocab_size=VOCABULARY,
        tokenizer_hash=tokenizer_hash,
        fingerprint=f"{seed}-{count}",
    )


def tiny_config(output_dir: Path, model: Mapping[str, object] | None = None, **training: object) -> RunConfig:
    """The settings above with changes."""
    return RunConfig(
        model=dict(SHAPE) | dict(model or {}), training=SETTINGS | {"output_dir": str(output_dir)} | training
    )


def tiny_model(config: ModelConfig, seed: int = 7) -> Transformer:
    """Seeded weights."""
    model = Transformer(config)
    model.initialize(torch.Generator().manual_seed(seed))
    return model


def tiny_trainer(
    output_dir: Path,
    *,
    model: Mapping[str, object] | None = None,
    callbacks: Sequence[Callback] = (),
    console: Console | None = None,
    data: TokenDataset | None = None,
    **training: object,
) -> Trainer:
    """The trainer of such a run."""
    config = tiny_config(output_dir, model, **training)
    quiet = console or Console(quiet=True)
    return Trainer(
        tiny_model(config.model),
        config,
        data or tokens(),
        tokens(65, seed=1),
        callbacks=callbacks,
        console=quiet,
    )


def tiny_run(output_dir: Path, **settings: object) -> TrainingResult:
    """Train it."""
    return tiny_trainer(output_dir, **settings).train()  # type: ignore[arg-type]
