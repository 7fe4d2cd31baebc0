"""Which tensor of a Hugging Face file holds which of our parameters.

Llama's files and ours differ in names only: each of our parameters is one of theirs. GPT-2's files keep
query, key and value in one matrix, and matrices as (inputs, outputs), the other way round from `nn.Linear`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_LLAMA = {
    "wte": "model.embed_tokens",
    "ln_f": "model.norm",
    "blocks": "model.layers",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn": "self_attn",
}
_GPT2 = {
    "wte": "transformer.wte",
    "wpe": "transformer.wpe",
    "ln_f": "transformer.ln_f",
    "blocks": "transformer.h",
}
_GPT2_LINEARS = {"attn.o_proj": "attn.c_proj", "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"}
_QKV = ("q_proj", "k_proj", "v_proj")

# Buffers that older files carry beside the weights: causal masks and rotary tables.
IGNORED_ENDINGS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


@dataclass(frozen=True)
class Entry:
    """One tensor of theirs: our parameters stacked along the outputs, and then turned over where
    `transposed`.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False

    def join(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Theirs from ours."""
        tensors = [parameters[name].detach() for name in self.ours]
        joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return (joined.T if self.transposed else joined).contiguous()

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """Ours from theirs."""
        turned = tensor.T if self.transposed and tensor.dim() == 2 else tensor
        return dict(zip(self.ours, turned.tensor_split(len(self.ours)), strict=True))

    def shape(self, shape_of: Mapping[str, torch.Size]) -> tuple[int, ...]:
        """The shape that theirs must have for ours to have theirs."""
        first = shape_of[self.ours[0]]
        stacked = (sum(shape_of[name][0] for name in self.ours), *first[1:])
        return stacked[::-1] if self.transposed else stacked


def entries(parameter_names: Iterable[str], family: str) -> list[Entry]:
    """The tensors that a file of this family (`gpt2`, `llm_trainer`, or any of Llama's relatives) has for
    these parameters.
    """
    name_for: dict[str, Callable[[str], Entry | None]] = {
        "gpt2": _gpt2_entry,
        "llm_trainer": lambda name: Entry(name, (name,)),
    }
    found = (name_for.get(family, _llama_entry)(name) for name in parameter_names)
    return [entry for entry in found if entry is not None]


def _llama_entry(name: str) -> Entry:
    return Entry(".".join(_LLAMA.get(piece, piece) for piece in name.split(".")), (name,))


def _gpt2_entry(name: str) -> Entry | None:
    *place, kind = name.split(".")
    prefix = ".".join(_GPT2.get(piece, piece) for piece in place)
    if place[-1] in _QKV:  # all three come with the query's
        ours = tuple(".".join([*place[:-1], projection, kind]) for projection in _QKV)
        theirs = f"{prefix.removesuffix(place[-1])}c_attn.{kind}"
        return Entry(theirs, ours, transposed=kind == "weight") if place[-1] == "q_proj" else None
    for ours_ending, theirs_ending in _GPT2_LINEARS.items():
        if prefix.endswith(ours_ending):
            return Entry(
                f"{prefix.removesuffix(ours_ending)}{theirs_ending}.{kind}",
                (name,),
                transposed=kind == "weight",
            )
    return Entry(f"{prefix}.{kind}", (name,))
