"""Sections alone: names, shorthands, bounds and assignments."""

from __future__ import annotations

import contextlib
import copy
import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paths import ROOT

from llm_trainer.config import (
    DataConfig,
    Duration,
    GenerationConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
    UsageError,
)
from llm_trainer.config.describe import reference
from llm_trainer.config.schema.base import Section
from llm_trainer.config.schema.run_config import dotted_aliases, section_class, section_types

KINDS = list(section_types().values())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_alias_sets_its_field_and_reads_back(kind: type[Section]) -> None:
    for name, field in kind.model_fields.items():
        default = field.get_default(call_default_factory=True)
        for alias in kind.setting_of(name).aliases:
            section = kind(**{alias: default}) if default is not None else kind()
            assert getattr(section, alias) == getattr(section, name)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_help_text_is_full_sentences(kind: type[Section]) -> None:
    for name, field in kind.model_fields.items():
        text = field.description or ""
        first = text.split()[0].rstrip(":,")
        assert text[0].isupper() or first in ("nf4", "llama3", "greedy", "domain_specific"), name
        assert text.endswith((".", "]")), name


def test_dotted_aliases_name_other_sections_and_are_not_names_there() -> None:
    for path, (section, name) in dotted_aliases().items():
        where, _, alias = path.partition(".")
        assert alias not in section_class(where).names()
        assert name in section_class(section).model_fields


def test_two_names_of_one_setting_may_agree_but_not_differ() -> None:
    assert ModelConfig(n_embd=96, hidden_size=96).d_model == 96
    with pytest.raises(UsageError, match=r"n_embd=96 and d_model=48 set the same option"):
        ModelConfig(n_embd=96, d_model=48)


def test_an_unknown_name_is_an_error_that_suggests_the_closest() -> None:
    with pytest.raises(UsageError, match=r"no setting named 'lerning_rate'; did you mean learning_rate"):
        TrainingConfig(lerning_rate=1e-3)
    with pytest.raises(UsageError, match="did you mean warmup_steps"):
        TrainingConfig().warmup_step = 3


def test_a_value_out_of_bounds_is_named_with_its_bounds() -> None:
    with pytest.raises(UsageError, match=r"invalid value for adam_beta1: 1.5 is not in \[0, 1\)"):
        TrainingConfig(beta1=1.5)
    with pytest.raises(UsageError, match=r"optimizer: 'sgd' \(must be 'adamw' or 'muon'\)"):
        TrainingConfig(optimizer="sgd")
    with pytest.raises(UsageError, match=r"learning_rate: nan \(must be a finite number\)"):
        TrainingConfig(learning_rate=float("nan"))


@pytest.mark.parametrize(
    "assign",
    [
        ("max_iters", True),
        ("max_iters", 1.5),
        ("lr", -1),
        ("lr", "fast"),
        ("save_dir", 3),
        ("lr", float("inf")),
    ],
)
def test_an_invalid_assignment_leaves_the_value(assign: tuple[str, object]) -> None:
    config = TrainingConfig()
    before = getattr(config, assign[0])
    with pytest.raises(UsageError):
        setattr(config, *assign)
    assert getattr(config, assign[0]) == before


def test_a_shape_may_be_assigned_line_by_line() -> None:
    config = ModelConfig()
    config.n_embd = 100
    config.n_head = 10
    assert config.head_width == 10
    config.check_shape()
    config.n_head = 7
    with pytest.raises(UsageError, match="not divisible by num_attention_heads 7"):
        config.check_shape()


def test_shorthands_work_in_assignments() -> None:
    config = TrainingConfig()
    config.fp16 = True
    assert config.precision == "fp16"
    config.decay_lr = False
    assert config.lr_scheduler == "constant"
    config.compile_model = True
    assert config.compile == "on"
    config.wandb_log = True
    assert "wandb" in config.report_to


def test_defaults_of_a_family_do_not_count_as_set() -> None:
    llama = ModelConfig(model_type="llama", bias=True)
    assert (llama.position_embedding, llama.norm, llama.bias) == ("rope", "rmsnorm", True)
    assert llama.model_fields_set == {"model_type", "bias"}
    llama.model_type = "gpt2"
    assert (llama.position_embedding, llama.norm, llama.bias) == ("learned", "layernorm", True)


def test_lists_are_split_at_commas_but_stop_strings_are_not() -> None:
    assert TrainingConfig(report_to="tensorboard,wandb").report_to == ["tensorboard", "wandb"]
    assert TrainingConfig(report_to="none").report_to == []
    assert GenerationConfig(stop="Yes, sir").stop == ["Yes, sir"]
    assert GenerationConfig(stop='["a", "b"]').stop == ["a", "b"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (500, Duration(500)),
        ("500", Duration(500)),
        ("0.5 epochs", Duration(0.5, "epochs")),
        ("10M tokens", Duration(1e7, "tokens")),
    ],
)
def test_durations_are_read_in_their_units(value: object, expected: Duration) -> None:
    assert TrainingConfig(eval_interval=value).eval_interval == expected
    assert Duration.parse(str(expected)) == expected


@pytest.mark.parametrize(
    "value", ["0.013937282 epochs", "1234567.5 tokens", "1e-07 epochs", "123456789012 tokens", 7, "2.5"]
)
def test_a_saved_duration_keeps_every_digit(value: object) -> None:
    saved = TrainingConfig(eval_interval=value).model_dump(mode="json")["eval_interval"]
    assert TrainingConfig(eval_interval=saved).eval_interval == Duration.parse(value)


@pytest.mark.parametrize("value", ["1e999 tokens", "1e300T tokens", float("inf"), float("nan")])
def test_an_infinite_duration_is_an_error(value: object) -> None:
    with pytest.raises(UsageError, match=r"warmup_steps.*is not a"):
        TrainingConfig(warmup_steps=value)


@pytest.mark.parametrize("name", ["eval_interval", "save_interval", "ephemeral_save_interval"])
@pytest.mark.parametrize("value", [0, "0", "0 epochs", "0.0 tokens"])
def test_an_interval_of_zero_is_an_error_that_says_how_to_set_never(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=rf"{name}.*above 0.*none"):
        TrainingConfig(**{name: value})
    assert TrainingConfig(warmup_steps=value).warmup_steps is not None


@pytest.mark.parametrize("factor", [-2, -1e-9, float("nan"), float("inf")])
def test_a_negative_lr_multiplier_is_an_error(factor: float) -> None:
    with pytest.raises(UsageError, match="lr_multipliers"):
        TrainingConfig(lr_multipliers={"attn.0": factor})
    assert TrainingConfig(lr_multipliers={"attn.0": 0}).lr_multipliers == {"attn.0": 0}


def test_run_config_survives_json() -> None:
    config = RunConfig(
        model={"model_type": "llama", "n_layer": 3, "rope_scaling": {"type": "llama3", "factor": 8}},
        training={
            "fp16": True,
            "warmup_iters": "2 epochs",
            "decay_lr": False,
            "wandb_log": True,
            "compile": False,
        },
        data={"max_length": 128},
        generation={"stop": ["a,b"]},
    )
    again = RunConfig(**config.model_dump(mode="json"))
    assert again == config
    assert copy.deepcopy(config) == config


def test_a_setting_may_be_given_in_the_section_where_a_manual_has_it() -> None:
    assert RunConfig(training={"gradient_checkpointing": True}).model.gradient_checkpointing
    assert RunConfig(adaptive_reasoning={"enabled": True}).training.use_adaptive_reasoning
    with pytest.raises(
        UsageError, match=r"training.gradient_checkpointing=True and model.gradient_checkpointing=False"
    ):
        RunConfig(model={"gradient_checkpointing": False}, training={"gradient_checkpointing": True})


def test_the_settings_reference_is_up_to_date() -> None:
    page = ROOT / "docs" / "reference" / "settings.md"
    assert page.read_text(encoding="utf-8") == reference(), (
        "run python -m llm_trainer.config.describe > docs/reference/settings.md"
    )


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({}, "auto"),
        ({"fp16": True}, "fp16"),
        ({"fp16": False}, "fp32"),
        ({"bf16": True, "fp16": False}, "bf16"),
        ({"use_amp": True}, "bf16"),
        ({"use_amp": True, "amp_dtype": "float16"}, "fp16"),
        ({"mixed_precision": True, "mixed_precision_dtype": "bfloat16"}, "bf16"),
        ({"fp16": True, "mixed_precision": True, "mixed_precision_dtype": "float16"}, "fp16"),
        ({"mixed_precision": False}, "fp32"),
        ({"mixed_precision": "fp16"}, "fp16"),
        ({"mixed_precision": "no"}, "fp32"),
        ({"mixed_precision": True, "fp16": False}, "bf16"),
        ({"dtype": "torch.bfloat16"}, "bf16"),
        ({"dtype": "float32", "use_amp": False}, "fp32"),
        ({"precision": "auto", "use_amp": True}, "auto"),
    ],
)
def test_every_name_of_precision_sets_the_one_field(value: dict[str, object], expected: str) -> None:
    for order in itertools.permutations(value.items()):
        assert TrainingConfig(**dict(order)).precision == expected


@pytest.mark.parametrize(
    "value",
    [
        {"fp16": True, "bf16": True},
        {"fp16": True, "mixed_precision": False},
        {"dtype": "float32", "use_amp": True},
        {"dtype": "float16", "fp16": False},
        {"amp_dtype": "float16", "mixed_precision_dtype": "bfloat16"},
        {"precision": "fp32", "fp16": True},
    ],
)
def test_contradictory_precisions_are_errors_in_any_order(value: dict[str, object]) -> None:
    for order in itertools.permutations(value.items()):
        with pytest.raises(UsageError, match="contradictory settings of precision"):
            TrainingConfig(**dict(order))


def test_contradictory_switches_are_errors() -> None:
    with pytest.raises(UsageError, match="decay_lr=False and lr_scheduler='cosine'"):
        TrainingConfig(decay_lr=False, lr_scheduler="cosine")
    with pytest.raises(UsageError, match="wandb_log=False"):
        TrainingConfig(wandb_log=False, report_to=["wandb"])


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.sampled_from(sorted(DataConfig.names())),
        st.one_of(st.integers(), st.text(max_size=5), st.booleans(), st.none(), st.floats()),
        max_size=4,
    )
)
def test_any_values_are_accepted_or_are_a_usage_error(values: dict[str, object]) -> None:
    with contextlib.suppress(UsageError):
        assert DataConfig(**values).model_fields_set <= set(DataConfig.model_fields)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_steps": "many"}, "invalid value for max_steps: 'many' (must be an integer)"),
        ({"max_steps": 1.5}, "invalid value for max_steps: 1.5 (must be an integer)"),
        ({"learning_rate": "high"}, "invalid value for learning_rate: 'high' (must be a number)"),
        ({"report_to": ["paper"]}, "invalid value for report_to: 'paper' (must be 'tensorboard' or 'wandb')"),
    ],
)
def test_a_value_of_the_wrong_type_is_an_error_in_plain_words(
    values: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError) as error:
        TrainingConfig(**values)
    assert str(error.value).splitlines()[0] == message
