"""Train with an objective of your own: next-token cross-entropy plus a z-loss.

The z-loss adds 1e-4 · log²(Z) per token, where Z is the normalizer of the softmax, and keeps logits from
drifting (PaLM, arXiv:2204.02311, section 5). An objective returns the *sum* of the losses and the *number* of
tokens, never a mean: the trainer divides once, over all micro-batches and ranks.

    python examples/custom_objective.py [--steps 30] [--output_dir runs/custom_objective]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch.nn.functional as F

from llm_trainer import DataConfig, ModelConfig, Trainer, TrainingConfig, load_dataset, prepare_dataset
from llm_trainer.data.sampling.batch import IGNORE_INDEX, Batch
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.objectives.objective import LossSum


class NextTokenWithZLoss:
    """Cross-entropy plus `weight` · log²(Z), in nats.

    Args:
        weight: Factor of the z-loss.
    """

    def __init__(self, weight: float = 1e-4) -> None:
        self.weight = weight

    def __call__(self, model: Transformer, batch: Batch) -> LossSum:
        """Return the sum of the losses over the labels of a micro-batch, and the number of labels."""
        logits = model(batch.input_ids, document_ids=batch.document_ids).float()  # (B, T, V)
        is_label = batch.labels != IGNORE_INDEX  # (B, T)
        cross_entropy = F.cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        log_z = logits.logsumexp(dim=-1)[is_label]
        return LossSum(cross_entropy + self.weight * log_z.square().sum(), is_label.sum())


def main() -> None:
    """Train a small model with the objective."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=30, help="Optimizer updates.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/custom_objective"), help="Run folder.")
    options = parser.parse_args()
    folder: Path = options.output_dir

    text = folder / "text"
    text.mkdir(parents=True, exist_ok=True)
    (text / "reference.txt").write_text("\n\n".join(map(str, topics.values())), encoding="utf-8")
    prepare_dataset(DataConfig(input=str(text), vocab_size=512), folder / "data")
    train_dataset, eval_dataset = load_dataset(folder / "data"), load_dataset(folder / "data", "validation")
    trainer = Trainer(
        ModelConfig(
            vocab_size=train_dataset.vocab_size, hidden_size=64, num_layers=2, num_heads=4, max_seq_len=64
        ),
        TrainingConfig(
            output_dir=str(folder), max_steps=options.steps, batch_size=16, learning_rate=3e-3, eval_iters=4
        ),
        train_dataset,
        eval_dataset,
        objective=NextTokenWithZLoss(),
    )
    result = trainer.train()
    print(f"validation loss {result.best_validation_loss:.3f} after {result.step} steps")


if __name__ == "__main__":
    main()
