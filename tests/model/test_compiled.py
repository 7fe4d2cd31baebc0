"""The model compiles as a whole and block by block, without graph breaks and once for all layers, with equal
results.
"""

import pytest
import torch
from model_shapes import SHAPES, small_config
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from llm_trainer.model.transformer import Transformer

IDS = torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(0))
DOCUMENTS = torch.tensor([[0] * 6 + [1] * 10] * 2)


def gradients(model: Transformer, autocast: bool, documents: torch.Tensor | None) -> list[torch.Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(IDS, document_ids=documents).float().logsumexp(-1).mean()
    loss.backward()
    return [
        loss.detach(),
        *(parameter.grad for parameter in model.parameters() if parameter.grad is not None),
    ]


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["unpacked", "packed"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", ["gpt2", "grouped", "qk_norm", "window", "post_norm_rms"])
def test_all_blocks_use_one_graph_without_breaks(shape, autocast, documents):
    torch.compiler.reset()
    model = Transformer(small_config(**SHAPES[shape], num_hidden_layers=5), torch.Generator().manual_seed(1))
    eager = gradients(model, autocast, documents)
    counter = CompileCounter()  # an "eager" backend that counts graphs
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True)
    for compiled, plain in zip(gradients(model, autocast, documents), eager, strict=True):
        torch.testing.assert_close(
            compiled, plain, atol=2e-2 if autocast else 1e-5, rtol=2e-2 if autocast else 1e-4
        )
    assert counter.frame_count == 1
    gradients(model, autocast, documents)
    assert counter.frame_count == 1


@pytest.mark.parametrize("shape", ["gpt2", "grouped", "squared"])
def test_the_whole_model_is_one_graph(shape):
    torch.compiler.reset()
    counters.clear()
    model = Transformer(small_config(**SHAPES[shape]), torch.Generator().manual_seed(1))
    eager = gradients(model, False, DOCUMENTS)
    counter = CompileCounter()
    model.compile(backend=counter, fullgraph=True)
    for compiled, plain in zip(gradients(model, False, DOCUMENTS), eager, strict=True):
        torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-4)
    assert counter.frame_count == 1


def test_a_budget_of_two_graphs_serves_ragged_lengths():
    torch.compiler.reset()
    model = Transformer(small_config(model_type="llama")).eval()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        for length in (16, 9, 30, 12, 41):
            torch.testing.assert_close(
                compiled(IDS[:1, :1].expand(1, length)),
                model(IDS[:1, :1].expand(1, length)),
                atol=1e-5,
                rtol=1e-5,
            )
    assert counter.frame_count == 2  # the first length, then any length


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["gpt2", "grouped"])
def test_compiled_code_computes_the_same(shape):
    torch.compiler.reset()
    model = Transformer(small_config(**SHAPES[shape]), torch.Generator().manual_seed(1))
    eager = gradients(model, False, None)
    model.compile()
    for compiled, plain in zip(gradients(model, False, None), eager, strict=True):
        torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-4)
