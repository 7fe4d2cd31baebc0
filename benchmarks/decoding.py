"""Greedy decoding of one sequence, compared with transformers' `generate` on the same random weights,
alternating in one process.

The shape is Llama-like with 56 M parameters: vocabulary 32000, width 512, 8 layers, 8 heads, 4 key-value
heads, MLP width 1408; 32 prompt tokens, 128 new tokens. We write the weights with `save_pretrained`, and
transformers opens that folder with `AutoModelForCausalLM`. A time covers the complete call, prompt
included. In fp32 all ids must be equal, otherwise the benchmark fails.

    python benchmarks/decoding.py [--rounds 7] [--precisions fp32,bf16] [--quick]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import Figure, Target, alternate, finish, report_load

from llm_trainer.config.schema.generation import GenerationConfig
from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.inference.engine import LanguageModel
from llm_trainer.inference.load_model import DTYPES
from llm_trainer.model.hf.checkpoint import load_pretrained, save_pretrained
from llm_trainer.model.transformer import Transformer

PROMPT_TOKENS = 32
SHAPE = ModelConfig(
    model_type="llama",
    vocab_size=32000,
    hidden_size=512,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    intermediate_size=1408,
    max_position_embeddings=2048,
)

Generate = Callable[[list[int], int], list[int]]  # prompt, number of tokens → the new ids


def main() -> int:
    """Measure, print and write the results; return 1 if ids differ in fp32."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("--quick", action="store_true", help="nothing is compiled")
    options = parser.parse_args()
    figures: list[Figure] = []
    differ, load = False, report_load()
    print(load)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(Transformer(SHAPE, torch.Generator().manual_seed(0)), folder)
        for precision in options.precisions.split(","):
            contestants = build(Path(folder), DTYPES[precision], compiled=not options.quick)
            ids = {
                name: generate(_prompt(), options.new_tokens) for name, generate in contestants.items()
            }  # also the warm-up
            unequal = [name for name, own in ids.items() if own != ids["transformers"]]
            differ |= bool(unequal) and precision == "fp32"
            timed = {name: _timer(generate, options.new_tokens) for name, generate in contestants.items()}
            for name, rounds in alternate(timed, options.rounds).items():
                note = "other ids than transformers" if name in unequal else "same ids"
                figures.append(
                    Figure(
                        f"{precision}, 1 sequence",
                        name,
                        "tokens/s",
                        rounds,
                        "" if name == "transformers" else note,
                    )
                )
    baselines = {figure.work: "transformers" for figure in figures}
    status = finish("decoding", figures, baselines, " ".join(["python", *sys.argv]), targets(figures), [load])
    if differ:
        print("The ids differ in fp32: one of the two is wrong.", file=sys.stderr)
    return 1 if differ else status


def targets(figures: list[Figure]) -> list[Target]:
    """Compare our best result with the peer's best, for each precision."""
    found = []
    for work in dict.fromkeys(figure.work for figure in figures):
        medians = {figure.contestant: figure.median for figure in figures if figure.work == work}
        ours = max(median for name, median in medians.items() if name.startswith("ours"))
        default = medians["transformers"]
        found.append(
            Target(
                f"decoding, {work}, ours at best ÷ transformers' generate",
                ours / default,
                2.5 if "bf16" in work else 2.0,
            )
        )
    return found


def build(folder: Path, dtype: torch.dtype, compiled: bool) -> dict[str, Generate]:
    """Return all contestants by name."""
    contestants = {
        "transformers": _transformers(folder, dtype, static=False),
        "ours": _ours(folder, dtype, "off"),
    }
    if compiled:
        contestants["transformers, static cache, compiled"] = _transformers(folder, dtype, static=True)
        contestants["ours, compiled"] = _ours(folder, dtype, "on")
    return contestants


def _ours(folder: Path, dtype: torch.dtype, compile: str) -> Generate:
    model = LanguageModel(load_pretrained(folder, dtype=dtype), compile=compile)

    def generate(prompt: list[int], count: int) -> list[int]:
        return model.generate_ids([prompt], GenerationConfig(temperature=0, max_new_tokens=count))[0].ids

    return generate


def _transformers(folder: Path, dtype: torch.dtype, static: bool) -> Generate:
    from transformers import AutoModelForCausalLM, CompileConfig

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    best: dict[str, object] = {}
    if static:
        compiling = CompileConfig(mode="default")
        compiling._compile_all_devices = True  # without it nothing is compiled on a CPU
        best = {"cache_implementation": "static", "compile_config": compiling}

    @torch.inference_mode()
    def generate(prompt: list[int], count: int) -> list[int]:
        inputs = torch.tensor([prompt])
        made = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            **best,
        )
        return made[0, len(prompt) :].tolist()

    return generate


def _timer(generate: Generate, count: int) -> Callable[[], float]:
    def tokens_per_second() -> float:
        begun = time.perf_counter()
        generate(_prompt(), count)
        return count / (time.perf_counter() - begun)

    return tokens_per_second


def _prompt() -> list[int]:
    return torch.randint(
        SHAPE.vocab_size, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(1)
    ).tolist()


if __name__ == "__main__":
    sys.exit(main())
