"""Fine-tune a model with LoRA: add low-rank adapters to a base model, train only those, export them for PEFT.

The base model is trained on Python's language reference, and the adapters on generated arithmetic, with the
base model's tokenizer. In practice the base is a model from the Hugging Face Hub: `load_pretrained("gpt2")`.

    python examples/finetune_lora.py [--steps 100] [--output_dir runs/finetune_lora]
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from pydoc_data.topics import topics

from llm_trainer import (
    DataConfig,
    ModelConfig,
    Trainer,
    TrainingConfig,
    load_dataset,
    load_model,
    prepare_dataset,
)
from llm_trainer.model.adapters.lora import train_adapters_only
from llm_trainer.model.hf.checkpoint import load_pretrained
from llm_trainer.model.interop.peft_format import save_adapter
from llm_trainer.model.module_names import trainable_counts


def main() -> None:
    """Train a base model, fine-tune it, and export the adapter."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100, help="Optimizer updates of each of the two runs.")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/finetune_lora"), help="Folder for both runs."
    )
    options = parser.parse_args()
    folder: Path = options.output_dir

    # The base model.
    text = folder / "text"
    text.mkdir(parents=True, exist_ok=True)
    (text / "reference.txt").write_text("\n\n".join(map(str, topics.values())), encoding="utf-8")
    prepare_dataset(DataConfig(input=str(text / "reference.txt"), vocab_size=512), folder / "reference")
    reference = load_dataset(folder / "reference")
    shape = ModelConfig(
        vocab_size=reference.vocab_size, hidden_size=64, num_layers=2, num_heads=4, max_seq_len=64
    )
    Trainer(shape, training_config(folder / "base", options.steps), reference).train()

    # Other data, encoded with the same tokenizer.
    rng = random.Random(1)
    pairs = [(rng.randrange(100), rng.randrange(100)) for _ in range(5000)]
    (text / "sums.txt").write_text("".join(f"{a} + {b} = {a + b}\n" for a, b in pairs), encoding="utf-8")
    prepare_dataset(
        DataConfig(input=str(text / "sums.txt"), tokenizer_path=str(folder / "reference")), folder / "sums"
    )

    # Add adapters of rank 4 to all attention modules, and train nothing else.
    model = load_pretrained(folder / "base" / "final_model")
    model.set_layer_lora_rank("attn.*", 4)
    train_adapters_only(model)
    counts = trainable_counts(model).values()
    trainable, total = sum(one.trainable for one in counts), sum(one.total for one in counts)
    print(f"training {trainable:,} of {total:,} parameters")
    sums, held_out = load_dataset(folder / "sums"), load_dataset(folder / "sums", split="validation")
    result = Trainer(model, training_config(folder / "lora", options.steps), sums, held_out).train()
    print(f"validation loss on sums {result.best_validation_loss:.3f}")

    # The adapter as a folder that PEFT can load over the base model.
    save_adapter(model, folder / "adapter", base=str(folder / "base" / "final_model"))
    tuned, _ = load_model(folder / "lora")
    print(tuned.generate("12 + 30 =", max_tokens=8, temperature=0))


def training_config(folder: Path, steps: int) -> TrainingConfig:
    """Return the settings of a short run."""
    return TrainingConfig(
        output_dir=str(folder), max_steps=steps, batch_size=16, learning_rate=3e-3, eval_iters=4
    )


if __name__ == "__main__":
    main()
