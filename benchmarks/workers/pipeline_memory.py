"""Under torchrun: the peak memory of a pipeline step above what each rank held before it, in bytes, one JSON
line per rank.

Run as `torchrun … pipeline_memory.py JSON`: the shape, the training settings, sequences and micro-batches.
"""

from __future__ import annotations

import json
import sys

import torch

from llm_trainer.config import ModelConfig, TrainingConfig
from llm_trainer.config.environment import launch_environment
from llm_trainer.data.sampling.batch import Batch
from llm_trainer.diagnostics.measure_memory import measure_peak_memory
from llm_trainer.distributed.process_group import init_process_group
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.engines.engine import build_engine


def main(said: str) -> None:
    """Run two steps on random tokens, and measure the second."""
    torch.manual_seed(0)
    shape, training, sequences, micro_batches = json.loads(said)
    config, settings = (
        ModelConfig.model_validate(shape),
        TrainingConfig.model_validate({**training, "device": "cpu"}),
    )
    with init_process_group(launch_environment(), settings) as process_group:
        engine = build_engine(Transformer(config), settings, None, process_group, torch.device("cpu"))
        engine.model.train()
        engine.start(settings.precision, "off")
        ids = torch.randint(config.vocab_size, (sequences, config.max_position_embeddings))
        batches = [Batch(ids, ids, None, ids.numel())] * micro_batches

        def step() -> None:
            engine.step(batches, ids.numel() * micro_batches, lr_factor=1.0, index=0)

        step()
        process_group.barrier()
        peak = measure_peak_memory(step, torch.device("cpu"))
        peaks = process_group.all_gather_text(str(peak))
        if process_group.is_main:
            print(json.dumps([int(one) for one in peaks]))


if __name__ == "__main__":
    main(sys.argv[1])
