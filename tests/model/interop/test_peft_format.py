"""Adapter folders are exchanged with peft in both directions with equal logits; folders that do not fit are
refused.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from model_shapes import small_config
from torch import Tensor

from llm_trainer.config import CheckpointError, UsageError
from llm_trainer.model.adapters.lora import is_adapter_parameter, remove_adapters
from llm_trainer.model.hf.checkpoint import load_pretrained, save_pretrained
from llm_trainer.model.interop.peft_format import load_adapter, save_adapter
from llm_trainer.model.transformer import Transformer

IDS = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(3))
SHAPES = {
    "gpt2": {"embedding_lora_rank": 2},
    "gpt2_untied": {"tie_word_embeddings": False, "embedding_lora_rank": 2, "head_lora_rank": 3},
    "llama": {"model_type": "llama", "num_key_value_heads": 2, "head_lora_rank": 3, "embedding_lora_rank": 2},
    "rslora": {"model_type": "llama", "use_rslora": True, "lora_alpha": 6.0},
}


def adapted(**changes: object) -> Transformer:
    settings = {"attn_lora_rank": 4, "mlp_lora_rank": 3, "lora_alpha": 5.0} | changes
    model = Transformer(small_config(**settings), torch.Generator().manual_seed(0)).eval()
    model.set_layer_lora_rank("attn.1", 6)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter_parameter(name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        found = model(IDS)
    return found if isinstance(found, Tensor) else found.logits


def with_base(model: Transformer, folder: Path) -> Path:
    """The plain model of an adapted one, saved."""
    save_pretrained(model, folder / "with")
    plain = load_pretrained(folder / "with")
    remove_adapters(plain, "default")
    save_pretrained(plain, folder / "base")
    return folder / "base"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_peft_computes_what_we_do_from_our_folder(shape: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = adapted(**SHAPES[shape])
    base = with_base(model, tmp_path)
    save_adapter(model, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"
    ).eval()
    assert (logits(model) - logits(load_pretrained(base))).abs().max() > 1e-2
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_adapter_folder_reads_back_to_the_bit(shape: str, tmp_path: Path) -> None:
    model = adapted(**SHAPES[shape])
    save_adapter(model, tmp_path / "adapter")
    read = load_pretrained(with_base(model, tmp_path))
    load_adapter(read, tmp_path / "adapter")
    assert torch.equal(logits(read), logits(model))
    assert {name for name, _ in read.named_parameters()} == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("shape", "target_modules"),
    [
        ({}, ["c_attn", "c_proj", "c_fc"]),
        ({"model_type": "llama"}, ["q_proj", "v_proj", "embed_tokens", "lm_head"]),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_we_compute_what_peft_does_from_its_folder(
    shape: dict[str, object], target_modules: list[str], tmp_path: Path
) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    save_pretrained(Transformer(small_config(**shape), torch.Generator().manual_seed(0)), tmp_path / "base")
    torch.manual_seed(0)
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=target_modules,
        rank_pattern={target_modules[1]: 2},
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), settings).eval()
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    ours = load_pretrained(tmp_path / "base")
    load_adapter(ours, tmp_path / "adapter", "theirs")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "initialization", ["gaussian", "eva", "orthogonal", "mica", "pissa", "pissa_niter_4", "olora"]
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_initializations_that_change_the_base_are_refused_and_all_others_are_loaded(
    initialization: str, tmp_path: Path
) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    save_pretrained(
        Transformer(small_config(model_type="llama"), torch.Generator().manual_seed(0)), tmp_path / "base"
    )
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=initialization)
    trained = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), settings)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if ".lora_" in name:
                parameter.add_(0.1)
    trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    ours = load_pretrained(tmp_path / "base")
    if initialization.startswith(("pissa", "olora")):
        with pytest.raises(
            CheckpointError,
            match=f"init_lora_weights = '{initialization}', which changes the weights under the adapter",
        ):
            load_adapter(ours, tmp_path / "adapter")
        return
    load_adapter(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    ).eval()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)


def test_an_adapter_that_does_not_fit_is_refused_with_the_reason(tmp_path: Path) -> None:
    model = adapted()
    save_adapter(model, tmp_path)
    with pytest.raises(CheckpointError, match="another base"):
        load_adapter(Transformer(small_config(num_hidden_layers=1)), tmp_path)
    with pytest.raises(CheckpointError, match="the matrix is 192 × 64"):
        load_adapter(Transformer(small_config(hidden_size=64)), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="use_dora"):
        load_adapter(Transformer(small_config()), tmp_path)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        load_adapter(Transformer(small_config()), tmp_path / "nowhere")
    with pytest.raises(UsageError, match="transformers has no class"):
        save_adapter(adapted(pre_norm=False), tmp_path / "other")


def test_an_adapter_of_the_head_alone_is_refused_for_a_tied_model(tmp_path: Path) -> None:
    save_adapter(adapted(tie_word_embeddings=False, head_lora_rank=2), tmp_path)
    with pytest.raises(CheckpointError, match="shares one matrix"):
        load_adapter(Transformer(small_config()), tmp_path)


@pytest.mark.parametrize(
    ("shape", "targets"),
    [
        ({"model_type": "llama"}, ["q_proj", "embed_tokens"]),
        ({"model_type": "llama"}, ["q_proj", "lm_head"]),
        ({}, ["c_attn", "lm_head"]),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_folder_with_the_base_embedding_is_read_where_it_is_the_base(
    shape: dict[str, object], targets: list[str], tmp_path: Path
) -> None:
    """peft saves the base embedding by default where the embedding or the head is adapted."""
    import peft
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    untied = {"tie_word_embeddings": False, **shape}
    save_pretrained(Transformer(small_config(**untied), torch.Generator().manual_seed(0)), tmp_path / "base")
    settings = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), settings).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(name for name in tensors if name.endswith("base_layer.weight"))
    ours = load_pretrained(tmp_path / "base")
    load_adapter(ours, tmp_path / "adapter")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    save_file({**tensors, key: tensors[key].to(torch.bfloat16)}, file)
    load_adapter(load_pretrained(tmp_path / "base"), tmp_path / "adapter")
    load_adapter(load_pretrained(tmp_path / "base", dtype=torch.bfloat16), tmp_path / "adapter")
    save_file({**tensors, key: tensors[key] + 0.01}, file)
    with pytest.raises(CheckpointError, match="with other values than this model has"):
        load_adapter(load_pretrained(tmp_path / "base"), tmp_path / "adapter")
    save_file({**tensors, key: torch.zeros(70, 32)}, file)
    with pytest.raises(CheckpointError, match="of the base with 70 × 32 values, but this model has 61 × 32"):
        load_adapter(load_pretrained(tmp_path / "base"), tmp_path / "adapter")
