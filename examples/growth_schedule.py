"""Grow a model while it trains: a scaling schedule stacks layers, widens the MLPs and restarts the warm-up.

The operations preserve what the model computes, so the loss does not jump. `operations.jsonl` in the run
folder records them. On the command line, pass the schedule with `--scaling_schedule_file`.

    python examples/growth_schedule.py [--steps 30] [--output_dir runs/growth_schedule]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics

from llm_trainer import DataConfig, ModelConfig, Trainer, TrainingConfig, load_dataset, prepare_dataset
from llm_trainer.config.schema.scaling_schedule import read_schedule
from llm_trainer.orchestration.orchestrator import Orchestrator

SCHEDULE = """\
- name: stack_layers         # 2 → 4 layers; each copy contributes nothing at first
  value: [0, 0, 1, 1]
  mode: identity
  max_wait_iters: {third}    # this many steps after the start
- name: widen_mlp            # 256 → 512 units
  value: 512
  max_wait_iters: {third}    # this many steps after the previous operation
  reevaluate: true
- name: reset_lr_schedule    # warm up again for the new parameters
  max_wait_iters: 0
"""


def main() -> None:
    """Train a small model with the schedule."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=30, help="Optimizer updates.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/growth_schedule"), help="Run folder.")
    options = parser.parse_args()
    folder: Path = options.output_dir

    text = folder / "text"
    text.mkdir(parents=True, exist_ok=True)
    (text / "reference.txt").write_text("\n\n".join(map(str, topics.values())), encoding="utf-8")
    prepare_dataset(DataConfig(input=str(text), vocab_size=512), folder / "data")
    train_dataset, eval_dataset = load_dataset(folder / "data"), load_dataset(folder / "data", "validation")

    schedule = folder / "schedule.yaml"
    schedule.write_text(SCHEDULE.format(third=max(1, options.steps // 3)), encoding="utf-8")
    trainer = Trainer(
        ModelConfig(
            vocab_size=train_dataset.vocab_size,
            hidden_size=64,
            num_layers=2,
            num_heads=4,
            intermediate_size=256,
            max_seq_len=64,
        ),
        TrainingConfig(
            output_dir=str(folder),
            max_steps=options.steps,
            batch_size=16,
            learning_rate=3e-3,
            eval_iters=4,
            compile="off",
        ),
        train_dataset,
        eval_dataset,
        callbacks=[Orchestrator(read_schedule(schedule))],
    )
    trainer.train()
    print((folder / "operations.jsonl").read_text(encoding="utf-8"), end="")
    shape = trainer.model.config
    print(f"final shape: {shape.num_hidden_layers} layers, MLP width {shape.intermediate_size}")


if __name__ == "__main__":
    main()
