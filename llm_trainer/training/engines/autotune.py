"""Precision and compilation of a run: as set, as a checkpoint stores them, or chosen (`auto`).
 `auto` is a function of the hardware, the model's shape and the settings alone. The same command therefore
gives the same weights, however busy the machine is, and a resumed run computes as the run before it. The
rules come from measurements (benchmarks/training_throughput.py):

- On a GPU: bf16 where it has bf16 tensor cores, else fp16.
- On a CPU: bf16 where the processor has instructions for bf16 products and the model is at least
  `BF16_MIN_WIDTH` wide (1.2 times as fast as fp32 at width 128, 2.9 times at 384, on a Xeon with AMX).
  Narrower models were not measured and stay in fp32.
- Compilation where it is expected to save more time over the steps that remain than it costs.

With `autotune: true` the choice is measured instead: forward and backward passes of the run's next batches,
whose gradients are thrown away. That can be faster on hardware for which the rules are wrong, but two runs of
one command may then choose differently. What a compilation cost and gained is kept next to the compiler's own
cache, so that the next run of the same shape need not measure it again. What was chosen is stored in the
checkpoint, and a resumed run keeps it either way.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import torch

from llm_trainer.config import ModelConfig, TrainingConfig, UsageError
from llm_trainer.cpu_features import multiplies_bf16
from llm_trainer.data.sampling.batch import Batch
from llm_trainer.model.flops import estimate_flops
from llm_trainer.model.transformer import Transformer
from llm_trainer.torch_compat import compiler_exceptions
from llm_trainer.training.engines.compile import (
    CompileMode,
    best_mode,
    compile_model,
    has_compiler,
    uncompiled,
    undo_compile,
)
from llm_trainer.training.engines.out_of_memory import is_out_of_memory
from llm_trainer.training.engines.precision import Precision, PrecisionName
from llm_trainer.training.objectives.objective import ModelWithObjective

BF16_MIN_WIDTH = 128
MIN_PROBE_SECONDS, MAX_PROBE_SECONDS = 0.5, 3.0
CACHE_FILE = "compiled_shapes.json"

_BF16_MIN_SPEEDUP = 1.1  # measured: bf16 rounds more, so it has to be worth it
_COMPILED_MIN_SPEEDUP = 1.03
_EXPECTED_GAIN = {"cpu": 0.15, "cuda": 0.3}  # of a step's time, by compiling
_COLD_SECONDS = 25.0  # a compilation with nothing cached
_WARM_SECONDS = 4.0  # importing the compiler and finding everything in its cache
# Training arithmetic that a thread, or a GPU, is assumed to do per second, to estimate what is left of a run.
_ASSUMED_FLOPS = {
    ("cpu", "fp32"): 1e11,
    ("cpu", "bf16"): 3e11,
    ("cuda", "bf16"): 1e14,
    ("cuda", "fp16"): 5e13,
}
_OTHER_FLOPS = 1e13
_NO_COMPILER = "there is no C++ compiler (install g++ to compile)"


@dataclass(frozen=True)
class TuneResult:
    """What was chosen.

    Attributes:
        precision: Precision of the forward pass.
        compile: How the model is compiled.
        reason: Why, in words; None where nothing was left to choose.
    """

    precision: PrecisionName
    compile: CompileMode
    reason: str | None = None

    def __str__(self) -> str:
        compiled = "off" if self.compile == "off" else f"on ({self.compile})"
        return f"precision {self.precision}, compilation {compiled}" + (
            f": {self.reason}" if self.reason else ""
        )


@dataclass(frozen=True)
class WorkLeft:
    """What is left of a run on one rank.

    Attributes:
        micro_batches: Forward and backward passes.
        tokens: Tokens in each.
        context: Tokens in a sequence.
    """

    micro_batches: int
    tokens: int
    context: int

    def seconds(self, config: ModelConfig, device: torch.device, precision: PrecisionName) -> float:
        """A rough time for it, from the arithmetic and assumed speeds: the same on every call."""
        flops = estimate_flops(config, self.context) * self.tokens * self.micro_batches
        rate = _ASSUMED_FLOPS.get((device.type, precision), _OTHER_FLOPS)
        return flops / (rate * torch.get_num_threads() if device.type == "cpu" else rate)


def choose(
    model: Transformer,
    training: TrainingConfig,
    device: torch.device,
    work: WorkLeft,
    *,
    precision: str | None = None,
    compiled: str | None = None,
) -> TuneResult:
    """Choose precision and compilation by the rules above. Changes nothing.

    Args:
        model: The model to train.
        training: Its settings (`precision`, `compile`).
        device: Where it trains.
        work: What is left of the run.
        precision: The precision that a checkpoint stores, which takes effect.
        compiled: The compile mode that a checkpoint stores, likewise.

    Returns:
        The choice, and why.

    Raises:
        UsageError: `compile` is on, and this machine cannot compile.
    """
    reasons: list[str] = []
    name = cast(PrecisionName, precision or training.precision)
    if name == cast(object, "auto"):
        name, why = auto_precision(model.config, device)
        reasons.append(why)
    setting = compiled or training.compile
    if setting == "auto" and has_compiler():
        mode, why = _auto_compile(model, device, work, name)
        reasons.append(why)
    else:
        mode, no_compiler = _set_compile(setting, training, model, work.tokens)
        reasons += no_compiler
    return TuneResult(name, mode, "; ".join(reasons) or None)


def _set_compile(
    setting: str, training: TrainingConfig, model: Transformer, tokens: int
) -> tuple[CompileMode, list[str]]:
    """The compile mode where nothing is to be chosen: the setting is not `auto`, or there is no compiler.
    With it, the reason, if any. Raises UsageError if `compile` is on and there is no compiler.
    """
    if setting != "off" and not has_compiler():
        if training.compile == "on":
            raise UsageError(
                f"compile is on, but {_NO_COMPILER}; use --compile auto or off to train without it"
            )
        return "off", [_NO_COMPILER]
    return best_mode(model, tokens) if setting == "on" else cast(CompileMode, setting), []


def auto_precision(config: ModelConfig, device: torch.device) -> tuple[PrecisionName, str]:
    """The precision that `precision: auto` means.

    Args:
        config: The model's shape.
        device: Where it trains.

    Returns:
        The precision, and why.
    """
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU has bf16 tensor cores"
        return "fp16", "this GPU has no bf16"
    if device.type != "cpu":
        return "fp32", f"{device.type} trains in fp32"
    if not multiplies_bf16():
        return "fp32", "this processor has no instructions for bf16 products"
    if config.hidden_size < BF16_MIN_WIDTH:
        return "fp32", f"the model is narrower than {BF16_MIN_WIDTH}"
    return "bf16", "this processor has instructions for bf16 products"


def apply_choice(probe: Probe, choice: TuneResult, setting: str) -> TuneResult:
    """Compile the model as chosen and run one micro-batch, so that a compiler that fails is found out now.

    Args:
        probe: Runs the micro-batch; its gradients are thrown away.
        choice: What to compile.
        setting: The setting `compile`, of which only `auto` may end without compilation.

    Returns:
        `choice`, or the same without compilation where compiling failed.

    Raises:
        UsageError: Compiling failed, and the setting is `on`.
    """
    if choice.compile == "off":
        return choice
    probe.rows = len(probe.batch)  # a compiled graph is for one shape: the run's
    if (failure := _compile(probe, choice.precision, choice.compile)) is None:
        return choice
    if setting == "on":
        raise UsageError(f"{failure}, and compile is on; use --compile auto or off to train without it")
    return TuneResult(choice.precision, "off", "; ".join(filter(None, [choice.reason, failure])))


def _auto_compile(
    model: Transformer, device: torch.device, work: WorkLeft, precision: PrecisionName
) -> tuple[CompileMode, str]:
    left = work.seconds(model.config, device, precision)
    # Half of the gain that is hoped for: it is a guess.
    if left * _EXPECTED_GAIN.get(device.type, 0.0) / 2 <= _COLD_SECONDS:
        return (
            "off",
            f"compiling takes about {_COLD_SECONDS:.0f} s, which a run of about {left:.0f} s does not win "
            "back",
        )
    return best_mode(
        model, work.tokens
    ), f"about {left / 60:.0f} minutes of training win the compilation back"


# Measured choices: `autotune: true`.


@dataclass
class Probe:
    """Runs micro-batches of a run at its present position. Weights and gradients are as before afterwards.

    Attributes:
        model: The model to train.
        step: Model and objective.
        batch: The next micro-batch.
        device: Where it trains.
        micro_batches_left: Micro-batches that are left of the run.
        rows: Rows of the batch that are run; 0 until the first measurement.
    """

    model: Transformer
    step: ModelWithObjective
    batch: Batch
    device: torch.device
    micro_batches_left: int
    rows: int = 0

    def seconds(self, precision: PrecisionName, times: int = 2) -> float:
        """Time of a forward and backward pass over `rows` rows.

        Args:
            precision: Precision of the pass.
            times: Passes, after one that is not counted because it sets things up.

        Returns:
            The shortest time, in seconds.
        """
        if self.rows == 0:
            self.rows = self._affordable_rows(precision)
        self.run_once(precision, self.rows)
        return min(self.run_once(precision, self.rows) for _ in range(times))

    @property
    def fraction(self) -> float:
        """The fraction of a micro-batch that is measured."""
        return self.rows / len(self.batch)

    def run_once(self, name: PrecisionName, rows: int) -> float:
        """One forward and backward pass.

        Args:
            name: Its precision.
            rows: Rows of the batch to run.

        Returns:
            Its time in seconds.
        """
        batch = self.batch.first(rows).to(self.device)
        precision = Precision(name, self.device)
        _synchronize(self.device)
        start = time.perf_counter()
        with precision.autocast():
            loss = self.step(batch)
        loss.total.backward()
        _synchronize(self.device)
        seconds = time.perf_counter() - start
        self.model.zero_grad(set_to_none=True)
        return seconds

    def _affordable_rows(self, precision: PrecisionName) -> int:
        """Rows for which six passes take a hundredth of the run, within the limits of a probe's time."""
        self.run_once(precision, 1)
        one, rows = self.run_once(precision, 1), len(self.batch)
        budget = min(max(one * rows * self.micro_batches_left / 100, MIN_PROBE_SECONDS), MAX_PROBE_SECONDS)
        # A row alone takes longer than its part of a batch, so a batch that might just fit is tried.
        return rows if one * rows <= budget / 2 else max(1, min(rows, int(budget / 6 / one)))


def measure(
    probe: Probe,
    training: TrainingConfig,
    *,
    precision: str | None = None,
    compiled: str | None = None,
    cache_dir: Path | None = None,
) -> TuneResult:
    """Choose what this machine does fastest, and leave the model compiled accordingly.

    Args:
        probe: Runs micro-batches of the run.
        training: The settings (`precision`, `compile`), of which only `auto` is measured.
        precision: The precision that a checkpoint stores, which takes effect.
        compiled: The compile mode that a checkpoint stores, likewise.
        cache_dir: Folder that keeps what compilations cost and gained.

    Returns:
        The choice, and why.

    Raises:
        UsageError: `compile` is on, and this machine cannot compile.
    """
    reasons: list[str] = []
    name = cast(PrecisionName, precision or training.precision)
    micro_batch_seconds: float | None = None
    if name == cast(object, "auto"):
        name, micro_batch_seconds, why = _measured_precision(probe)
        reasons.append(why)
    setting = compiled or training.compile
    if setting == "auto":
        mode, why = _measured_compile(probe, name, micro_batch_seconds, cache_dir)
        return TuneResult(name, mode, "; ".join([*reasons, why]))
    mode, no_compiler = _set_compile(setting, training, probe.model, probe.batch.input_ids.numel())
    reasons += no_compiler
    return apply_choice(probe, TuneResult(name, mode, "; ".join(reasons) or None), training.compile)


@dataclass(frozen=True)
class CompilationRecord:
    """A compilation of one shape on this machine.

    Attributes:
        eager: Seconds per micro-batch without compilation.
        compiled: Seconds per micro-batch with it.
        took: Seconds that compiling took.
    """

    eager: float
    compiled: float
    took: float


def _measured_precision(probe: Probe) -> tuple[PrecisionName, float | None, str]:
    """The precision, seconds per micro-batch in it where they were measured, and why."""
    if probe.device.type != "cpu":
        name, why = auto_precision(probe.model.config, probe.device)
        return name, None, why
    if not multiplies_bf16():
        return "fp32", None, "this processor has no instructions for bf16 products"
    narrow, wide = probe.seconds("bf16"), probe.seconds("fp32")
    name = "bf16" if wide > _BF16_MIN_SPEEDUP * narrow else "fp32"
    part = "" if probe.rows == len(probe.batch) else f" ({probe.rows} of its {len(probe.batch)} rows)"
    why = f"a micro-batch takes {_ms(narrow)} in bf16, {_ms(wide)} in fp32{part}"
    return name, min(narrow, wide) / probe.fraction, why


def _measured_compile(
    probe: Probe, name: PrecisionName, micro_batch_seconds: float | None, cache_dir: Path | None
) -> tuple[CompileMode, str]:
    if not has_compiler():
        return "off", _NO_COMPILER
    mode = best_mode(probe.model, probe.batch.input_ids.numel())
    key = _shape_key(probe, name, mode)
    known = _recall(cache_dir, key)
    eager = micro_batch_seconds if micro_batch_seconds is not None else probe.seconds(name) / probe.fraction
    left = eager * probe.micro_batches_left
    if known is not None:
        gain, cost = left * (1 - known.compiled / known.eager), min(known.took, _WARM_SECONDS)
        expected = (
            f"compiled it is {known.eager / known.compiled:.2f} times as fast, as an earlier run measured"
        )
    else:
        gain, cost = left * _EXPECTED_GAIN.get(probe.device.type, 0.0) / 2, _COLD_SECONDS
        expected = f"compiling takes about {_COLD_SECONDS:.0f} s"
    if gain <= cost:
        return "off", f"{expected}, and about {left:.0f} s of training are left"
    return _try_compiling(probe, name, mode, cache_dir, key, known)


def _try_compiling(
    probe: Probe,
    name: PrecisionName,
    mode: CompileMode,
    cache_dir: Path | None,
    key: str,
    known: CompilationRecord | None,
) -> tuple[CompileMode, str]:
    """Compile; where it is not known which is faster, compare with the same micro-batch uncompiled."""
    probe.rows = len(probe.batch)
    start = time.perf_counter()
    if (failure := _compile(probe, name, mode)) is not None:
        return "off", failure
    took = time.perf_counter() - start
    if known is not None:
        _remember(cache_dir, key, replace(known, took=took))
        faster = f"{known.eager / known.compiled:.2f} times as fast as without, as an earlier run measured"
        return mode, f"{faster}; ready after {took:.1f} s"
    compiled = probe.seconds(name)
    with uncompiled(mode):
        eager = probe.seconds(name)
    _remember(cache_dir, key, CompilationRecord(eager, compiled, took))
    why = f"a micro-batch takes {_ms(compiled)} compiled, {_ms(eager)} not; compiling took {took:.1f} s"
    if eager > _COMPILED_MIN_SPEEDUP * compiled:
        return mode, why
    undo_compile(probe.model)
    return "off", why


def _compile(probe: Probe, name: PrecisionName, mode: CompileMode) -> str | None:
    """Compile and run once; what went wrong, or None."""
    compile_model(probe.model, mode)
    try:
        probe.run_once(name, probe.rows)
    except Exception as error:
        probe.model.zero_grad(set_to_none=True)
        if is_out_of_memory(error):
            return None  # the first step meets it again, and knows what to do
        if not isinstance(error, (*compiler_exceptions(), OSError)):
            raise
        undo_compile(probe.model)
        return f"compiling failed ({_first_cause(error)})"
    return None


def _first_cause(error: Exception) -> str:
    """The line of a compiler's error that says what is wrong: the first is often only the backend's name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.endswith("raised:")]
    return (telling or lines or [type(error).__name__])[0][:200]


def _shape_key(probe: Probe, name: PrecisionName, mode: CompileMode) -> str:
    """What a compilation depends on."""
    is_cuda = probe.device.type == "cuda"
    device = torch.cuda.get_device_name(probe.device) if is_cuda else torch.backends.cpu.get_cpu_capability()
    facts = [
        torch.__version__, device, torch.get_num_threads(), name, mode, list(probe.batch.input_ids.shape),
        probe.batch.document_ids is not None, probe.model.config.model_dump(mode="json"),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]


def _recall(cache_dir: Path | None, key: str) -> CompilationRecord | None:
    stored = _read_cache(cache_dir).get(key)
    try:
        return None if stored is None else CompilationRecord(**stored)
    except TypeError:  # written by another version
        return None


def _remember(cache_dir: Path | None, key: str, record: CompilationRecord) -> None:
    if cache_dir is None:
        return
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        temporary = cache_dir / f".{CACHE_FILE}"
        contents = {**_read_cache(cache_dir), key: asdict(record)}
        temporary.write_text(json.dumps(contents, indent=1), encoding="utf-8")
        temporary.replace(cache_dir / CACHE_FILE)
    except OSError:
        return  # a cache that cannot be written costs the next run a measurement, no more


def _read_cache(cache_dir: Path | None) -> dict[str, dict[str, float]]:
    if cache_dir is None:
        return {}
    try:
        text = (cache_dir / CACHE_FILE).read_text(encoding="utf-8")
        return cast("dict[str, dict[str, float]]", json.loads(text))
    except (OSError, ValueError):
        return {}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.1f} ms"
