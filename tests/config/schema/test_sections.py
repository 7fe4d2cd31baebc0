"""Sections by themselves: names, spellings, bounds and assignments."""

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
from llm_trainer.config.reference import reference
from llm_trainer.config.schema.base import Section
from llm_trainer.config.schema.run_config import home_section, path_aliases, section_types

KINDS = list(section_types().values())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_alias_sets_its_field_and_reads_back(kind: type[Section]) -> None:
    for name, field in kind.model_fields.items():
        default = field.get_default(call_default_factory=True)
        for alias in kind.setting_of(name).aliases:
            section = kind(**{alias: default}) if default is not None else kind()
            assert getattr(section, alias) == getattr(section, name)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_field_has_a_meaning(kind: type[Section]) -> None:
    assert all(field.description for field in kind.model_fields.values())


def test_paths_lead_into_known_sections_and_are_no_names_there() -> None:
    for path, (section, name) in path_aliases().items():
        where, _, said = path.partition(".")
        assert said not in home_section(where).names()
        assert name in home_section(section).model_fields


def test_two_names_of_one_setting_may_agree_but_not_differ() -> None:
    assert ModelConfig(n_embd=96, hidden_size=96).d_model == 96
    with pytest.raises(UsageError, match=r"n_embd=96 and d_model=48 are two names of one setting"):
        ModelConfig(n_embd=96, d_model=48)


def test_an_unknown_name_is_refused_with_the_closest_known_one() -> None:
    with pytest.raises(UsageError, match=r"no setting named 'lerning_rate'; did you mean learning_rate"):
        TrainingConfig(lerning_rate=1e-3)
    with pytest.raises(UsageError, match="did you mean warmup_steps"):
        TrainingConfig().warmup_step = 3


def test_a_value_out_of_bounds_is_named_with_its_bounds() -> None:
    with pytest.raises(UsageError, match=r"adam_beta1=1.5: must be less than 1"):
        TrainingConfig(beta1=1.5)
    with pytest.raises(UsageError, match=r"optimizer='sgd': must be 'adamw' or 'muon'"):
        TrainingConfig(optimizer="sgd")
    with pytest.raises(UsageError, match=r"learning_rate=nan: must be a finite number"):
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
def test_assignments_are_validated_and_leave_the_value_when_refused(assign: tuple[str, object]) -> None:
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
    with pytest.raises(UsageError, match="does not divide into 7 heads"):
        config.check_shape()


def test_spellings_work_in_assignments() -> None:
    config = TrainingConfig()
    config.fp16 = True
    assert config.precision == "fp16"
    config.decay_lr = False
    assert config.lr_scheduler == "constant"
    config.compile_model = True
    assert config.compile == "on"
    config.wandb_log = True
    assert "wandb" in config.report_to


def test_a_family_gives_defaults_that_do_not_count_as_said() -> None:
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
    ("said", "meant"),
    [
        (500, Duration(500)),
        ("500", Duration(500)),
        ("0.5 epochs", Duration(0.5, "epochs")),
        ("10M tokens", Duration(1e7, "tokens")),
    ],
)
def test_durations_are_read_in_their_units(said: object, meant: Duration) -> None:
    assert TrainingConfig(eval_interval=said).eval_interval == meant
    assert Duration.parse(str(meant)) == meant


@pytest.mark.parametrize(
    "said", ["0.013937282 epochs", "1234567.5 tokens", "1e-07 epochs", "123456789012 tokens", 7, "2.5"]
)
def test_a_saved_duration_keeps_every_digit(said: object) -> None:
    saved = TrainingConfig(eval_interval=said).model_dump(mode="json")["eval_interval"]
    assert TrainingConfig(eval_interval=saved).eval_interval == Duration.parse(said)


@pytest.mark.parametrize("said", ["1e999 tokens", "1e300T tokens", float("inf"), float("nan")])
def test_a_duration_without_end_is_refused(said: object) -> None:
    with pytest.raises(UsageError, match=r"warmup_steps.*is not a"):
        TrainingConfig(warmup_steps=said)


@pytest.mark.parametrize("name", ["eval_interval", "save_interval", "ephemeral_save_interval"])
@pytest.mark.parametrize("said", [0, "0", "0 epochs", "0.0 tokens"])
def test_an_interval_of_nothing_is_refused_with_what_means_never(name: str, said: object) -> None:
    with pytest.raises(UsageError, match=rf"{name}.*above 0.*none"):
        TrainingConfig(**{name: said})
    assert TrainingConfig(warmup_steps=said).warmup_steps is not None


@pytest.mark.parametrize("factor", [-2, -1e-9, float("nan"), float("inf")])
def test_a_rate_factor_that_would_train_uphill_is_refused(factor: float) -> None:
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


def test_a_setting_may_stand_where_a_manual_puts_it() -> None:
    assert RunConfig(training={"gradient_checkpointing": True}).model.gradient_checkpointing
    assert RunConfig(adaptive_reasoning={"enabled": True}).training.use_adaptive_reasoning
    with pytest.raises(
        UsageError, match=r"training.gradient_checkpointing=True and model.gradient_checkpointing=False"
    ):
        RunConfig(model={"gradient_checkpointing": False}, training={"gradient_checkpointing": True})


def test_the_settings_reference_is_up_to_date() -> None:
    page = ROOT / "docs" / "reference" / "settings.md"
    assert page.read_text(encoding="utf-8") == reference(), (
        "run python -m llm_trainer.config.reference > docs/reference/settings.md"
    )


@pytest.mark.parametrize(
    ("said", "meant"),
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
def test_every_name_of_precision_sets_the_one_field(said: dict[str, object], meant: str) -> None:
    for order in itertools.permutations(said.items()):
        assert TrainingConfig(**dict(order)).precision == meant


@pytest.mark.parametrize(
    "said",
    [
        {"fp16": True, "bf16": True},
        {"fp16": True, "mixed_precision": False},
        {"dtype": "float32", "use_amp": True},
        {"dtype": "float16", "fp16": False},
        {"amp_dtype": "float16", "mixed_precision_dtype": "bfloat16"},
        {"precision": "fp32", "fp16": True},
    ],
)
def test_contradictory_precisions_are_refused_in_any_order(said: dict[str, object]) -> None:
    for order in itertools.permutations(said.items()):
        with pytest.raises(UsageError, match="said twice and differently"):
            TrainingConfig(**dict(order))


def test_contradictory_switches_are_refused() -> None:
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
def test_any_values_are_taken_or_refused_by_our_own_error(values: dict[str, object]) -> None:
    with contextlib.suppress(UsageError):
        assert DataConfig(**values).model_fields_set <= set(DataConfig.model_fields)
