"""Training on one GPU: tokens per second, MFU and peak memory of 124 M GPT-2 and 1 B Llama shapes,
compiled, in bf16 and fp8.

We measure the step of the training engine with compiled blocks; fp8 replaces the linear layers of the
blocks with torchao's dynamically scaled ones (pip install torchao). The peer, if its clone is given, is
nanoGPT's model, compiled, in bf16 and with fused AdamW as in its train.py. MFU is the count of
model/flops.py divided by the bf16 peak of the device's data sheet, also for fp8, so that the rows are
comparable. Each contestant is a fresh process. Without a GPU there is nothing to measure.

    python benchmarks/gpu_training.py [--steps 20] [--shapes gpt2-124M,llama-1B] [--nanogpt DIR]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from common import Figure, finish, report_load, run_command

# Width, layers, heads, key-value heads, MLP, vocabulary, context, batch, family.
SHAPES: dict[str, dict[str, object]] = {
    "gpt2-124M": {
        "model_type": "gpt2",
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "vocab_size": 50304,
        "max_position_embeddings": 1024,
    },
    "llama-1B": {
        "model_type": "llama",
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
}
BATCH = {"gpt2-124M": 32, "llama-1B": 4}
WARM_UP = 5
OURS_BF16, OURS_FP8, NANOGPT = "ours, bf16", "ours, fp8", "nanoGPT, bf16"


def main() -> int:
    """Measure, print and write the results; without a GPU print a message and return 0."""
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--nanogpt", type=Path, help="a clone of nanoGPT")
    parser.add_argument(
        "--measure",
        nargs=2,
        metavar=("CONTESTANT", "SHAPE"),
        help="(internal) Used by the processes that this program starts.",
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU that PyTorch can use: nothing to measure")
        return 0
    if options.measure:
        print(json.dumps(measure(*options.measure, options.steps, options.nanogpt)))
        return 0
    load, figures = report_load(), []
    notes = [
        load,
        f"device: {torch.cuda.get_device_name()}, {torch.version.cuda and 'CUDA ' + torch.version.cuda}",
    ]
    for shape in options.shapes.split(","):
        for contestant in (
            OURS_BF16,
            OURS_FP8,
            *([NANOGPT] if options.nanogpt and shape.startswith("gpt2") else []),
        ):
            command = [
                sys.executable,
                __file__,
                "--measure",
                contestant,
                shape,
                "--steps",
                str(options.steps),
            ]
            command += ["--nanogpt", str(options.nanogpt)] if options.nanogpt else []
            result = json.loads(run_command(command).output.splitlines()[-1])
            if "left_out" in result:
                notes.append(f"{contestant} on {shape}: {result['left_out']}")
                continue
            note = f"MFU {result['mfu']:.1%}, peak {result['gigabytes']:.1f} GB"
            figures.append(Figure(shape, contestant, "tokens/s", [round(result["rate"], 1)], note))
    return finish(
        "gpu_training",
        figures,
        {shape: NANOGPT for shape in SHAPES},
        " ".join(["python", *sys.argv]),
        (),
        notes,
    )


def measure(contestant: str, shape: str, steps: int, nanogpt: Path | None) -> dict[str, float | str]:
    """Return tokens per second, MFU and peak memory of one contestant, or why it was skipped."""
    import torch

    from llm_trainer.config import ModelConfig
    from llm_trainer.model.flops import estimate_flops
    from llm_trainer.training.logging.throughput import peak_flops

    config, device = ModelConfig(**SHAPES[shape]), torch.device("cuda")
    if contestant == OURS_FP8:
        try:
            import torchao.float8  # noqa: F401
        except ImportError:
            return {"left_out": "torchao is not installed (pip install torchao)"}
    if contestant == NANOGPT and nanogpt is not None:
        step = _nanogpt(config, BATCH[shape], nanogpt)
    else:
        step = _ours(config, BATCH[shape], is_fp8=contestant == OURS_FP8)
    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    rate = steps * BATCH[shape] * config.max_position_embeddings / (time.perf_counter() - begun)
    peak = peak_flops(device, torch.bfloat16)[0]
    mfu = rate * estimate_flops(config, config.max_position_embeddings) / peak
    return {"rate": rate, "mfu": mfu, "gigabytes": torch.cuda.max_memory_allocated() / 1e9}


def _ours(config: object, sequences: int, *, is_fp8: bool) -> Callable[[], object]:
    import torch

    from llm_trainer.config import ModelConfig, TrainingConfig
    from llm_trainer.data.sampling.batch import Batch
    from llm_trainer.distributed.process_group import ProcessGroup
    from llm_trainer.model.transformer import Transformer
    from llm_trainer.training.engines.compile import compile_model
    from llm_trainer.training.engines.engine import build_engine

    assert isinstance(config, ModelConfig)
    device = torch.device("cuda")
    model = Transformer(config, torch.Generator().manual_seed(0)).train()
    if is_fp8:
        from torchao.float8 import convert_to_float8_training

        convert_to_float8_training(model, module_filter_fn=lambda module, name: name.startswith("blocks."))
    training = TrainingConfig(device="cuda", precision="bf16")
    engine = build_engine(model, training, None, ProcessGroup(), device)
    compile_model(engine.model, "blocks")
    engine.start("bf16", "blocks")
    ids = torch.randint(config.vocab_size, (sequences, config.max_position_embeddings + 1))
    batch = Batch(
        ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None, sequences * config.max_position_embeddings
    )
    return lambda: engine.step([batch], int(batch.num_supervised), lr_factor=1.0, index=0)


def _nanogpt(config: object, sequences: int, clone: Path) -> Callable[[], object]:
    import torch

    from llm_trainer.config import ModelConfig

    assert isinstance(config, ModelConfig)
    sys.path.insert(0, str(clone))
    from model import GPT, GPTConfig

    shape = GPTConfig(
        block_size=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        n_embd=config.hidden_size,
        dropout=0.0,
        bias=False,
    )
    torch.backends.cuda.matmul.allow_tf32 = True
    model = GPT(shape).cuda().train()
    optimizer = model.configure_optimizers(0.1, 3e-4, (0.9, 0.95), "cuda")
    compiled = torch.compile(model)
    ids = torch.randint(config.vocab_size, (sequences, config.max_position_embeddings + 1), device="cuda")
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            _, loss = compiled(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    sys.exit(main())
