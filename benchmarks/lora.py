"""Peak memory and speed of fine-tuning 30.6 M parameters with LoRA of rank 8 on attention and MLP against all of them.

The shape is benchmarks' third: 6 layers, 256 wide, 50,304 tokens untied, one sequence of 512, fp32, AdamW (with more, activations outweigh
what LoRA saves: `--batch 4`). Each measurement is a fresh
process: "memory" is the kernel's high-water mark of three steps less what the process held before the model was made (Python, torch);
"speed" is tokens a second of the steps after the first. Linux only.

    python benchmarks/lora.py [--rounds 3] [--batch 1] [--quick]
"""

from __future__ import annotations

import argparse
import json
import sys
import time

from common import Figure, Target, alternate, finish, run_command
from memory import MEGABYTE, _status

LIMIT = 0.5
CONTESTANTS = {"full": 0, "LoRA rank 8": 8}
STEPS = 3


def main() -> int:
    """Measure, print, write; 1 where the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--measure", type=int, metavar="RANK", help="(for the processes that this one starts) one measurement")
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.measure, options.batch)))
        return 0
    kept: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}

    def one(name: str) -> float:
        done = run_command([sys.executable, __file__, "--measure", str(CONTESTANTS[name]), "--batch", str(options.batch)])
        kept[name].append(json.loads(done.output.splitlines()[-1]))
        return kept[name][-1]["memory"]

    alternate({name: (lambda name=name: one(name)) for name in CONTESTANTS}, 1 if options.quick else options.rounds)
    memory = [Figure("memory", name, "MB", [round(one["memory"]) for one in kept[name]]) for name in CONTESTANTS]
    speed = [Figure("speed", name, "tokens/s", [round(one["speed"]) for one in kept[name]]) for name in CONTESTANTS]
    target = Target("memory of LoRA ÷ full", memory[1].median / memory[0].median, LIMIT, is_ceiling=True)
    return finish("lora", memory + speed, {"memory": "full", "speed": "full"}, " ".join(["python", *sys.argv]), [target])


def measure(rank: int, batch_size: int) -> dict[str, float]:
    """Peak megabytes above the bare process, and tokens a second."""
    import torch
    from workers.shapes import SHAPES

    from llm_trainer.config import ModelConfig, TrainingConfig
    from llm_trainer.data.sampling.batch import Batch
    from llm_trainer.model.transformer import Transformer
    from llm_trainer.training.engine import build_engine
    from llm_trainer.training.ranks import Ranks

    torch.set_num_threads(1)
    before = _status("VmRSS")
    shape = SHAPES["vocabulary-50k"]
    config = ModelConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, num_layers=shape.layers, num_heads=shape.heads,
        max_position_embeddings=shape.context, tie_word_embeddings=shape.tied, activation="gelu",
        attn_lora_rank=rank, mlp_lora_rank=rank, lora_train_base=rank == 0,
    )  # fmt: skip
    training = TrainingConfig(precision="fp32", compile="off", device="cpu")
    engine = build_engine(Transformer(config), training, None, Ranks(), torch.device("cpu"))
    engine.model.train()
    engine.start("fp32", "off")
    ids = torch.randint(shape.vocabulary, (batch_size, shape.context), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids, ids, None, ids.numel())
    start = 0.0
    for index in range(STEPS):
        engine.step([batch], ids.numel(), rate_factor=1.0, index=index)
        start = start or time.perf_counter()
    speed = (STEPS - 1) * ids.numel() / (time.perf_counter() - start)
    return {"memory": (_status("VmHWM") - before) / MEGABYTE, "speed": speed}


if __name__ == "__main__":
    sys.exit(main())
