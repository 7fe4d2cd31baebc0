"""nanoGPT's checkpoints give the same logits here, and code in them is not run."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from model_shapes import small_config
from torch import nn

from llm_trainer.config import CheckpointError
from llm_trainer.model.interop.nanogpt_import import load_nanogpt

ARGUMENTS = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 48, "vocab_size": 61, "dropout": 0.0}


class NanoGPT(nn.Module):
    """nanoGPT's forward pass, written out from its published description, with its names of weights."""

    def __init__(self, bias: bool):
        super().__init__()
        width = ARGUMENTS["n_embd"]

        def block():
            return nn.ModuleDict(
                {
                    "ln_1": nn.LayerNorm(width, bias=bias),
                    "attn": nn.ModuleDict(
                        {"c_attn": nn.Linear(width, 3 * width, bias), "c_proj": nn.Linear(width, width, bias)}
                    ),
                    "ln_2": nn.LayerNorm(width, bias=bias),
                    "mlp": nn.ModuleDict(
                        {
                            "c_fc": nn.Linear(width, 4 * width, bias),
                            "c_proj": nn.Linear(4 * width, width, bias),
                        }
                    ),
                }
            )

        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(ARGUMENTS["vocab_size"], width),
                "wpe": nn.Embedding(ARGUMENTS["block_size"], width),
                "h": nn.ModuleList([block() for _ in range(ARGUMENTS["n_layer"])]),
                "ln_f": nn.LayerNorm(width, bias=bias),
            }
        )
        self.lm_head = nn.Linear(width, ARGUMENTS["vocab_size"], bias=False)
        self.lm_head.weight = self.transformer.wte.weight

    def forward(self, ids):
        x = self.transformer.wte(ids) + self.transformer.wpe(torch.arange(ids.size(1)))
        for block in self.transformer.h:
            q, k, v = block.attn.c_attn(block.ln_1(x)).split(ARGUMENTS["n_embd"], dim=2)
            heads = [part.unflatten(2, (ARGUMENTS["n_head"], -1)).transpose(1, 2) for part in (q, k, v)]
            attended = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
            x = x + block.attn.c_proj(attended)
            x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x))))
        return self.lm_head(self.transformer.ln_f(x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_logits_equal_nanogpts(bias, prefix, tmp_path):
    theirs = NanoGPT(bias).eval()
    weights = {f"{prefix}{name}": tensor for name, tensor in theirs.state_dict().items()}
    torch.save(
        {"model": weights, "model_args": {**ARGUMENTS, "bias": bias}, "iter_num": 7, "optimizer": {}},
        tmp_path / "ckpt.pt",
    )
    ours = load_nanogpt(tmp_path / "ckpt.pt")
    ids = torch.randint(0, 61, (2, 20))
    torch.testing.assert_close(ours(ids), theirs(ids), atol=1e-5, rtol=1e-5)


class Hostile:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (open, (str(self.canary), "w"))


@pytest.mark.parametrize(
    "save",
    [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))],
    ids=["torch", "pickle"],
)
def test_code_in_a_checkpoint_is_refused_and_does_not_run(save, tmp_path):
    canary = tmp_path / "canary"
    save({"model": {}, "model_args": Hostile(canary)}, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match=r"could run code|cannot be read"):
        load_nanogpt(tmp_path / "ckpt.pt")
    assert not canary.exists()


def test_a_truncated_file_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "ckpt.pt"
    torch.save({"model": NanoGPT(True).state_dict(), "model_args": ARGUMENTS}, path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(CheckpointError, match=r"ckpt\.pt"):
        load_nanogpt(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("model_args"), "not a nanoGPT checkpoint"),
        (lambda content: content["model_args"].pop("n_head"), "n_head"),
        (lambda content: content["model"].pop("transformer.ln_f.weight"), r"ln_f\.weight .*nothing"),
        (lambda content: content["model"].update({"adapter": torch.ones(1)}), "adapter"),
        (lambda content: content["model_args"].update(n_embd=64), r"\(61, 64\)"),
    ],
)
def test_the_error_names_what_does_not_fit(change, message, tmp_path):
    content = {"model": NanoGPT(True).state_dict(), "model_args": dict(ARGUMENTS)}
    change(content)
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match=message):
        load_nanogpt(tmp_path / "ckpt.pt")


def test_missing_biases_are_nanogpts_default_of_true(tmp_path):
    torch.save({"model": NanoGPT(True).state_dict(), "model_args": ARGUMENTS}, tmp_path / "ckpt.pt")
    assert load_nanogpt(tmp_path / "ckpt.pt").config.bias
    assert small_config().bias
