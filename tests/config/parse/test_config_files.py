"""Settings files: what JSON, YAML and Python files may contain, and the messages for those that are not
valid.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from paths import ROOT, SHARED

from llm_trainer.config import UsageError
from llm_trainer.config.parse.command import CommandSpec
from llm_trainer.config.parse.config_files import read_mapping_or_list, read_settings
from llm_trainer.config.parse.loader import load_run
from llm_trainer.config.parse.validation import check_implemented
from llm_trainer.config.schema.scaling_schedule import OPERATIONS, read_schedule

SPEC = CommandSpec("train", "Train.", ("model", "training", "data"), positional_config=True)
CONFIGS = ROOT / "configs"

NANOGPT = """
import time
from math import sqrt
# a comment
out_dir = 'out-x'; eval_interval = 5; eval_iters = 40; log_interval = 1
eval_only = False; always_save_checkpoint = True
init_from = 'scratch'; wandb_log = False; wandb_project = 'owt'; wandb_run_name = 'gpt2-' + str(int(sqrt(4)))
dataset = 'openwebtext'; gradient_accumulation_steps = 5 * 8; batch_size = 12; block_size = 64
n_layer = 2; n_head = 2; n_embd = 8; dropout = 0.1; bias = False
learning_rate = 6e-4; max_iters = 600000; weight_decay = 1e-1; beta1 = 0.9; beta2 = 0.95; grad_clip = 1.0
decay_lr = True; warmup_iters = 2000; lr_decay_iters = 600000; min_lr = 6e-5
backend = 'gloo'; device = 'cpu'; dtype = 'bfloat16'; compile = False; seed = 1337
_mine = object()
def helper(): return 1
"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_every_name_of_nanogpts_train_script_is_a_setting(tmp_path: Path) -> None:
    config = load_run(SPEC, [str(write(tmp_path, "c.py", NANOGPT))]).config
    training = config.training
    assert (training.output_dir, training.distributed_backend, training.precision, training.compile) == (
        "out-x",
        "gloo",
        "bf16",
        "off",
    )
    assert (training.gradient_accumulation_steps, training.global_grad_accumulation) == (40, True)
    assert (training.wandb_run_name, training.report_to, config.data.dataset) == (
        "gpt2-2",
        ["tensorboard"],
        "openwebtext",
    )
    assert (config.model.max_position_embeddings, config.model.bias, training.lr_scheduler) == (
        64,
        False,
        "cosine",
    )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "line 1, column 2: not JSON"),
        ("a.json", '{"seed": 1, "seed": 2}', "seed is set twice, to 1 and 2"),
        ("a.yaml", "a: [", "not YAML"),
        ("a.yaml", "training:\n  seed: 1\n  seed: 2\n", "line 3: seed is set twice"),
        ("a.yaml", "- name: change_lr\n", "pass it as --scaling_schedule_file"),
        ("a.yaml", "just words", "holds a str, not a mapping of settings"),
        (
            "a.yaml",
            "learning_rate: {{ lr }}",
            "line 1: .* cannot be a name; put text with braces or brackets in quotes",
        ),
        ("a.yaml", "? [a]\n: 1", "line 1: .* cannot be a name"),
        ("a.yaml", "x:\n  run_name: 2024-02-30", "'2024-02-30' is not a valid timestamp.* in quotes.*line 2"),
        ("a.yaml", "seed: !!int five", "'five' is not a valid int"),
        ("a.yaml", "a: &a {x: 1}\nb: {<<: *a, y: 1, y: 2}", "line 2: y is set twice"),
        ("a.json", '{"seed": ' + "9" * 5000 + "}", "not JSON: .*digits"),
        ("a.toml", "", "read from .json, .yaml, .yml and .py"),
        ("a.py", "1 / 0", "ZeroDivisionError"),
        ("a.py", "raise SystemExit(3)", "exited with code 3"),
        ("a.py", "x = {1}.__class__\nseed = object()", "seed is a object"),
        ("a.json", '{"train_micro_batch_size_per_gpu": 4}', "--use_deepspeed --deepspeed_config"),
        ("a.json", '{"loaders": {}}', "prepare_domain_datasets.py --config"),
    ],
)
def test_a_file_that_is_not_a_settings_file_is_an_error(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        read_settings(write(tmp_path, name, text))


@pytest.mark.parametrize("text", ["lerning_rate = 1", "training = {'lerning_rate': 1}"])
def test_unknown_names_in_files_are_errors(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="did you mean learning_rate"):
        load_run(SPEC, [str(write(tmp_path, "a.py", text))])


def test_missing_files_folders_and_other_encodings_are_errors(tmp_path: Path) -> None:
    write(tmp_path, "near.json", "{}")
    with pytest.raises(UsageError, match=r"has near\.json"):
        read_settings(tmp_path / "far.json")
    with pytest.raises(UsageError, match="is a folder"):
        read_settings(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("a: é".encode("latin-1"))
    with pytest.raises(UsageError, match="not UTF-8"):
        read_settings(tmp_path / "latin.yaml")
    (tmp_path / "bom.json").write_bytes(b'\xef\xbb\xbf{"seed": 3}')
    assert read_settings(tmp_path / "bom.json")[0].value == 3


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-4", 5e-4),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        ("1.5", 1.5),
        ("7", 7),
        (".inf", float("inf")),
        ("v1.0e", "v1.0e"),
        ("1e", "1e"),
        ("2024-01-01x", "2024-01-01x"),
    ],
)
def test_yaml_numbers_are_read_as_people_write_them(tmp_path: Path, text: str, value: object) -> None:
    content = read_mapping_or_list(write(tmp_path, "n.yaml", f"x: {text}\n"))
    assert content == {"x": value}
    assert isinstance(content, dict)
    assert type(content["x"]) is type(value)


def test_a_yaml_mapping_may_merge_another_and_override_it(tmp_path: Path) -> None:
    text = "one: &one {x: 1, y: 2}\ntwo: &two {<<: *one, y: 3}\nthree: {z: 4, <<: [*two, *one]}\n"
    content = read_mapping_or_list(write(tmp_path, "m.yaml", text))
    assert content == {"one": {"x": 1, "y": 2}, "two": {"x": 1, "y": 3}, "three": {"x": 1, "y": 3, "z": 4}}


SHIPPED = [
    "training_config.json",
    "domain_training_config.json",
    "model_config.json",
    "config.json",
    "base_config.yaml",
    "train_gpt2.py",
    "train_shakespeare_char.py",
    "finetune_shakespeare.py",
]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configurations_load_and_enable_nothing_that_is_not_implemented(name: str) -> None:
    loaded = load_run(SPEC, ["--config", str(CONFIGS / name)])
    check_implemented(loaded.config)
    assert loaded.set_values()


def test_config_and_configs_are_the_same_folder() -> None:
    assert (CONFIGS.parent / "config").resolve() == CONFIGS.resolve()


def test_shipped_yaml_and_python_configurations_begin_with_a_comment() -> None:
    for path in [*CONFIGS.glob("*.yaml"), *CONFIGS.glob("*.py")]:
        assert path.read_text(encoding="utf-8").startswith("# "), path.name


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("basic_scaling.yaml", 6),
        ("progressive_scaling.yaml", 6),
        ("finetune_schedule.yaml", 48),
        ("growth_schedule.yaml", 2),
    ],
)
def test_shipped_schedules_are_valid(name: str, layers: int) -> None:
    path = CONFIGS / name
    assert read_schedule(path, layers=layers)
    loaded = load_run(SPEC, [f"--scaling_schedule_file={path}", f"--n_layer={layers}", "--n_embd=96"])
    check_implemented(loaded.config)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{name: change_lrr, value: 1, trigger_loss: 1}", "did you mean change_lr"),
        (
            "{name: change_lr, value: 0, trigger_loss: 1}",
            "change_lr takes a number above 0, up to 1,000,000, not 0",
        ),
        ("{name: change_lr, value: 0.5}", "would never fire"),
        ("{name: set_batch_size, value: 2.5, trigger_loss: 1}", "an integer above 0"),
        ("{name: freeze_layer, value: attn.4, trigger_loss: 1}", "N below 4"),
        ("{name: freeze_layer, value: head, trigger_loss: 1}", "wte, wpe, ln_f, lm_head"),
        ("{name: set_layer_lora_rank, value: [ln_1.0, 8], trigger_loss: 1}", "attn.N, mlp.N"),
        ("{name: stack_layers, value: [0, 4], trigger_loss: 1}", "from 0 to 3"),
        ("{name: reset_lr_schedule, value: 3, trigger_loss: 1}", "takes null"),
        ("{name: change_lr, value: 1, triger_loss: 1}", "did you mean trigger_loss"),
        ("{name: change_lr, value: 1, max_wait_iters: -1}", "max_wait_iters: -1"),
        ("just words", "is a mapping"),
        ("{name: learning_rate, value: 1, trigger_loss: 1}", "there are change_lr, set_lr"),
        (f"{{name: freeze_layer, value: attn.{'9' * 5000}, trigger_loss: 1}}", "freeze_layer takes"),
        ("{name: grow, value: 1, trigger_loss: 1}", "there are change_lr, set_lr, .*disable_exit"),
        ("{name: set_lr, value: .inf, trigger_loss: 1}", "set_lr takes a number, 0 or more, .* not inf"),
        ("{name: set_lr, value: .nan, trigger_loss: 1}", "set_lr takes"),
        ("{name: change_lr, value: .inf, trigger_loss: 1}", "change_lr takes"),
        ("{name: change_batch_size, value: 1e308, trigger_loss: 1}", "change_batch_size takes"),
        ("{name: set_batch_size, value: .inf, trigger_loss: 1}", "set_batch_size takes"),
        (f"{{name: set_eval_interval, value: {10**400}, trigger_loss: 1}}", "set_eval_interval takes"),
        (f"{{name: set_attn_lora_rank, value: {10**30}, trigger_loss: 1}}", "set_attn_lora_rank takes"),
        (f"{{name: widen_model, value: [{10**30}, 2], trigger_loss: 1}}", "widen_model takes"),
        ("{name: resize_vocabulary, value: {size: .inf}, trigger_loss: 1}", "resize_vocabulary takes"),
        ("{name: prune_mlp, value: [mlp.0, .nan], trigger_loss: 1}", "prune_mlp takes"),
        ("{name: change_lr, value: 1, trigger_loss: 1}", "a factor of 1 has no effect"),
        ("{name: set_lr, value: 0.1, trigger_loss: .nan}", "trigger_loss nan.*no loss is ever"),
        ("{name: set_lr, value: 0.1, trigger_loss: 0}", "trigger_loss 0.*no loss is ever"),
        (
            "{name: set_lr, value: 0.1, trigger_loss: -.inf, max_wait_iters: 5}",
            "trigger_loss -inf.*no loss is ever",
        ),
        (f"{{name: set_lr, value: 0.1, max_wait_iters: {10**30}}}", "max_wait_iters"),
        (
            "{name: set_lr, value: 0.1, mode: identity, trigger_loss: 1}",
            "mode has an effect on stack_layers only",
        ),
        ("{name: set_lr, value: 0.1, approximate: true, trigger_loss: 1}", "approximate .* widen_model only"),
    ],
)
def test_an_invalid_schedule_is_an_error_that_names_the_entry(
    tmp_path: Path, entry: str, message: str
) -> None:
    path = write(tmp_path, "s.yaml", f"- {{name: change_lr, value: 2, trigger_loss: 3}}\n- {entry}\n")
    with pytest.raises(UsageError, match=rf"entry 2.*{message}"):
        read_schedule(path, layers=4)


def test_a_schedule_is_checked_for_the_number_of_layers_at_each_entry(tmp_path: Path) -> None:
    grown = (
        "- {name: stack_layers, value: [0, 0, 1, 1], max_wait_iters: 1}\n"
        "- {name: freeze_layer, value: attn.3, max_wait_iters: 1}\n"
    )
    assert len(read_schedule(write(tmp_path, "s.yaml", grown), layers=2)) == 2
    with pytest.raises(UsageError, match="N below 2"):
        read_schedule(write(tmp_path, "t.yaml", grown.split("\n")[1] + "\n"), layers=2)


def test_every_operation_of_the_design_is_known() -> None:
    page = SHARED / "design" / "operations.md"
    if not page.is_file():
        pytest.skip("the design documents are not next to this clone")
    import re

    rows = [
        line.split("|")[1]
        for line in page.read_text(encoding="utf-8").split("| operation |")[1].splitlines()
        if line.startswith("| `")
    ]
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == set(OPERATIONS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 010", "YAML 1.1 reads 010 as the number 8; write 8, or put text in quotes"),
        ("seed: -0_17", "reads -0_17 as the number -15"),
        ("max_minutes: 1:30", "reads 1:30 as the number 90"),
        ("max_minutes: 1:30:10.5", "reads 1:30:10.5 as the number 5410.5"),
        ("training: {freeze_layers: [attn.0, 010]}", "reads 010"),
        ("010: 1", "reads 010"),
        ("wandb_project: no", "put it in quotes, since YAML reads yes, no, on and off as true and false"),
        ("training: {wandb_run_name: on}", "put it in quotes"),
        ("freeze_layers: [yes, attn.0]", "put it in quotes"),
        ("wandb_run_name: 2020-01-01", "put it in quotes"),
        ("yes: 1", "no setting named 'True'"),
    ],
)
def test_values_that_yaml_reads_otherwise_than_they_look_are_errors(
    tmp_path: Path, text: str, message: str
) -> None:
    path = write(tmp_path, "run.yaml", f"lr: 0.1\n{text}\n")
    with pytest.raises(UsageError, match=re.escape(message)):
        load_run(SPEC, [f"--config={path}"])


def test_numbers_and_switches_that_look_as_they_are_read_are_accepted(tmp_path: Path) -> None:
    text = (
        "seed: 1_000\nmax_steps: 0x1F\nuse_deepspeed: no\nlr: 0.010\nwandb_run_name: '010'\nnum_workers: 0\n"
        "max_minutes: 00.5\n"
    )
    training = load_run(SPEC, [f"--config={write(tmp_path, 'run.yaml', text)}"]).config.training
    assert (training.seed, training.max_steps, training.use_deepspeed) == (1000, 31, False)
    assert (training.learning_rate, training.wandb_run_name, training.num_workers) == (0.01, "010", 0)
    assert training.max_minutes == 0.5


def test_a_missing_file_is_answered_with_the_files_next_to_it_but_not_hidden_ones(tmp_path: Path) -> None:
    for name in ("run.yaml", ".pre-commit-config.yaml"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UsageError, match=r"no file .*rum\.yaml; .* has run\.yaml$"):
        read_settings(tmp_path / "rum.yaml")
