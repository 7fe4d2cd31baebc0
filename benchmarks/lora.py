"""Peak memory and speed of fine-tuning 30.6 M parameters with LoRA of rank 8 on attention and MLP, compared
with full fine-tuning.

The shape is the third of the training benchmarks: 6 layers, width 256, an untied vocabulary of 50,304,
fp32, AdamW, one sequence per step. LoRA saves the gradients and optimizer state of frozen weights, which do
not depend on the batch, and no activations: so the longer the sequence, the smaller the saving. 256 tokens
are judged; 128 and 512 are listed too. Each measurement is a fresh process. "Memory" is the kernel's
high-water mark over three steps minus what the process held before the model was created (Python, torch and
its kernels); "speed" is tokens per second of the steps after the first. Linux only.

    python benchmarks/lora.py [--rounds 3] [--tokens 128,256,512] [--quick]
"""

from __future__ import annotations

import argparse
import json
import sys
import time

from common import Figure, Target, alternate, finish, run_command
from memory import MEGABYTE, _status

LIMIT = 0.5
JUDGED = 256  # tokens of a step
CONTESTANTS = {"full": 0, "LoRA rank 8": 8}
STEPS = 3


def main() -> int:
    """Measure, print and write the results; return 1 if the target is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--tokens",
        default=f"128,{JUDGED},512",
        help="Lengths of the step's single sequence (default: %(default)s).",
    )
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--measure", type=int, metavar="RANK", help="(internal) Run one measurement.")
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.measure, int(options.tokens))))
        return 0
    figures: list[Figure] = []
    targets: list[Target] = []
    for tokens in map(int, options.tokens.split(",")):
        memory, speed = compared(tokens, 1 if options.quick else options.rounds)
        figures += memory + speed
        if tokens == JUDGED:
            ratio = memory[1].median / memory[0].median
            targets.append(Target(f"memory of LoRA ÷ full, {tokens} tokens", ratio, LIMIT, is_ceiling=True))
    baselines = {figure.work: "full" for figure in figures}
    return finish("lora", figures, baselines, " ".join(["python", *sys.argv]), targets)


def compared(tokens: int, rounds: int) -> tuple[list[Figure], list[Figure]]:
    """Measure memory and speed of each contestant in turn."""
    kept: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}

    def one(name: str) -> float:
        kept[name].append(measured(CONTESTANTS[name], tokens))
        return kept[name][-1]["memory"]

    alternate({name: (lambda name=name: one(name)) for name in CONTESTANTS}, rounds)
    memory = [
        Figure(f"memory, {tokens} tokens", name, "MB", [round(one["memory"]) for one in kept[name]])
        for name in CONTESTANTS
    ]
    speed = [
        Figure(f"speed, {tokens} tokens", name, "tokens/s", [round(one["speed"]) for one in kept[name]])
        for name in CONTESTANTS
    ]
    return memory, speed


def measured(rank: int, tokens: int) -> dict[str, float]:
    """Run `measure` in a fresh process, which has its own high-water mark."""
    done = run_command([sys.executable, __file__, "--measure", str(rank), "--tokens", str(tokens)])
    return json.loads(done.output.splitlines()[-1])


def measure(rank: int, tokens: int) -> dict[str, float]:
    """Return the peak megabytes above the bare process, and tokens per second."""
    import torch
    from workers.shapes import SHAPES

    from llm_trainer.config import ModelConfig, TrainingConfig
    from llm_trainer.data.sampling.batch import Batch
    from llm_trainer.distributed.process_group import ProcessGroup
    from llm_trainer.model.transformer import Transformer
    from llm_trainer.training.engines.engine import build_engine

    torch.set_num_threads(1)
    torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64, requires_grad=True)).sum().backward()
    before = _status("VmRSS")
    shape = SHAPES["vocabulary-50k"]
    config = ModelConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, num_layers=shape.layers, num_heads=shape.heads,
        max_position_embeddings=shape.context, tie_word_embeddings=shape.tied, activation="gelu",
        attn_lora_rank=rank, mlp_lora_rank=rank, lora_train_base=rank == 0,
    )  # fmt: skip
    training = TrainingConfig(precision="fp32", compile="off", device="cpu")
    engine = build_engine(Transformer(config), training, None, ProcessGroup(), torch.device("cpu"))
    engine.model.train()
    engine.start("fp32", "off")
    ids = torch.randint(shape.vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids, ids, None, ids.numel())
    start = 0.0
    for index in range(STEPS):
        engine.step([batch], ids.numel(), lr_factor=1.0, index=index)
        start = start or time.perf_counter()
    speed = (STEPS - 1) * ids.numel() / (time.perf_counter() - start)
    return {"memory": (_status("VmHWM") - before) / MEGABYTE, "speed": speed}


if __name__ == "__main__":
    sys.exit(main())
