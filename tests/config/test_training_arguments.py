"""Every name of Hugging Face's `TrainingArguments` is a name of ours, or an error that says what to use."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from paths import ROOT

from llm_trainer.cli.specs import TRAIN
from llm_trainer.config import RunConfig, TrainingConfig, UsageError
from llm_trainer.config.parse.loader import load_run
from llm_trainer.config.schema.run_config import section_types
from llm_trainer.config.training_arguments import INSTEAD

PAGE = ROOT / "docs" / "how-to" / "coming-from.md"
OURS = {name for kind in section_types().values() for name in kind.names()}


def arguments() -> list[str]:
    """The fields of the installed transformers' TrainingArguments."""
    transformers = pytest.importorskip("transformers")
    return [field.name for field in dataclasses.fields(transformers.TrainingArguments)]


def test_each_name_is_ours_or_has_advice() -> None:
    unknown = [name for name in arguments() if name not in TRAIN.names().table() and name not in INSTEAD]
    assert unknown == []


@pytest.mark.parametrize("name", sorted(INSTEAD))
def test_a_name_without_a_counterpart_is_an_error_with_advice(name: str, tmp_path: Path) -> None:
    advice = re.escape(INSTEAD[name])
    file = tmp_path / "run.yaml"
    file.write_text(f"training:\n  {name}: 1\n", encoding="utf-8")
    with pytest.raises(UsageError, match=advice):
        TrainingConfig(**{name: 1})
    if name in TRAIN.names().table() or name == "local_rank":
        return  # a setting of the model, or the launcher's flag
    for arguments in ([f"--{name}=1"], [f"--config={file}"]):
        with pytest.raises(UsageError, match=advice):
            load_run(TRAIN, arguments)


def test_advice_names_settings_that_exist() -> None:
    words = {word for advice in INSTEAD.values() for word in re.findall(r"\b[a-z]+(?:_[a-z0-9]+)+\b", advice)}
    assert words - OURS == {"best_model", "final_model"}


@pytest.mark.parametrize(
    ("flag", "field", "value"),
    [
        ("--per_device_train_batch_size=4", "micro_batch_size", 4),
        ("--per_device_eval_batch_size=4", "eval_batch_size", 4),
        ("--optim=adamw_torch_fused", "optimizer", "adamw"),
        ("--lr_scheduler_type=constant_with_warmup", "lr_scheduler", "constant"),
        ("--lr_scheduler_type=warmup_stable_decay", "lr_scheduler", "wsd"),
        ("--max_steps=-1", "max_steps", None),
        ("--eval_strategy=epoch", "eval_interval", TrainingConfig(eval_interval="1 epochs").eval_interval),
        ("--save_strategy=epoch", "save_interval", TrainingConfig(save_interval="1 epochs").save_interval),
        ("--save_strategy=no", "save_interval", None),
        ("--eval_strategy=steps", "eval_interval", TrainingConfig().eval_interval),
        ("--use_cpu", "device", "cpu"),
        ("--ddp_backend=gloo", "distributed_backend", "gloo"),
        ("--eval_on_start", "eval_at_start", True),
    ],
)
def test_names_and_values_are_translated(flag: str, field: str, value: object) -> None:
    assert getattr(load_run(TRAIN, [flag]).config.training, field) == value
    name, equals, text = flag.removeprefix("--").partition("=")
    assert getattr(TrainingConfig(**{name: text if equals else True}), field) == value


def test_a_strategy_without_equals_takes_the_next_argument() -> None:
    training = load_run(TRAIN, ["--eval_strategy", "steps", "--eval_steps", "7"]).config.training
    assert training.eval_interval == TrainingConfig(eval_interval=7).eval_interval


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval_strategy=no"], "validates at its end"),
        (["--save_strategy=best"], "give save_interval"),
        (["--save_strategy=epoch", "--save_steps=10"], "contradict"),
        (["--use_cpu", "--device=cuda"], "contradict"),
        (["--fsdp=full_shard auto_wrap"], "number of ranks over which a replica is sharded"),
        (["--warmup_steps=0.1"], "is less than a step"),
        (["--eval_steps=0.05"], "is less than a step"),
    ],
)
def test_values_without_a_counterpart_are_errors(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_run(TRAIN, flags)


def test_activation_checkpointing_is_read_in_the_training_section() -> None:
    section = {"training": {"activation_checkpointing": True}}
    assert RunConfig.model_validate(section).model.gradient_checkpointing


def test_the_page_lists_every_name() -> None:
    assert table() in PAGE.read_text(encoding="utf-8"), table()


def table() -> str:
    """The page's table: a row for each name, in the order of `TrainingArguments`."""
    names = [*arguments(), *(name for name in INSTEAD if name not in arguments())]
    flat = TRAIN.names().table()
    rows = []
    for name in names:
        if name in flat:
            section, alias = flat[name]
            field = section_types()[section].names()[alias]
            here = "the same" if field == name else f"`{field}`"
        else:
            here = INSTEAD[name]
        rows.append(f"| `{name}` | {here} |")
    return "\n".join(["| TrainingArguments | here |", "|---|---|", *rows])
