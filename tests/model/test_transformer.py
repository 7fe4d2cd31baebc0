"""Two ways to compute one thing agree: with and without cache, packed and alone, batched and alone, with and
without activation checkpointing.
"""

import math

import pytest
import torch
from model_shapes import SHAPES, small_config
from torch.nn.attention import SDPBackend, sdpa_kernel

from llm_trainer.config import ModelConfig, UsageError
from llm_trainer.model.kv_cache import KVCache
from llm_trainer.model.positional import positions_in_documents
from llm_trainer.model.transformer import Transformer

ROWS, LENGTH = 3, 20


def model_of(shape: str, **changes) -> Transformer:
    """A model whose weights, norms and biases too, are all away from zero and one."""
    generator = torch.Generator().manual_seed(5)
    model = Transformer(small_config(**{**SHAPES[shape], **changes}), generator)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def some_ids(rows: int = ROWS, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(6))


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "chunks", [[20], [1] * 20, [7, 1, 1, 5, 6]], ids=["at once", "one by one", "in chunks"]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_with_a_cache_equal_those_without(shape, chunks):
    model, ids = model_of(shape), some_ids()
    cache = KVCache(model.config, ROWS, LENGTH)
    outputs = [model(chunk, cache=cache) for chunk in ids.split(chunks, dim=1)]
    close(torch.cat(outputs, dim=1), model(ids))
    assert cache.length == LENGTH


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_different_lengths_decode_as_each_alone(shape):
    model, ids = model_of(shape), some_ids()
    lengths = torch.tensor([4, 9, 1])
    cache = KVCache(model.config, ROWS, LENGTH)
    longest = int(lengths.max())
    prefill = model(
        ids[:, :longest], cache=cache, positions=torch.arange(longest).expand(ROWS, -1)
    )  # what follows a short row is overwritten
    for row in range(ROWS):
        close(prefill[row, : lengths[row]], model(ids[row : row + 1, : lengths[row]])[0])
    for step in range(6):
        positions = (lengths + step)[:, None]
        logits = model(ids.gather(1, positions), cache=cache, positions=positions)
        for row in range(ROWS):
            close(logits[row, 0], model(ids[row : row + 1, : lengths[row] + step + 1])[0, -1])


def test_a_row_is_reused_without_clearing():
    model, ids = model_of("grouped"), some_ids()
    cache = KVCache(model.config, ROWS, LENGTH)
    model(ids, cache=cache)
    row = cache.row(1)
    fresh = some_ids(1, 6).flip(1)
    close(model(fresh, cache=row), model(fresh))
    positions = torch.tensor([[19], [6], [19]])
    following = model(ids[:, :1], cache=cache, positions=positions)
    close(following[1, 0], model(torch.cat((fresh, ids[1:2, :1]), dim=1))[0, -1])
    close(following[0, 0], model(torch.cat((ids[0:1, :19], ids[0:1, :1]), dim=1))[0, -1])


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_documents_do_not_see_each_other(shape):
    model, ids = model_of(shape), some_ids()
    documents = torch.tensor([[0] * 8 + [1] * 12, [4] * 1 + [7] * 18 + [2], [3] * 20])
    packed = model(ids, document_ids=documents)
    close(packed[0, :8], model(ids[0:1, :8])[0])
    close(packed[0, 8:], model(ids[0:1, 8:])[0])
    close(packed[1, 1:19], model(ids[1:2, 1:19])[0])
    close(packed[1, 19:], model(ids[1:2, 19:])[0])
    close(packed[2], model(ids[2:3])[0])


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_no_gradient_passes_between_packed_documents(shape):
    model = model_of(shape)
    grown = torch.zeros(1, LENGTH, 32, requires_grad=True)
    model.wte.register_forward_hook(lambda module, inputs, output: output + grown)
    model(some_ids(1), document_ids=torch.tensor([[0] * 8 + [1] * 12]))[0, 8:].sum().backward()
    assert grown.grad is not None
    assert grown.grad[0, :8].abs().max() == 0
    assert grown.grad[0, 8:].abs().min() > 0


@pytest.mark.parametrize(
    "backend",
    [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION],
)
def test_every_attention_kernel_masks_documents_or_is_refused(backend):
    model, ids = model_of("grouped"), some_ids(1)
    alone = model(ids[:, 8:])
    with sdpa_kernel(backend), torch.no_grad():
        try:
            packed = model(ids, document_ids=torch.tensor([[0] * 8 + [1] * 12]))
        except RuntimeError as error:
            assert "No available kernel" in str(error) or "No viable backend" in str(error)  # noqa: PT017 - refusing is right too
            return
    close(packed[:, 8:], alone)


def test_positions_restart_with_each_document():
    documents = torch.tensor([[5, 5, 5, 1, 1, 9], [0, 1, 2, 2, 2, 2]])
    assert positions_in_documents(documents).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 2, 3]]


def test_rotary_attention_sees_only_differences_of_positions():
    model, ids = model_of("llama"), some_ids()
    close(model(ids, positions=torch.arange(9, 9 + LENGTH).expand(ROWS, -1)), model(ids))


def test_a_token_sees_its_sliding_window_and_no_more():
    one_layer = model_of("window", num_hidden_layers=1)
    ids = some_ids(1)
    changed = ids.clone()
    changed[0, 10] = (ids[0, 10] + 1) % 61
    differs = (one_layer(ids) != one_layer(changed)).any(-1)[0].nonzero().flatten().tolist()
    assert differs == [10, 11, 12, 13, 14]


@pytest.mark.parametrize("shape", SHAPES)
def test_activation_checkpointing_gives_the_same_gradients(shape):
    plain, saving = (
        model_of(shape, dropout=0.1).train(),
        model_of(shape, dropout=0.1, gradient_checkpointing=True).train(),
    )
    ids = some_ids()
    for model in (plain, saving):
        torch.manual_seed(3)
        model(ids, document_ids=(torch.arange(LENGTH) // 7).expand(ROWS, -1)).logsumexp(-1).sum().backward()
    for (name, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name


def test_each_kind_of_dropout_applies_in_training_only():
    ids = some_ids()
    for kind in ("dropout", "attention_dropout", "embedding_dropout"):
        silent = {"dropout": 0.0, "attention_dropout": 0.0, "embedding_dropout": 0.0}
        model = model_of("gpt2", **{**silent, kind: 0.5})
        assert torch.equal(model(ids), model(ids))
        assert not torch.equal(model.train()(ids), model(ids)), kind


def test_sequences_of_one_token_get_attention_dropout():
    model = model_of("gpt2", attention_dropout=0.5).train()
    torch.manual_seed(0)
    assert not torch.equal(model(some_ids(64, 1))[:, 0], model_of("gpt2")(some_ids(64, 1))[:, 0])


def test_one_seed_gives_one_model_in_any_dtype():
    draw = lambda: torch.Generator().manual_seed(11)  # noqa: E731
    fp32 = Transformer(small_config(), draw())
    again = Transformer(small_config(), draw())
    half = Transformer(small_config()).to(torch.bfloat16)
    half.initialize(draw())
    for one, same, other in zip(fp32.parameters(), again.parameters(), half.parameters(), strict=True):
        assert torch.equal(one, same)
        assert torch.equal(one.to(torch.bfloat16), other)
    torch.manual_seed(1)
    assert not torch.equal(Transformer(small_config()).wte.weight, fp32.wte.weight)


def test_residual_outputs_start_smaller_with_depth_or_at_zero():
    wide = {"hidden_size": 128, "num_hidden_layers": 8}
    model = Transformer(small_config(**wide), torch.Generator().manual_seed(0))
    assert model.blocks[3].attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[3].mlp.down_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.05)
    assert model.blocks[3].attn.o_proj.bias.abs().max() == 0
    assert model.ln_f.weight.min() == model.ln_f.weight.max() == 1
    silent = Transformer(small_config(**wide, zero_init_outputs=True))
    assert (
        silent.blocks[3].mlp.down_proj.weight.abs().max()
        == silent.blocks[3].attn.o_proj.weight.abs().max()
        == 0
    )
    assert silent.blocks[3].mlp.up_proj.weight.abs().max() > 0


def test_logits_never_pass_the_soft_cap():
    model = model_of("gpt2", logit_soft_cap=2.0)
    model.lm_head.weight.data *= 100
    logits = model(some_ids())
    assert 1.9 < logits.abs().max() <= 2.0


@pytest.mark.parametrize("shape", ["gpt2", "grouped", "qk_norm"])
def test_bf16_autocast_stays_near_fp32_and_keeps_attention_in_bf16(shape):
    model, ids = model_of(shape), some_ids()
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention

    def watched(query, *rest, **more):
        seen.append(query.dtype)
        return original(query, *rest, **more)

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        patch.setattr("llm_trainer.model.attention.F.scaled_dot_product_attention", watched)
        half = model(ids, document_ids=(torch.arange(LENGTH) // 7).expand(ROWS, -1))
    assert set(seen) == {torch.bfloat16}
    full = model(ids, document_ids=(torch.arange(LENGTH) // 7).expand(ROWS, -1))
    assert (half.float() - full).abs().max() < 0.05 * full.abs().max()


def test_a_sequence_that_is_too_long_is_an_error_that_names_the_context():
    model = model_of("llama")
    with pytest.raises(UsageError, match=r"49 tokens .*48"):
        model(torch.zeros(1, 49, dtype=torch.long))
    with pytest.raises(UsageError, match=r"cache of 49 .*48"):
        KVCache(model.config, 1, 49)
    cache = KVCache(model.config, 1, 10)
    model(some_ids(1, 8), cache=cache)
    with pytest.raises(UsageError, match=r"11 tokens .*10"):
        model(some_ids(1, 3), cache=cache)
    with pytest.raises(UsageError, match=r"2 rows .*1"):
        model(some_ids(2, 1), cache=cache)


def test_grouped_heads_shrink_the_cache():
    full = KVCache(small_config(model_type="llama"), 2, 16).num_bytes
    grouped = KVCache(small_config(model_type="llama", num_key_value_heads=2), 2, 16).num_bytes
    assert full == 2 * grouped == 2 * 2 * 2 * 16 * 32 * 4


def test_a_model_on_the_meta_device_has_no_memory():
    with torch.device("meta"):
        model = Transformer(ModelConfig())
    assert model.wte.weight.is_meta
    assert model.lm_head.weight is model.wte.weight
