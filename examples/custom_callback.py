"""Run code during training: a callback that records the norm of the weights and stops at a target loss.

A callback's `state_dict` is saved in every checkpoint, so a resumed run continues it.

    python examples/custom_callback.py [--steps 30] [--output_dir runs/custom_callback]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from llm_trainer import (
    Callback,
    DataConfig,
    ModelConfig,
    Trainer,
    TrainingConfig,
    load_dataset,
    prepare_dataset,
)
from llm_trainer.training.engines.validation import ValidationResult
from llm_trainer.training.run import TrainingRun


class WeightNorm(Callback):
    """Records the norm of all weights at each validation, and stops the run at a target loss.

    Args:
        target_loss: Validation loss at which the run stops, in nats per token.
    """

    def __init__(self, target_loss: float) -> None:
        self.target_loss = target_loss
        self.norms: list[float] = []

    def on_validation(self, run: TrainingRun, result: ValidationResult) -> None:
        """Record the norm, as a metric too, and stop the run if the loss is low enough."""
        squares = sum(float(weight.detach().float().square().sum()) for weight in run.model.parameters())
        self.norms.append(squares**0.5)
        run.metrics_tracker.update({"weight_norm": self.norms[-1]}, run.current_step)
        run.log(f"step {run.current_step}: weight norm {self.norms[-1]:.2f}")
        if result.loss <= self.target_loss:
            run.log(f"the validation loss is {result.loss:.3f}, at most {self.target_loss}; stopping")
            run.stop()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as JSON."""
        return {"norms": self.norms}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.norms = list(state["norms"])


def main() -> None:
    """Train a small model with the callback."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=30, help="Optimizer updates.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/custom_callback"), help="Run folder.")
    options = parser.parse_args()
    folder: Path = options.output_dir

    text = folder / "text"
    text.mkdir(parents=True, exist_ok=True)
    (text / "reference.txt").write_text("\n\n".join(map(str, topics.values())), encoding="utf-8")
    prepare_dataset(DataConfig(input=str(text), vocab_size=512), folder / "data")
    train_dataset, eval_dataset = load_dataset(folder / "data"), load_dataset(folder / "data", "validation")
    callback = WeightNorm(target_loss=4.0)
    trainer = Trainer(
        ModelConfig(
            vocab_size=train_dataset.vocab_size, hidden_size=64, num_layers=2, num_heads=4, max_seq_len=64
        ),
        TrainingConfig(
            output_dir=str(folder),
            max_steps=options.steps,
            batch_size=16,
            learning_rate=3e-3,
            eval_interval=max(1, options.steps // 3),
            eval_iters=4,
        ),
        train_dataset,
        eval_dataset,
        callbacks=[callback],
    )
    trainer.train()
    print("weight norms:", ", ".join(f"{norm:.2f}" for norm in callback.norms))


if __name__ == "__main__":
    main()
