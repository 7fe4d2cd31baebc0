"""Which tensor of a Hugging Face file holds which of our parameters.

Llama's files differ from ours in names only: each of our parameters is one of theirs. GPT-2's files keep
query, key and value in one matrix, and store matrices as (inputs, outputs), the transpose of `nn.Linear`.
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

# Buffers that older files have next to the weights: causal masks and rotary tables.
IGNORED_ENDINGS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


@dataclass(frozen=True)
class TensorMapping:
    """One tensor of a Hugging Face file and the parameters that it holds.

    The parameters `names` are concatenated along their outputs to the tensor `hf_name`, which is then
    transposed where `transposed`.
    """

    hf_name: str
    names: tuple[str, ...]
    transposed: bool = False

    def to_hf(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The file's tensor, made of our parameters by name."""
        tensors = [parameters[name].detach() for name in self.names]
        concatenated = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return (concatenated.T if self.transposed else concatenated).contiguous()

    def from_hf(self, tensor: Tensor) -> dict[str, Tensor]:
        """Our parameters by name, taken from the file's tensor."""
        ours = tensor.T if self.transposed and tensor.dim() == 2 else tensor
        return dict(zip(self.names, ours.tensor_split(len(self.names)), strict=True))

    def hf_shape(self, shapes: Mapping[str, torch.Size]) -> tuple[int, ...]:
        """The shape of the file's tensor for parameters of these shapes."""
        first = shapes[self.names[0]]
        concatenated = (sum(shapes[name][0] for name in self.names), *first[1:])
        return concatenated[::-1] if self.transposed else concatenated


def tensor_mappings(parameter_names: Iterable[str], family: str) -> list[TensorMapping]:
    """The tensors that a file has for some parameters.

    Args:
        parameter_names: Names of our parameters.
        family: `gpt2`, `llm_trainer` (our own names), or any of Llama's relatives.

    Returns:
        One mapping per tensor of the file.
    """
    mapping_for: dict[str, Callable[[str], TensorMapping | None]] = {
        "gpt2": _gpt2_mapping,
        "llm_trainer": lambda name: TensorMapping(name, (name,)),
    }
    found = (mapping_for.get(family, _llama_mapping)(name) for name in parameter_names)
    return [mapping for mapping in found if mapping is not None]


def _llama_mapping(name: str) -> TensorMapping:
    return TensorMapping(".".join(_LLAMA.get(piece, piece) for piece in name.split(".")), (name,))


def _gpt2_mapping(name: str) -> TensorMapping | None:
    *module, kind = name.split(".")
    prefix = ".".join(_GPT2.get(piece, piece) for piece in module)
    if module[-1] in _QKV:  # the mapping of q_proj covers all three
        names = tuple(".".join([*module[:-1], projection, kind]) for projection in _QKV)
        hf_name = f"{prefix.removesuffix(module[-1])}c_attn.{kind}"
        is_first = module[-1] == "q_proj"
        return TensorMapping(hf_name, names, transposed=kind == "weight") if is_first else None
    for ending, hf_ending in _GPT2_LINEARS.items():
        if prefix.endswith(ending):
            hf_name = f"{prefix.removesuffix(ending)}{hf_ending}.{kind}"
            return TensorMapping(hf_name, (name,), transposed=kind == "weight")
    return TensorMapping(f"{prefix}.{kind}", (name,))
