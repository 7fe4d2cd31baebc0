"""What this machine does fastest over the steps that remain: `precision: auto` and `compile: auto`.

Which arithmetic and whether to compile depend on the processor, the shape and the length of the run, so they
are measured: forward and backward passes of real batches at the place where the run stands, whose gradients
are thrown away. Weights, optimizer and data order do not notice. What is chosen goes into the checkpoint, and
a resumed run keeps it.

A probe must not cost what it could gain. On a processor whose bf16 products are no faster than fp32 nothing
more is asked; a probe takes rows enough for a fraction of a second; and a run too short to win back a
compilation is not offered one. How long a compilation takes and what it gained is remembered beside the
compiler's own cache (`memory`), so that the second run of a shape knows what the first had to find out.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import torch

from llm_trainer.config import TrainingConfig
from llm_trainer.data.sampling.samplers import Batch
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.engines.compile import (
    CompileMode,
    best_mode,
    compile_model,
    has_compiler,
    uncompiled,
    undo_compile,
)
from llm_trainer.training.engines.precision import Precision, PrecisionName
from llm_trainer.training.objectives.objective import TrainingStep

LEAST_SECONDS, MOST_SECONDS = 0.5, 3.0  # what a probe may cost
MEMORY_FILE = "compiled_shapes.json"

_BF16_MUST_BE = 1.1  # times as fast as fp32 to be chosen: it rounds more
_COMPILED_MUST_BE = 1.03
_HOPED_GAIN = {"cpu": 0.15, "cuda": 0.3}
_COLD_SECONDS = 25.0  # a compilation with nothing cached
_WARM_SECONDS = 4.0  # importing the compiler and finding everything in its cache


@dataclass(frozen=True)
class Choice:
    """What was chosen, and a line that says why (none where nothing was left to choose)."""

    precision: PrecisionName
    compile: CompileMode
    reason: str | None = None


@dataclass(frozen=True)
class Remembered:
    """A compilation of this shape on this machine: seconds a micro-batch without and with it, and seconds it
    took at last.
    """

    eager: float
    compiled: float
    took: float


@dataclass
class Probe:
    """Measures micro-batches of a run at the place where it stands."""

    model: Transformer
    step: TrainingStep
    batch: Batch  # the next micro-batch
    device: torch.device
    micro_batches_left: int
    rows: int = 0

    def seconds(self, precision: PrecisionName, times: int = 2) -> float:
        """The best of so many forward and backward passes over the probe's rows; the first, which sets things
        up, is not counted.
        """
        if self.rows == 0:
            self.rows = self._affordable_rows(precision)
        self._once(precision, self.rows)
        return min(self._once(precision, self.rows) for _ in range(times))

    @property
    def share(self) -> float:
        """The share of a micro-batch that is measured."""
        return self.rows / len(self.batch)

    def _affordable_rows(self, precision: PrecisionName) -> int:
        """Rows for which six passes take a hundredth of the run, but at least half a second and at most
        three.
        """
        self._once(precision, 1)
        one, rows = self._once(precision, 1), len(self.batch)
        budget = min(max(one * rows * self.micro_batches_left / 100, LEAST_SECONDS), MOST_SECONDS)
        # One row alone takes longer than its share of a batch, so a batch that might just do is tried.
        return rows if one * rows <= budget / 2 else max(1, min(rows, int(budget / 6 / one)))

    def _once(self, name: PrecisionName, rows: int) -> float:
        batch = self.batch.first(rows).to(self.device)
        precision = Precision(name, self.device)
        _wait(self.device)
        start = time.perf_counter()
        with precision.autocast():
            loss = self.step(batch)
        loss.total.backward()
        _wait(self.device)
        seconds = time.perf_counter() - start
        self.model.zero_grad(set_to_none=True)
        return seconds


def choose(
    probe: Probe,
    training: TrainingConfig,
    *,
    precision: str | None = None,
    compiled: str | None = None,
    memory: Path | None = None,
    say: Callable[[str], None] = print,
) -> Choice:
    """Settle precision and compilation for the rest of a run and leave the model compiled or not,
    accordingly.

    `precision` and `compiled`: what the checkpoint of a resumed run says, which holds. `memory`: folder that keeps what was learned.
    The model's weights and gradients are as before.
    """
    reasons: list[str] = []
    name = cast(PrecisionName, precision or training.precision)
    measured: float | None = None
    if precision is None and training.precision == "auto":
        name, measured, why = _choose_precision(probe)
        reasons.append(why)
    said = compiled or training.compile
    if said == "auto":
        mode, why = _choose_compile(probe, name, measured, memory)
    else:
        mode, why = _obey_compile(probe, name, said)
    if why:
        reasons.append(why)
    if reasons:
        say(f"{name}, compilation {'off' if mode == 'off' else f'on ({mode})'}: {'; '.join(reasons)}")
    return Choice(name, mode, "; ".join(reasons) or None)


def _choose_precision(probe: Probe) -> tuple[PrecisionName, float | None, str]:
    """The precision, seconds of a whole micro-batch in it where they were measured, and why."""
    if probe.device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", None, "this GPU has bf16 tensor cores"
        return "fp16", None, "this GPU has no bf16"
    if probe.device.type != "cpu":
        return "fp32", None, f"{probe.device.type} trains in fp32"
    if (ratio := _bf16_products_ratio()) < _BF16_MUST_BE:
        return "fp32", None, f"this processor multiplies bf16 {ratio:.1f} × as fast as fp32"
    if probe.micro_batches_left < 20:
        return "bf16", None, f"this processor multiplies bf16 {ratio:.1f} × as fast as fp32"
    narrow, wide = probe.seconds("bf16"), probe.seconds("fp32")
    name: PrecisionName = "bf16" if wide > _BF16_MUST_BE * narrow else "fp32"
    return (
        name,
        min(narrow, wide) / probe.share,
        f"a micro-batch takes {_ms(narrow)} in bf16, {_ms(wide)} in fp32{_of(probe)}",
    )


def _choose_compile(
    probe: Probe, name: PrecisionName, measured: float | None, memory: Path | None
) -> tuple[CompileMode, str]:
    if not has_compiler():
        return "off", "there is no C++ compiler (install g++ to compile)"
    mode = best_mode(probe.model, probe.batch.input_ids.numel())
    key = _shape_key(probe, name, mode)
    known = _recall(memory, key)
    eager = measured if measured is not None else probe.seconds(name) / probe.share
    left = eager * probe.micro_batches_left
    if known is not None:
        gain, cost = left * (1 - known.compiled / known.eager), min(known.took, _WARM_SECONDS)
        told = f"compiled it is {known.eager / known.compiled:.2f} × as fast, as an earlier run found"
    else:
        hope = _HOPED_GAIN.get(probe.device.type, 0.0)
        gain, cost = left * hope / 2, _COLD_SECONDS
        told = f"compiling takes about {_COLD_SECONDS:.0f} s"
    if gain <= cost:
        return "off", f"{told}, and about {left:.0f} s of training are left"
    return _try_compiling(probe, name, mode, memory, key, known)


def _try_compiling(
    probe: Probe,
    name: PrecisionName,
    mode: CompileMode,
    memory: Path | None,
    key: str,
    known: Remembered | None,
) -> tuple[CompileMode, str]:
    """Compile; where it is not known which is faster, compare with the same micro-batch uncompiled and keep
    the faster.
    """
    probe.rows = len(probe.batch)  # a compiled graph is for one shape: the run's
    start = time.perf_counter()
    if (failure := _compile(probe, name, mode)) is not None:
        return "off", failure
    took = time.perf_counter() - start
    if known is not None:
        _remember(memory, key, replace(known, took=took))
        return (
            mode,
            f"{known.eager / known.compiled:.2f} × as fast as without, as an earlier run found; ready after {took:.1f} s",
        )
    compiled = probe.seconds(name)
    with uncompiled(mode):
        eager = probe.seconds(name)
    _remember(memory, key, Remembered(eager, compiled, took))
    told = f"a micro-batch takes {_ms(compiled)} compiled, {_ms(eager)} not; compiling took {took:.1f} s"
    if eager > _COMPILED_MUST_BE * compiled:
        return mode, told
    undo_compile(probe.model)
    return "off", told


def _obey_compile(probe: Probe, name: PrecisionName, said: str) -> tuple[CompileMode, str]:
    """What the settings or the checkpoint say, as far as this machine can."""
    if said == "off":
        return "off", ""
    if not has_compiler():
        return "off", "there is no C++ compiler (install g++ to compile)"
    mode = best_mode(probe.model, probe.batch.input_ids.numel()) if said == "on" else cast(CompileMode, said)
    probe.rows = len(probe.batch)
    failure = _compile(probe, name, mode)
    return ("off", failure) if failure is not None else (mode, "")


def _compile(probe: Probe, name: PrecisionName, mode: CompileMode) -> str | None:
    """Compile and run once; what went wrong, or None."""
    from torch._dynamo.exc import TorchDynamoException

    compile_model(probe.model, mode)
    try:
        probe.seconds(name, times=1)
    except (TorchDynamoException, OSError) as error:
        undo_compile(probe.model)
        probe.model.zero_grad(set_to_none=True)
        return f"compiling failed ({str(error).strip().splitlines()[0][:200]})"
    return None


def _bf16_products_ratio(size: int = 512) -> float:
    """How many times as fast a product of size² matrices is in bf16."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left = torch.ones(size, size, dtype=dtype)
        best = float("inf")
        for _ in range(4):  # the first sets the library up
            start = time.perf_counter()
            left @ left
            best = min(best, time.perf_counter() - start)
        seconds[dtype] = best
    return seconds[torch.float32] / seconds[torch.bfloat16]


def _shape_key(probe: Probe, name: PrecisionName, mode: CompileMode) -> str:
    """What a compilation depends on."""
    device = (
        torch.cuda.get_device_name(probe.device)
        if probe.device.type == "cuda"
        else torch.backends.cpu.get_cpu_capability()
    )
    facts = [
        torch.__version__, device, torch.get_num_threads(), name, mode, list(probe.batch.input_ids.shape),
        probe.batch.document_ids is not None, probe.model.config.model_dump(mode="json"),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]


def _recall(memory: Path | None, key: str) -> Remembered | None:
    stored = _read_memory(memory).get(key)
    try:
        return None if stored is None else Remembered(**stored)
    except TypeError:  # another version's
        return None


def _remember(memory: Path | None, key: str, what: Remembered) -> None:
    if memory is None:
        return
    try:
        memory.mkdir(parents=True, exist_ok=True)
        temporary = memory / f".{MEMORY_FILE}"
        temporary.write_text(
            json.dumps({**_read_memory(memory), key: asdict(what)}, indent=1), encoding="utf-8"
        )
        temporary.replace(memory / MEMORY_FILE)
    except OSError:
        return  # a cache that cannot be written costs the next run a measurement, no more


def _read_memory(memory: Path | None) -> dict[str, dict[str, float]]:
    if memory is None:
        return {}
    try:
        return cast(
            "dict[str, dict[str, float]]", json.loads((memory / MEMORY_FILE).read_text(encoding="utf-8"))
        )
    except (OSError, ValueError):
        return {}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.1f} ms"


def _of(probe: Probe) -> str:
    return "" if probe.rows == len(probe.batch) else f" ({probe.rows} of its {len(probe.batch)} rows)"
