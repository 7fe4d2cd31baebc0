"""From command lines and files to settings: precedence, contradictions, commands, notes and help."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from llm_trainer.config import UsageError
from llm_trainer.config.describe import explain
from llm_trainer.config.parse.command import CommandSpec, LoadedRun
from llm_trainer.config.parse.loader import load_run
from llm_trainer.config.parse.merge import RawValue, SettingNames, normalize
from llm_trainer.config.parse.validation import check_implemented
from llm_trainer.config.schema.base import Section, setting
from llm_trainer.config.schema.run_config import section_types

SECTIONS = (
    "model",
    "training",
    "data",
    "knowledge_distillation",
    "computational_efficiency",
    "adaptive_reasoning",
)


class ServeOptions(Section):
    """Options of this command alone."""

    port: int = setting(8000, "Port of the server.", gt=0)
    seed: int = setting(7, "Another seed.")
    run: str = setting("", "A folder.")


TRAIN = CommandSpec(
    "train.py",
    "Train.",
    SECTIONS,
    defaults={"training.warmup_steps": 2000, "training.batch_size": 32},
    positional_config=True,
)
GENERATE = CommandSpec(
    "generate",
    "Generate.",
    ("generation", "inference", "data.data_dir"),
    options=ServeOptions,
    positional=("run",),
)


def train(*arguments: str) -> LoadedRun:
    return load_run(TRAIN, arguments)


def write(folder: Path, name: str, text: str | dict[str, object]) -> str:
    path = folder / name
    path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    "flags",
    [
        ["--hidden_size", "96"],
        ["--hidden-size=96"],
        ["--n-embd=96"],
        ["--n_embd", "96"],
        ["--model.hidden_size=96"],
        ["--model.d-model", "96"],
        ["--n_embd=96", "--hidden_size=96"],
        ["--n_embd=9.6e1"],
    ],
)
def test_one_setting_has_many_names(flags: list[str]) -> None:
    assert train(*flags).config.model.hidden_size == 96


@pytest.mark.parametrize(
    ("flags", "compiled", "only"),
    [
        (["--compile", "--eval_only"], "on", True),
        (["--compile=False", "--eval_only=False"], "off", False),
        (["--compile", "auto", "--eval_only", "true"], "auto", True),
        (["--compile_model", "--eval-only", "False"], "on", False),
        (["--torch_compile", "off"], "off", False),
    ],
)
def test_switches_are_given_alone_or_with_a_value(flags: list[str], compiled: str, only: bool) -> None:
    training = train(*flags).config.training
    assert (training.compile, training.eval_only) == (compiled, only)


def test_a_switch_does_not_swallow_a_settings_file(tmp_path: Path) -> None:
    path = write(tmp_path, "a.py", "n_layer = 3\n")
    loaded = train("--eval_only", path)
    assert loaded.config.training.eval_only
    assert loaded.config.model.num_hidden_layers == 3


def test_resume_without_a_value_means_the_newest_checkpoint() -> None:
    assert train("--resume").config.training.resume_from == "auto"
    assert train("--resume", "runs/a").config.training.resume_from == "runs/a"
    assert train("--resume", "--seed=3").config.training.resume_from == "auto"


def test_flags_keep_texts_that_look_like_numbers() -> None:
    loaded = load_run(GENERATE, ["--start", "123", "--top_k", "none", "--stop", "a,b", "--stop=1"])
    assert loaded.config.inference.prompt == "123"
    assert loaded.config.generation.top_k is None
    assert loaded.config.generation.stop == ["a,b", "1"]


def test_later_sources_win_without_contradiction(tmp_path: Path) -> None:
    first = write(tmp_path, "a.json", {"training": {"lr": 1e-3, "batch_size": 4, "seed": 5}})
    second = write(tmp_path, "b.yaml", "learning_rate: 2e-3\n")
    loaded = train(f"--config={first}", "--config", second, "--max_lr", "3e-3")
    assert loaded.config.training.learning_rate == 3e-3
    assert loaded.config.training.batch_size == 4
    assert loaded.origins["training.learning_rate"] == "--max_lr"
    assert loaded.origins["training.batch_size"] == first
    assert train(f"--config={first}", f"--config={second}").config.training.learning_rate == 2e-3
    assert train(f"--config={second}", f"--config={first}").config.training.learning_rate == 1e-3


def test_defaults_of_a_command_do_not_count_as_set() -> None:
    loaded = train("--seed=3")
    assert loaded.config.training.batch_size == 32
    assert loaded.set_values() == {"training.seed": 3}
    assert not loaded.config.training.is_set("batch_size")


def test_a_preset_overrides_the_command_and_is_overridden_by_files(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", {"n_layer": 2})
    loaded = train("--preset", "framework-tiny", f"--config={path}", "--n_head=4")
    model = loaded.config.model
    assert (model.model_type, model.hidden_size, model.num_hidden_layers, model.num_attention_heads) == (
        "llama",
        256,
        2,
        4,
    )
    with pytest.raises(UsageError, match="did you mean framework-tiny"):
        train("--preset=framwork-tiny")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--n_embd=96", "--hidden_size=48"],
            "--n_embd=96 and --hidden_size=48 set the same option to different values",
        ),
        (
            ["--training.gradient_checkpointing=True", "--model.gradient_checkpointing=False"],
            "training.gradient_checkpointing=True and",
        ),
        (["--nembd=4"], "did you mean n_embd"),
        (["--model.hiden_size=4"], "did you mean hidden_size"),
        (["--modle.hidden_size=4"], "did you mean model"),
        (["--top_p=0.5"], "section 'generation', which this command does not read"),
        (["--generation.top_p=0.5"], "does not read generation.top_p"),
        (["--lr", "-1"], r"invalid value for --lr: -1 \(must be greater than or equal to 0\)"),
        (["--n_layer=True"], "not a number"),
        (["--n_layer=two"], "invalid value for --n_layer: 'two'"),
        (["--n_layer"], "needs a value"),
        (["-n_layer=2"], "two dashes"),
        (["--fp16", "--dtype=float32"], r"--fp16, --dtype: contradictory settings of precision"),
        (["stray"], "unexpected argument 'stray' of train.py"),
        (["missing.json"], "no file missing.json"),
        (["--teacher_model_path=t"], "no effect, since use_knowledge_distillation is off"),
        (["--temperature=3"], "no effect, since use_knowledge_distillation is off"),
        (
            ["--computational_efficiency.use_activation_checkpointing=True"],
            "no effect, since use_computational_efficiency is off",
        ),
        (
            ["--warmup_steps=200", "--max_steps=100"],
            r"warmup_steps \(--warmup_steps\) is 200, longer than the run",
        ),
        (["--warmup_steps=3 epochs", "--num_epochs=2"], "longer than the run"),
        (["--world_size=4"], r"world_size \(--world_size\) is 4, but 1 process was started"),
        (["--batch_size=30", "--micro_batch_size=8"], "30 is not a multiple of micro_batch_size 8"),
        (["--min_lr=1", "--lr=0.1"], r"min_learning_rate \(--min_lr\) is 1.0, above the peak"),
        (["--max_length=2048", "--block_size=1024"], "longer than the model's context"),
        (["--data.vocab_size=500", "--model.vocab_size=300"], "larger than the model's vocabulary"),
        (["--train_ratio=0.9", "--val_ratio=0.2"], "add up to 1.1"),
        (["--n_embd=100"], "is not divisible by num_attention_heads 12"),
        (["--local-rank=a"], "whole number"),
        (["--scaling_schedule_file=none.yaml"], "no file none.yaml"),
    ],
)
def test_errors_name_what_is_wrong(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train(*flags)


def test_nested_settings_are_given_by_dots_or_as_json() -> None:
    for flags in (["--model.rope_scaling.factor=2"], ["--rope_scaling", '{"type": "linear", "factor": 2}']):
        scaling = train("--position_embedding=rope", *flags).config.model.rope_scaling
        assert scaling is not None
        assert scaling.factor == 2
    with pytest.raises(UsageError, match="is not JSON"):
        train("--rope_scaling={factor")


def test_a_schedule_for_pretrained_weights_may_name_modules_that_only_they_have(tmp_path: Path) -> None:
    path = write(tmp_path, "s.yaml", "- {name: freeze_layer, value: mlp.20, max_wait_iters: 1}\n")
    assert (
        train(
            "--init_from=gpt2-medium", f"--scaling_schedule_file={path}"
        ).config.training.scaling_schedule_file
        == path
    )
    with pytest.raises(UsageError, match="N below 12"):
        train(f"--scaling_schedule_file={path}")


def test_the_local_rank_flag_of_launchers_is_accepted() -> None:
    for flag in (["--local-rank=1"], ["--local_rank", "1"]):
        assert train(*flag, "--seed=3").config.training.seed == 3


def test_a_default_warm_up_longer_than_the_run_is_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    loaded = train("--max_steps=100")
    assert loaded.config.training.warmup_steps is None
    assert "tenth of the run" in capsys.readouterr().err
    assert train("--max_steps=5000").config.training.warmup_steps is not None


def test_a_micro_batch_size_removes_the_default_batch_size() -> None:
    assert train("--micro_batch_size=12").config.training.batch_size is None


def test_vocabulary_size_and_length_apply_to_data_and_model() -> None:
    assert train("--vocab_size=300").config.data.vocab_size == 300
    assert train("--max_length=64").config.model.max_position_embeddings == 64
    assert train("--max_length=64", "--block_size=128").config.model.max_position_embeddings == 128


def test_the_commands_own_options_are_looked_up_first() -> None:
    loaded = load_run(GENERATE, ["runs/a", "--seed=5", "--port", "9000", "--data_dir=d"])
    assert isinstance(loaded.options, ServeOptions)
    assert (loaded.options.run, loaded.options.seed, loaded.options.port) == ("runs/a", 5, 9000)
    assert loaded.config.generation.seed is None
    assert loaded.config.data.data_dir == "d"
    with pytest.raises(UsageError, match="does not read"):
        load_run(GENERATE, ["--stride=4"])
    with pytest.raises(UsageError, match=r"--port: 0 \(must be greater than 0\)"):
        load_run(GENERATE, ["--port=0"])


def test_a_shared_file_may_hold_fields_for_other_commands(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "top_p: 0.5\nn_layer: 2\nknowledge_distillation: {alpha: 0.1}\n")
    assert train(f"--config={path}").config.generation.top_p == 0.5
    assert load_run(GENERATE, [f"--config={path}"]).config.model.num_hidden_layers == 2


def test_one_setting_in_two_sections_of_a_file(tmp_path: Path) -> None:
    agreeing = {"model": {"gradient_checkpointing": True}, "training": {"gradient_checkpointing": True}}
    assert train("--config", write(tmp_path, "a.json", agreeing)).config.model.gradient_checkpointing
    differing = {"model": {"gradient_checkpointing": False}, "training": {"gradient_checkpointing": True}}
    with pytest.raises(
        UsageError,
        match=r"model.gradient_checkpointing=False .* and training.gradient_checkpointing=True",
    ):
        train("--config", write(tmp_path, "b.json", differing))


def test_the_efficiency_section_applies_only_with_its_switch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = {"use_activation_checkpointing": True, "use_model_compiler": False, "use_kv_cache": True}
    path = write(tmp_path, "a.json", {"computational_efficiency": section})
    off = train(f"--config={path}").config
    assert not off.model.gradient_checkpointing
    assert off.training.compile == "auto"
    assert "use_computational_efficiency is off" in capsys.readouterr().err
    switched = train(f"--config={path}", "--use_computational_efficiency").config
    assert switched.model.gradient_checkpointing
    assert switched.training.compile == "off"
    assert train("--use_computational_efficiency").config.model.gradient_checkpointing
    section["use_activation_checkpointing"] = False
    path = write(tmp_path, "b.json", {"computational_efficiency": section})
    assert not train(f"--config={path}", "--use_computational_efficiency").config.model.gradient_checkpointing


def test_a_training_file_without_a_model_uses_the_model_file_of_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "model_config.json", {"model": {"n_layer": 5}})
    path = write(tmp_path, "training_config.json", {"training": {"seed": 3}})
    assert train(f"--config={path}").config.model.num_hidden_layers == 5
    assert "model_config.json" in capsys.readouterr().err
    assert train(f"--config={path}", "--n_layer=2").config.model.num_hidden_layers == 2
    assert train(f"--config={path}", "--preset=l1-tiny").config.model.num_hidden_layers == 2
    other = write(tmp_path, "own.json", {"training": {"seed": 3}, "model": {"n_head": 6}})
    assert train(f"--config={other}").config.model.num_hidden_layers == 12


def test_weights_and_biases_is_enabled_by_a_project_in_a_file(tmp_path: Path) -> None:
    named = write(tmp_path, "a.yaml", "training:\n  wandb_project: p\n")
    assert "wandb" in train(f"--config={named}").config.training.report_to
    off = write(tmp_path, "b.yaml", "training:\n  wandb_project: p\n  report_to: [tensorboard]\n")
    assert "wandb" not in train(f"--config={off}").config.training.report_to
    nanogpt = write(tmp_path, "c.py", "wandb_project = 'p'\n")
    assert "wandb" not in train(nanogpt).config.training.report_to
    assert "wandb" in train(nanogpt, "--wandb_log=True").config.training.report_to


def test_setting_a_family_selects_its_whole_shape() -> None:
    spec = CommandSpec("nano", "Train.", SECTIONS, defaults={"model.bias": True, "model.activation": "gelu"})
    assert load_run(spec, []).config.model.activation == "gelu"
    llama = load_run(spec, ["--model_type=llama"]).config.model
    assert (llama.activation, llama.bias) == ("swiglu", False)


ODD_VALUES = (
    None,
    5,
    -1,
    float("inf"),
    "x",
    "",
    True,
    [],
    [1],
    [[1]],
    ["a", {}],
    {},
    {"a": [1]},
    2**70,
    -(2**70),
)


@pytest.mark.parametrize("section", section_types())
def test_an_invalid_value_of_any_setting_is_a_usage_error(section: str) -> None:
    kind = section_types()[section]
    for name in kind.names():
        for value in ODD_VALUES:
            for others in ({}, {"wandb_log": True}) if name == "report_to" else ({},):
                try:
                    kind(**{name: value}, **others)
                except UsageError:
                    continue


def test_wandb_log_adds_to_the_default_loggers() -> None:
    for report_to in ({}, {"report_to": None}):
        assert section_types()["training"](wandb_log=True, **report_to).report_to == ["tensorboard", "wandb"]


@pytest.mark.parametrize("section", ["training", "data", "generation"])
def test_a_seed_fits_a_generator(section: str) -> None:
    kind = section_types()[section]
    assert kind(seed=2**63 - 1).seed == 2**63 - 1
    with pytest.raises(UsageError, match=r"seed: 9223372036854775808 is not in \[0, 9223372036854775807\]"):
        kind(seed=2**63)


def test_given_settings_override_those_of_a_resumed_run() -> None:
    saved = train("--lr=1e-4", "--n_layer=3", "--batch_size=4").config
    resumed = train("--resume", "--lr=2e-4").merged_over(saved)
    assert resumed.training.learning_rate == 2e-4
    assert resumed.training.batch_size == 4
    assert resumed.model.num_hidden_layers == 3


def test_features_that_are_not_implemented_are_reported_together_by_commands_that_read_them(
    tmp_path: Path,
) -> None:
    path = write(tmp_path, "a.json", {"training": {"use_knowledge_distillation": True}})
    loaded = train(f"--config={path}", "--use_adaptive_reasoning")
    with pytest.raises(UsageError) as caught:
        check_implemented(loaded.config)
    assert all(name in str(caught.value) for name in ("use_knowledge_distillation", "use_adaptive_reasoning"))
    generated = load_run(GENERATE, [f"--config={path}"])
    check_implemented(generated.config, GENERATE.names(), generated.options)
    check_implemented(train().config)


def test_a_feature_section_without_its_switch_is_not_an_error(tmp_path: Path) -> None:
    section = {"distill_hidden_states": True, "teacher_model_path": "t"}
    path = write(tmp_path, "a.json", {"knowledge_distillation": section})
    check_implemented(train(f"--config={path}").config)
    with pytest.raises(UsageError, match="distill_hidden_states"):
        check_implemented(train(f"--config={path}", "--use_knowledge_distillation").config)


def test_explain_shows_value_origin_unit_and_meaning_of_every_setting() -> None:
    loaded = train("--lr=2e-3", "--model_type=llama", "--explain")
    assert loaded.explain
    lines = explain(loaded).splitlines()
    shown = {line.split()[0]: line for line in lines}
    assert all(f"{section}.{name}" in shown for section, name in TRAIN.names().fields())
    assert all(word in shown["training.learning_rate"] for word in ("0.002", "--lr", "Peak learning rate"))
    assert "default of train.py" in shown["training.batch_size"]
    assert "default of llama" in shown["model.position_embedding"]
    assert "tokens" in shown["model.max_position_embeddings"]


def help_of(spec: CommandSpec, flag: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exited:
        load_run(spec, [flag])
    assert exited.value.code == 0
    return capsys.readouterr().out


def test_help_all_lists_every_setting_with_its_other_names(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(TRAIN, "--help-all", capsys)
    assert all(re.search(rf"--(\w+\.)?{name}\b", text) for _, name in TRAIN.names().fields())
    assert "--n_embd" in text
    assert "default: 32" in text


@pytest.mark.parametrize("columns", ["80", "100", "200"])
def test_help_lists_the_common_settings_under_headings(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    text = help_of(TRAIN, "--help", capsys)
    flags = re.findall(r"^ +--(\w+) ", text, re.MULTILINE)
    assert 18 <= len(flags) <= 30
    assert {"hidden_size", "data_dir", "batch_size", "learning_rate", "output_dir", "resume_from"} <= set(
        flags
    )
    headings = re.findall(r"^([A-Z].*):$", text, re.MULTILINE)
    assert headings[:2] == ["General", "Model"]
    assert {"Training", "Optimizer", "Checkpoints", "Data"} <= set(headings)
    assert "more settings: python train.py --help-all" in text
    everything = help_of(TRAIN, "--help-all", capsys)
    for page in (text, everything):
        assert max(map(len, page.splitlines())) <= min(int(columns), 100)
    assert set(headings) <= set(re.findall(r"^([A-Z].*):$", everything, re.MULTILINE))


def test_help_of_a_small_command_shows_all_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    spec = CommandSpec("llm-trainer serve", "Serve.", (), options=ServeOptions)
    text = help_of(spec, "--help", capsys)
    assert all(
        flag in text for flag in ("usage: llm-trainer serve", "--port INT", "--seed INT", "--run TEXT")
    )
    assert "--help-all" not in text


def test_every_alias_works_as_a_flat_name() -> None:
    names = SettingNames(SECTIONS)
    for name, (section, alias) in names.table().items():
        assert names.find(RawValue(name, None, "here")) == (section, alias)
    assert normalize([RawValue("n-embd", 4, "here")], names)[("model", "hidden_size")].value == 4


def test_settings_import_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'tokenizers', 'datasets', 'transformers', 'pydantic_settings', 'rich'}"
    code = (
        "import sys, llm_trainer.config.parse.loader; "
        f"sys.exit(str(sorted({heavy} & set(sys.modules)) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stderr.strip() == ""


def test_a_default_warm_up_longer_than_a_run_in_epochs_becomes_a_tenth() -> None:
    from llm_trainer.training.optim.lr_schedule import resolve_lr_schedule, resolve_run_length

    training = train("--num_epochs=1").config.training
    length = resolve_run_length(training, samples_per_epoch=1000, sequences_per_step=10, context=8)
    assert resolve_lr_schedule(training, length).warmup_steps == 10
    given = train("--num_epochs=1", "--warmup_steps=2000").config.training
    with pytest.raises(UsageError, match="longer than the run of 100 steps"):
        resolve_lr_schedule(given, length)


@pytest.mark.parametrize(
    ("text", "seed"),
    [("1234567890123456789", 1234567890123456789), ("1_000", 1000), ("1e3", 1000), ("007", 7)],
)
def test_integers_of_flags_keep_all_their_digits(text: str, seed: int) -> None:
    assert train(f"--seed={text}").config.training.seed == seed


@pytest.mark.parametrize(
    ("flags", "name", "value", "origin"),
    [
        (["--lr=1", "--lr=2"], "training.learning_rate", 2.0, "--lr (the last of 2)"),
        (["--lr=x", "--lr=1", "--lr=2"], "training.learning_rate", 2.0, "--lr (the last of 3)"),
        (["--batch-size=1", "--batch_size=2"], "training.batch_size", 2, "--batch_size (the last of 2)"),
        (
            ["--hidden_size=8", "--model.hidden_size=16"],
            "model.hidden_size",
            16,
            "--model.hidden_size (the last of 2)",
        ),
        (["--compile", "--compile=off"], "training.compile", "off", "--compile (the last of 2)"),
        (
            ["--freeze_layers=wte", "--freeze_layers=wpe"],
            "training.freeze_layers",
            ["wte", "wpe"],
            "--freeze_layers",
        ),
    ],
)
def test_of_a_repeated_flag_the_last_wins_and_explain_shows_it(
    flags: list[str], name: str, value: object, origin: str
) -> None:
    loaded = load_run(TRAIN, [*flags, "--num_heads=2"])
    section, _, setting = name.partition(".")
    assert getattr(getattr(loaded.config, section), setting) == value
    assert re.search(rf"^{re.escape(name)} .* {re.escape(origin)} ", explain(loaded), re.MULTILINE)


def test_a_repeated_flag_with_a_wrong_value_is_an_error_that_names_it() -> None:
    with pytest.raises(UsageError, match=r"--lr \(the last of 2\)"):
        load_run(TRAIN, ["--lr=1", "--lr=x"])


@pytest.mark.parametrize("text", ["null", "none", "None", "NULL"])
def test_a_prompt_may_be_any_word(text: str) -> None:
    assert load_run(GENERATE, ["--prompt", text]).config.inference.prompt == text
    assert load_run(TRAIN, [f"--wandb_project={text}"]).config.training.wandb_project is None
