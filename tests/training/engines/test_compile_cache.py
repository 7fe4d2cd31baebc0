"""A compile cache that a killed process left with broken libraries is repaired."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tiny_run import SHAPE, tiny_model

from llm_trainer.config import ModelConfig
from llm_trainer.training.engines import compile as compiling
from llm_trainer.training.engines.compile import (
    compile_model,
    has_compiler,
    remove_broken_libraries,
    undo_compile,
)

LIBRARY = next(Path(torch.__file__).parent.glob("_C.*.so"), None)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(compiling, "_LINKING_SECONDS", 0.0)
    (tmp_path / "ab").mkdir()
    return tmp_path


@pytest.mark.skipif(sys.platform != "linux" or LIBRARY is None, reason="checks ELF files")
@pytest.mark.parametrize("kept", [0, 3, 40, 64, 0.5])
def test_a_library_that_was_cut_short_is_removed_and_an_intact_one_stays(cache: Path, kept: float) -> None:
    assert LIBRARY is not None
    content = LIBRARY.read_bytes()
    length = int(kept * len(content)) if kept < 1 else int(kept)
    intact, cut = cache / "ab" / "intact.main.so", cache / "ab" / "cut.main.so"
    intact.write_bytes(content)
    cut.write_bytes(content[:length])
    assert remove_broken_libraries(cache) == [cut]
    assert intact.exists()
    assert not cut.exists()


def test_a_cache_that_does_not_exist_has_nothing_broken(tmp_path: Path) -> None:
    assert remove_broken_libraries(tmp_path / "none") == []


def test_libraries_of_other_formats_are_left_alone(cache: Path) -> None:
    (cache / "ab" / "mac.so").write_bytes(b"\xcf\xfa\xed\xfe" + bytes(60))
    assert remove_broken_libraries(cache) == []


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler")
def test_a_model_compiles_again_after_its_compilation_was_killed(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
    ids = torch.zeros(2, 8, dtype=torch.long)
    model = tiny_model(ModelConfig(**SHAPE)).eval()
    expected = model(ids)

    def compiled() -> torch.Tensor:
        torch.compiler.reset()
        undo_compile(model)
        compile_model(model, "blocks")
        return model(ids)

    torch.testing.assert_close(compiled(), expected)
    libraries = list(cache.rglob("*.so"))
    assert libraries
    for library in libraries:
        library.unlink()  # not truncated: this process has mapped it
        library.touch()
    torch.testing.assert_close(compiled(), expected)
    assert all(library.stat().st_size > 0 for library in cache.rglob("*.so"))
