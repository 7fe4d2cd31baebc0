"""Every private part of PyTorch that `torch_compat` uses exists in the installed release and behaves as
expected.

A failure names the torch release and the function of `torch_compat` to adapt.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import llm_trainer
from llm_trainer import torch_compat


def mark_dynamic() -> None:
    tensor = torch.zeros(3, 2)
    torch_compat.mark_dynamic(tensor, 0)


def compiler_exceptions() -> None:
    assert all(issubclass(one, Exception) for one in torch_compat.compiler_exceptions())


def fake_tensor_mode() -> None:
    with torch_compat.fake_tensor_mode():
        tensor = torch.empty(10**9, 10**6)
        assert (tensor + 1).shape == (10**9, 10**6)
        assert tensor.device.type == "cpu"


def tree_leaves() -> None:
    assert torch_compat.tree_leaves([1, (2, {"a": 3})]) == [1, 2, 3]


class _Recorder(torch_compat.TorchDispatchMode):  # type: ignore[no-untyped-call, misc]
    """Records the operations that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def item_op() -> None:
    with _Recorder() as recorder:
        torch.ones(()).item()
    assert torch_compat.item_op() in recorder.seen


def fused_attention_ops() -> None:
    x = torch.randn(1, 2, 8, 4, requires_grad=True)
    with _Recorder() as recorder:
        nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
    assert torch_compat.fused_attention_ops() & set(recorder.seen)


def layer_norm_backward() -> None:
    x = torch.randn(5, 8, requires_grad=True)
    weight, gradient = torch.randn(8, requires_grad=True), torch.randn(5, 8)
    expected = torch.autograd.grad(nn.functional.layer_norm(x, (8,), weight), (x, weight), gradient)
    mean = x.detach().mean(-1, keepdim=True)
    scale = (x.detach().var(-1, keepdim=True, unbiased=False) + 1e-5).rsqrt()
    found = torch_compat.layer_norm_backward(gradient, x.detach(), mean, scale, weight.detach())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def has_forward_hooks() -> None:
    module = nn.Linear(1, 1)
    assert not torch_compat.has_forward_hooks(module)
    module.register_forward_hook(lambda *arguments: None)
    assert torch_compat.has_forward_hooks(module)
    other = nn.Linear(1, 1)
    other.register_forward_pre_hook(lambda *arguments: None)
    assert torch_compat.has_forward_hooks(other)


def wrapped_module() -> None:
    module = nn.Linear(1, 1)
    assert torch_compat.wrapped_module(torch.compile(module)) is module
    assert torch_compat.wrapped_module(module) is None


def strip_wrapper_names() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    (compiled,) = torch.compile(nn.Linear(1, 1, bias=False)).state_dict()
    assert compiled != "weight"
    assert torch_compat.strip_wrapper_names(compiled) == "weight"
    names = [name for name, _ in nn.Module.named_parameters(checkpoint_wrapper(nn.Linear(1, 1, bias=False)))]
    assert torch_compat.strip_wrapper_names(names[0]) == "weight"
    assert torch_compat.strip_wrapper_names("module.a._orig_mod.module_b.weight") == "a.module_b.weight"


def foreach_lerp_() -> None:
    tensors = [torch.zeros(2), torch.ones(3)]
    torch_compat.foreach_lerp_(tensors, [torch.ones(2), torch.zeros(3)], 0.25)
    assert [one.tolist() for one in tensors] == [[0.25, 0.25], [0.75, 0.75, 0.75]]


def foreach_lerp() -> None:
    (found,) = torch_compat.foreach_lerp([torch.zeros(2)], [torch.ones(2)], 0.25)
    assert found.tolist() == [0.25, 0.25]


def foreach_mul_() -> None:
    tensors = [torch.ones(2)]
    torch_compat.foreach_mul_(tensors, 3.0)
    assert tensors[0].tolist() == [3.0, 3.0]


def local_shard_offsets() -> None:
    from torch.distributed.tensor import DTensor

    assert hasattr(DTensor, "__create_chunk_list__")


def pack_int8_weight() -> None:
    assert torch_compat.pack_int8_weight(torch.ones(4, 8, dtype=torch.int8)) is not None


def int8_linear() -> None:
    weight = torch.arange(-16, 16, dtype=torch.int8).view(4, 8)
    x = torch.arange(16, dtype=torch.uint8).view(2, 8) + 120
    found: Tensor = torch_compat.int8_linear(
        x, 128, torch_compat.pack_int8_weight(weight), torch.ones(4), torch.zeros(4, dtype=torch.int32)
    )
    assert torch.equal(found, (x.float() - 128) @ weight.float().T)


CHECKS: list[Callable[[], None]] = [
    mark_dynamic, compiler_exceptions, fake_tensor_mode, tree_leaves, item_op, fused_attention_ops,
    layer_norm_backward, has_forward_hooks, wrapped_module, strip_wrapper_names, foreach_lerp_, foreach_lerp,
    foreach_mul_, local_shard_offsets, pack_int8_weight, int8_linear,
]  # fmt: skip
NEED_ONEDNN = ("pack_int8_weight", "int8_linear")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_private_part_works_in_this_torch_release(check: Callable[[], None]) -> None:
    if check.__name__ in NEED_ONEDNN and not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    try:
        check()
    except Exception as error:
        raise AssertionError(
            f"torch {torch.__version__} has changed the private part behind torch_compat.{check.__name__} "
            f"({type(error).__name__}: {error}); adapt that function"
        ) from error


def test_every_function_has_a_check() -> None:
    assert {check.__name__ for check in CHECKS} | {"TorchDispatchMode"} == set(torch_compat.__all__)


PRIVATE = (
    r"\btorch(\.\w+)*\._(?!_)\w+",  # torch._dynamo, torch.ops.aten._op, from torch.utils._pytree
    r"from torch[\w.]* import .*\b_[a-z]\w*",
    r"\._orig_mod\b|\._forward_(pre_)?hooks\b|\.__create_chunk_list__\b",
)


def test_no_other_module_uses_private_parts_of_torch() -> None:
    private = re.compile("|".join(PRIVATE))
    package = Path(llm_trainer.__file__).parent
    found = []
    for path in sorted(package.rglob("*.py")):
        if path.name == "torch_compat.py":
            continue
        source = re.sub(r'"""(?:.|\n)*?"""', "", path.read_text(encoding="utf-8"))
        code = re.sub(r"#.*", "", source)
        found += [f"{path.relative_to(package)}: {match.group(0)}" for match in private.finditer(code)]
    assert found == [], "move these to llm_trainer/torch_compat.py"
