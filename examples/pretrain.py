"""Pretrain a small model from scratch, in Python: prepare text, train, generate.

The text is the built-in corpus (Python's language reference and standard library), so nothing is downloaded.
With the default 30 steps this takes seconds on a CPU, and the model learns little; more steps help.

    python examples/pretrain.py [--steps 30] [--output_dir runs/pretrain]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llm_trainer import (
    DataConfig,
    ModelConfig,
    Trainer,
    TrainingConfig,
    load_dataset,
    load_model,
    prepare_dataset,
)


def main() -> None:
    """Prepare, train and generate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=30, help="Optimizer updates.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/pretrain"), help="Run folder.")
    options = parser.parse_args()

    # Text → tokenizer and token shards. A second call with the same settings reuses the result.
    data = options.output_dir / "data"
    prepare_dataset(DataConfig(input="builtin", vocab_size=2048), data)
    train_dataset = load_dataset(data)
    eval_dataset = load_dataset(data, split="validation")
    print(f"{train_dataset.num_tokens:,} training tokens, {train_dataset.vocab_size:,} token ids")

    # A Llama-shaped model. Every setting also answers to the names of nanoGPT and Hugging Face.
    model_config = ModelConfig(
        model_type="llama",
        vocab_size=train_dataset.vocab_size,
        hidden_size=128,
        num_layers=2,
        num_heads=4,
        max_seq_len=128,
    )
    training_config = TrainingConfig(
        output_dir=str(options.output_dir),
        max_steps=options.steps,
        batch_size=16,
        learning_rate=3e-3,
        eval_iters=4,
    )
    result = Trainer(model_config, training_config, train_dataset, eval_dataset).train()
    print(f"validation loss {result.best_validation_loss:.3f} after {result.step} steps")

    # The run folder contains the best model in Hugging Face's format.
    model, _ = load_model(options.output_dir)
    print(model.generate("def ", max_tokens=60, seed=1))


if __name__ == "__main__":
    main()
