"""Device names are resolved in one place, and names that cannot be used are refused with what to do."""

import pytest
import torch

from llm_trainer.device import resolve_device
from llm_trainer.errors import UsageError


def test_auto_is_the_first_device_that_is_available() -> None:
    kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert resolve_device("auto").type == kind
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["xpu", "meta", "gpu", "cuda:x", "cpu:first", "no such"])
def test_an_unsupported_device_is_refused_with_the_supported_ones(name: str) -> None:
    with pytest.raises(UsageError, match=f"^device '{name}' is not supported; choose cpu, cuda or mps$"):
        resolve_device(name)


def test_a_device_that_this_machine_lacks_is_refused() -> None:
    with pytest.raises(UsageError, match=r"device 'cuda:99' is not available: PyTorch finds . CUDA devices"):
        resolve_device("cuda:99")
