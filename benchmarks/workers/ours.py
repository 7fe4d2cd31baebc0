"""Our training step, as in the Trainer: objective, token-normalized loss, clipping, AdamW."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from llm_trainer.cli.runtime_env import keep_freed_memory
from llm_trainer.config import ModelConfig, TrainingConfig
from llm_trainer.data.sampling.batch import Batch
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.engines.compile import best_mode, compile_model
from llm_trainer.training.engines.precision import Precision
from llm_trainer.training.engines.train_step import forward_backward, update
from llm_trainer.training.objectives.objective import ModelWithObjective, NextToken
from llm_trainer.training.optim.optimizers import build_optimizers
from workers.serving import Request, Run, serve
from workers.shapes import Shape


def model_config(shape: Shape) -> ModelConfig:
    """Return a GPT-2 configuration with nanoGPT's exact GELU."""
    return ModelConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=shape.tied,
        activation="gelu",
    )


class Steps:
    """Return a function that runs training steps on random tokens."""

    def __init__(self, shape: Shape, precision: str, compile: str, loss: str = "auto") -> None:
        training = TrainingConfig(learning_rate=1e-4, precision=precision, loss=loss)
        self.model = Transformer(model_config(shape), torch.Generator().manual_seed(0))
        self.model.train()
        if compile != "off":
            compile_model(self.model, best_mode(self.model, shape.tokens))
        self.step = ModelWithObjective(self.model, NextToken(training.loss))
        self.optimizers = build_optimizers(self.model, training)
        self.parameters = list(self.model.parameters())
        self.precision = Precision(precision, torch.device("cpu"))
        ids = torch.randint(
            shape.vocabulary, (shape.batch, shape.context + 1), generator=torch.Generator().manual_seed(1)
        )
        self.batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None, shape.tokens)

    def run(self, count: int) -> None:
        """Run this many steps."""
        for index in range(count):
            tokens = int(self.batch.num_supervised)
            loss = forward_backward(self.step, [self.batch], tokens, self.precision, seed=None, index=index)
            update(self.optimizers, self.parameters, loss, tokens, self.precision, 1.0)


def build(request: Request) -> Run:
    """Build for `serve`, with the memory settings of `llm-trainer train`."""
    keep_freed_memory()
    return Steps(request.shape, request.precision, "on" if request.compiled else "off").run


if __name__ == "__main__":
    serve(build)
