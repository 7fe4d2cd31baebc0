"""The same run on one rank and on several: the same samples, the same loss, the same checkpoints."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from launch import environment, torchrun_command, train_on_ranks, write_runs

from llm_trainer.diagnostics.verify_resume import compare_checkpoints
from llm_trainer.run_dir import verify
from llm_trainer.training.logging.metrics import read_metrics

STEPS = 24
NO_DROPOUT = {"dropout": 0.0}
# Sixteen sequences a step, whatever the ranks.
COMMON = {
    "max_steps": STEPS,
    "batch_size": 16,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": None,
    "eval_interval": 8,
}
COMMON |= {"learning_rate": 3e-3, "save_interval": 12, "save_total_limit": None}
TOLERANCE = 1e-6

Run = dict[str, object]


def a_run(name: str, model: Run | None = None, **settings: object) -> Run:
    return {"name": name, "model": NO_DROPOUT | (model or {}), "settings": COMMON | settings}


def on_ranks(count: int, folder: Path, runs: Sequence[Run]) -> None:
    """Trains the runs on so many ranks."""
    done = train_on_ranks(count, "ranked_run", folder, runs)
    assert done.returncode == 0, done.stdout + done.stderr


def series(run: Path, name: str = "loss") -> list[float]:
    return [line[name] for line in read_metrics(run) if name in line]


def differences(one: list[float], other: list[float]) -> list[float]:
    assert len(one) == len(other) > 0
    return [abs(a - b) / abs(a) for a, b in zip(one, other, strict=True)]


LLAMA = {"model_type": "llama", "num_layers": 4, "num_heads": 4, "num_key_value_heads": 2, "qk_norm": True}
LORA = {"attn_lora_rank": 4, "embedding_lora_rank": 2}
RUNS = {
    "ddp": a_run("ddp"),
    "ddp-one-pass": a_run("ddp-one-pass", micro_batch_size=8),
    "fsdp": a_run("fsdp", fsdp=2),
    "fsdp-one-pass": a_run("fsdp-one-pass", fsdp=2, micro_batch_size=8),
    "fsdp-tied": a_run("fsdp-tied", {"tie_word_embeddings": True}, fsdp=2),
    "tensor": a_run("tensor", tensor_parallel=2),
    "tensor-one-pass": a_run("tensor-one-pass", tensor_parallel=2, micro_batch_size=16),
    "tensor-tied": a_run("tensor-tied", {"tie_word_embeddings": True}, tensor_parallel=2),
    "tensor-llama": a_run("tensor-llama", LLAMA, tensor_parallel=2),
    "ddp-lora": a_run("ddp-lora", LORA),
    "fsdp-lora": a_run("fsdp-lora", LORA, fsdp=2),
    "pipeline": a_run("pipeline", pipeline_parallel=2),
    "pipeline-tied": a_run(
        "pipeline-tied", {"tie_word_embeddings": True}, pipeline_parallel=2, pipeline_schedule="gpipe"
    ),
    "interleaved-llama": a_run(
        "interleaved-llama", LLAMA, pipeline_parallel=2, pipeline_schedule="interleaved"
    ),
}
PLANS: dict[str, dict[str, object]] = {
    "ddp": {},
    "fsdp": {"fsdp": 2},
    "tensor": {"tensor_parallel": 2},
    "pipeline": {"pipeline_parallel": 2},
}
MUON = {"optimizer": "muon"}
POISON = {"poisoned_step": 5}


CORE = ["ddp", "fsdp", "tensor", "pipeline"]  # what the fast tests train


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run on one rank, and the same on two ranks in each way to divide the work."""
    base = tmp_path_factory.mktemp("ranks")
    on_ranks(1, base, [a_run("plain")])
    on_ranks(2, base, [RUNS[name] for name in CORE])
    return base


@pytest.fixture(scope="module")
def folder(core: Path) -> Path:
    """All runs on one rank and on two."""
    straight = [
        a_run("plain-poisoned") | POISON,
        a_run("plain-tied", {"tie_word_embeddings": True}),
        a_run("plain-muon", **MUON),
        a_run("plain-llama", LLAMA),
        a_run("plain-lora", LORA),
    ]
    straight += [
        a_run(f"resumed-on-1-{kind}", resume_from=str(core / kind / "checkpoint-12")) for kind in PLANS
    ]
    on_ranks(1, core, straight)
    two = [run for name, run in RUNS.items() if name not in CORE]
    for kind, plan in PLANS.items():
        two += [
            a_run(f"{kind}-poisoned", **plan) | POISON,
            a_run(f"{kind}-muon", **plan, **MUON),
            a_run(f"{kind}-background", asynchronous_saves="on", **plan),
        ]
    two += [
        a_run(f"resumed-on-2-{kind}", resume_from=str(core / "plain/checkpoint-12"), **PLANS[kind])
        for kind in PLANS
    ]
    on_ranks(2, core, two)
    return core


@pytest.fixture(
    params=[name if name in CORE else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def trained(request: pytest.FixtureRequest) -> Path:
    """The folder of each run on two ranks in turn."""
    base: Path = request.getfixturevalue("core" if request.param in CORE else "folder")
    return base / request.param


def alone(name: str) -> str:
    """The same run on one rank."""
    return next((f"plain-{shape}" for shape in ("tied", "llama", "lora") if name.endswith(shape)), "plain")


def test_two_ranks_have_the_loss_of_one(trained: Path) -> None:
    off = differences(series(trained.with_name(alone(trained.name))), series(trained))
    assert len(off) == STEPS
    assert max(off) <= TOLERANCE
    drift = sum(off[STEPS // 2 :]) - sum(off[: STEPS // 2])
    assert drift / (STEPS // 2) <= TOLERANCE / 2


def test_validation_is_equal_on_two_ranks(trained: Path) -> None:
    plain = trained.with_name(alone(trained.name))
    assert max(differences(series(plain, "val_loss"), series(trained, "val_loss"))) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_goes_on_on_another_number_of_ranks(folder: Path, kind: str, ranks: int) -> None:
    resumed = series(folder / f"resumed-on-{ranks}-{kind}")
    assert max(differences(series(folder / "plain")[12:], resumed)) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("kind", PLANS)
def test_muon_on_two_ranks_stays_near_one(folder: Path, kind: str) -> None:
    """Its iteration is in bf16, which turns a last bit of a gradient into a thousandth of a direction."""
    assert max(differences(series(folder / "plain-muon"), series(folder / f"{kind}-muon"))) <= 5e-3


def test_replicas_save_the_files_that_one_rank_saves(core: Path) -> None:
    mine, theirs = core / "ddp/checkpoint-12", core / "plain/checkpoint-12"
    names = [sorted(path.relative_to(one).as_posix() for path in one.rglob("*")) for one in (mine, theirs)]
    assert names[0] == names[1]


def test_each_rank_saves_its_shards_and_together_they_are_the_model_folder_of_one(core: Path) -> None:
    from llm_trainer.model.hf.checkpoint import load_pretrained
    from llm_trainer.training.checkpoint.optimizer_state import read_tensors

    mine, theirs = core / "fsdp/checkpoint-12", core / "plain/checkpoint-12"
    assert [path.name for path in sorted(mine.glob("*.safetensors"))] == [
        f"model-0000{n}-of-00002.safetensors" for n in (1, 2)
    ]
    sizes = [path.stat().st_size for path in sorted((mine / "optimizer").iterdir())]
    assert len(sizes) == 2
    assert max(sizes) < 1.2 * min(sizes)
    assert verify(mine) == []
    weights = load_pretrained(theirs).state_dict()
    for name, tensor in load_pretrained(mine).state_dict().items():
        assert torch.allclose(tensor, weights[name], atol=1e-5), name
    moments = dict(read_tensors(theirs / "optimizer"))
    found = dict(read_tensors(mine / "optimizer"))
    assert found.keys() == moments.keys()
    assert all(
        found[name].shape == moments[name].shape and torch.allclose(found[name], moments[name], atol=1e-5)
        for name in found
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pipeline", "pipeline-tied"])
def test_each_stage_saves_its_own_weights(folder: Path, name: str) -> None:
    from safetensors import safe_open

    held = []
    for file in sorted((folder / name / "checkpoint-12").glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            held.append({tensor.removeprefix("transformer.") for tensor in tensors.keys()})  # noqa: SIM118 - not a dict
    first, last = held
    assert {tensor.split(".")[1] for tensor in first if tensor.startswith("h.")} == {"0"}
    assert {tensor.split(".")[1] for tensor in last if tensor.startswith("h.")} == {"1"}
    assert {tensor.split(".")[0] for tensor in first} == {"wte", "wpe", "h"}
    assert {tensor.split(".")[0] for tensor in last} - {"lm_head"} == {"ln_f", "h"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", PLANS)
def test_a_save_in_the_background_is_the_save_that_the_run_waits_for(folder: Path, kind: str) -> None:
    for name in ("checkpoint-12", "best_model", "final_model"):
        assert compare_checkpoints(folder / kind / name, folder / f"{kind}-background" / name) == []
        assert verify(folder / f"{kind}-background" / name) == []


def test_torchs_own_reader_takes_the_pieces_that_ranks_wrote(core: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    from llm_trainer.training.checkpoint.optimizer_state import read_tensors

    ours = dict(read_tensors(core / "fsdp/checkpoint-12/optimizer"))
    theirs = {name: torch.zeros_like(tensor) for name, tensor in ours.items() if tensor.ndim}
    dcp.load(
        theirs,
        storage_reader=HuggingFaceStorageReader(str(core / "fsdp/checkpoint-12/optimizer")),
        no_dist=True,
    )
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", PLANS)
def test_a_step_that_is_not_finite_on_one_rank_is_left_out_by_all(folder: Path, kind: str) -> None:
    def losses(name: str, steps: range) -> list[float]:
        by_step = {int(line["step"]): line["loss"] for line in read_metrics(folder / name) if "loss" in line}
        return [by_step[step] for step in steps if step in by_step]

    poisoned, last = f"{kind}-poisoned", int(read_metrics(folder / "plain")[-1]["step"])
    before, after = range(1, POISON["poisoned_step"] + 1), range(POISON["poisoned_step"] + 2, last + 1)
    for steps in (before, after):
        assert max(differences(losses("plain-poisoned", steps), losses(poisoned, steps))) <= TOLERANCE
    assert max(differences(losses("plain", before), losses(poisoned, before))) <= TOLERANCE
    assert max(differences(losses("plain", after), losses(poisoned, after))) > 1e-4  # one update less
    skipped = range(before.stop, after.start)
    assert losses("plain-poisoned", skipped) == []
    assert series(folder / poisoned, "skipped_steps")[-1] == 1


@pytest.mark.slow
def test_restarted_after_a_death_the_run_is_as_if_nothing_had_been(folder: Path) -> None:
    write_runs(folder, [a_run("restarted", resume_from="auto") | {"dies_at": 15}])
    command = torchrun_command(2, "ranked_run", folder, "--max-restarts=1")
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert series(folder / "restarted") == series(folder / "ddp")


@pytest.mark.slow
def test_four_ranks_have_the_loss_of_one(folder: Path) -> None:
    """Replicas of shards, either of cut matrices or of stages, and each kind of checkpoint from two ranks
    going on on four.
    """
    mixed = {
        "mixed": {"fsdp": 2, "data_parallel": 2},
        "tensor-fsdp": {"tensor_parallel": 2, "fsdp": 2},
        "tensor-ddp": {"tensor_parallel": 2},
        "pipeline-fsdp": {"pipeline_parallel": 2, "fsdp": 2},
    }
    runs = [a_run(name, **plan) for name, plan in mixed.items()]
    runs += [
        a_run(f"resumed-on-4-{kind}", fsdp=4, resume_from=str(folder / kind / "checkpoint-12"))
        for kind in PLANS
    ]
    runs += [
        a_run("resumed-on-4-pipeline-fsdp", fsdp=4, resume_from=str(folder / "pipeline-fsdp/checkpoint-12"))
    ]
    runs += [
        a_run("resumed-mixed", tensor_parallel=2, fsdp=2, resume_from=str(folder / "fsdp/checkpoint-12"))
    ]
    on_ranks(4, folder, runs)
    plain = series(folder / "plain")
    for name in mixed:
        assert max(differences(plain, series(folder / name))) <= TOLERANCE
    assert max(differences(plain[12:], series(folder / "resumed-mixed"))) <= TOLERANCE
    for kind in [*PLANS, "pipeline-fsdp"]:
        assert max(differences(plain[12:], series(folder / f"resumed-on-4-{kind}"))) <= TOLERANCE


@pytest.mark.parametrize("plan", ["tensor", "pipeline"])
def test_adapters_are_refused_where_a_model_is_cut_through(plan: str, tmp_path: Path) -> None:
    done = train_on_ranks(2, "ranked_run", tmp_path, [a_run("refused", LORA, **PLANS[plan])])
    assert done.returncode != 0
    assert "use fsdp instead" in done.stderr
