"""What becomes of each command of the manuals: how it is scaled down, where it runs, what must be there
afterwards, or why it is owed.

Scaling changes sizes and paths only: values of flags are replaced by small ones, files that a network would
bring are named. A command that is not in `CASES` fails the tests, so a manual cannot gain one unnoticed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

SMALL = {
    "hidden_size": "32",
    "num_layers": "2",
    "num_heads": "4",
    "batch_size": "4",
    "micro_batch_size": "2",
    "max_steps": "4",
    "max_iters": "4",
    "vocab_size": "300",
    "vocab-size": "300",
    "max_length": "32",
    "num_workers": "1",
    "max-tokens": "8",
    "max_new_tokens": "8",
    "num_samples": "2",
    "nproc_per_node": "2",
}
TINY_SHAPE = "--hidden_size 32 --num_layers 2 --num_heads 4 --max_seq_len 32"
TINY_RUN = f"{TINY_SHAPE} --vocab_size 300 --intermediate_size 64 --max_steps 4 --batch_size 4 --save_steps 2 --eval_steps 2 --compile off"
TINY_NANOGPT = "--n_layer=2 --n_head=4 --n_embd=32 --block_size=32 --batch_size=4 --max_iters=4 --warmup_iters=1 --lr_decay_iters=4 --eval_iters=2"
TINY_NANOGPT += (
    " --eval_interval=2 --gradient_accumulation_steps=1 --always_save_checkpoint=True --compile=False"
)


@dataclass(frozen=True)
class Case:
    """`stage`: the folder's state beforehand (see stages.py); `replace`: text → text; `add`: further
    arguments; `makes`: what must be there afterwards; `says`: what must be printed; `owed`: why it is not
    built yet.
    """

    stage: str = "clone"
    replace: dict[str, str] = field(default_factory=dict)
    add: str = ""
    makes: tuple[str, ...] = ()
    says: tuple[str, ...] = ()
    owed: str = ""


def owed(reason: str, stage: str = "clone", *, replace: dict[str, str] | None = None, add: str = "") -> Case:
    """A command that must refuse, in one clear message, until its feature is built."""
    return Case(stage, replace or {}, add, owed=reason)


MODEL = {"models/my_model/final_model": "checkpoints/final_model"}
TEACHER = {"path/to/teacher/model": "checkpoints/final_model"}
OWN_END = {
    "--master_addr=MASTER_IP": "--master_addr=127.0.0.1",
    '--master_addr="192.168.1.1"': "--master_addr=127.0.0.1",
}
ONE_NODE = {
    "--nnodes=4": "--nnodes=1",
    "--nnodes=2": "--nnodes=1",
    "--node_rank=1": "--node_rank=0",
    **OWN_END,
}
TINY_FILE = {
    "config/training_config.json": "tiny/training_config.json",
    "config/domain_training_config.json": "tiny/domain_training_config.json",
}
TINY_DOMAINS = "--tokenizer_vocab_size 300"

ENHANCED = {
    "python train_aio.py --use_knowledge_distillation --use_domain_specific_data "
    "--use_computational_efficiency --use_adaptive_reasoning": owed(
        "distillation and adaptive reasoning", "l1 data", add=TINY_RUN
    ),
    "python scripts/process_data.py --input_dir data/processed --output_dir data/inference --mode inference "
    "--student_model_path "
    "models/final/model.safetensors": Case(
        "all in one", makes=("data/inference/outputs.jsonl", "data/inference/validation_report.json")
    ),
    "python scripts/download_datasets.py --save-format parquet --output-dir data/raw": Case(
        add="--datasets tiny_shakespeare --input data/raw/your_text.txt",  # what the network would bring
        makes=("data/raw/tiny_shakespeare/train-00000.parquet",),
        says=("1 documents in = 1 kept + 0 rejected",),
    ),
    "python scripts/prepare_data.py --data_root data/raw --output_root data/processed": Case(
        add="--vocab_size 300",
        makes=("data/processed/train.txt", "data/processed/val.txt", "data/processed/test.txt"),
    ),
    "python scripts/process_data.py --input_dir data/processed --output_dir data/ready --mode train": Case(
        "l1 data",
        makes=(
            "data/ready/dataset/train-00000.tokens",
            "data/ready/tokenizer.json",
            "data/ready/metadata.json",
        ),
    ),
    "python scripts/prepare_domain_datasets.py --config config/domain_bridge_config.json": Case(
        add=TINY_DOMAINS,
        makes=(
            *(
                f"data/domain_specific/{name}/dataset"
                for name in ("math", "science", "coding", "logic", "reasoning", "general")
            ),
            "data/domain_specific/math/vocabulary.json",
            "data/domain_specific/mixture.json",
        ),
        says=("load_livecodebench", "of the mixture", "tokenizer: 300 tokens"),
    ),
    "python train_aio.py --config config/training_config.json --output_dir models/my_model": Case(
        "ready data",
        {**TINY_FILE},
        "--max_steps 4 --batch_size 4 --gradient_accumulation_steps 1 --compile off",
        makes=("models/my_model/final_model/model.safetensors", "models/my_model/best_model/tokenizer.json"),
    ),
    "python scripts/process_data.py --input_dir data/processed --output_dir data/student_ready --mode "
    "student --student_model_path "
    ""
    "models/my_model/final_model/model.safetensors": owed(
        "the teacher's log-probabilities beside the shards", "l1 run", replace=MODEL
    ),
    "python scripts/process_data.py --input_dir data/student_ready --output_dir data/inference --mode "
    "inference --student_model_path "
    "models/my_model/final_model/model.safetensors": Case(
        "l1 run",
        {**MODEL, "data/student_ready": "data/ready"},
        "--num_samples 2 --max_tokens 4",
        makes=("data/inference/outputs.jsonl", "data/inference/validation_report.json"),
    ),
    "python serve.py --model_path models/my_model/final_model": owed("the server", "clone"),
    "python scripts/prepare_domain_datasets.py --list_loaders": Case(
        says=("load_math", "load_wildchat", "EleutherAI/hendrycks_math", "ODC-BY")
    ),
    "python train_aio.py --use_domain_specific_data --config config/domain_training_config.json": Case(
        "domain data",
        {"config/domain_training_config.json": "tiny/domain_training_config.json"},
        TINY_RUN,
        makes=("models/final/model.safetensors",),
        says=("data/domain_specific", "math 20.0%"),
    ),
    "python train_aio.py --use_knowledge_distillation --teacher_model_path path/to/teacher/model": owed(
        "distillation",
        "l1 run",
        replace=TEACHER,
        add=TINY_RUN,
    ),
    "python train_aio.py --use_computational_efficiency": Case(
        "ready data", add=TINY_RUN, makes=("models/final/model.safetensors",)
    ),
    "python train_aio.py --use_adaptive_reasoning": owed("adaptive reasoning", "ready data", add=TINY_RUN),
    "python evaluate.py --model_path models/my_model/final_model --eval_datasets math,science": owed(
        "benchmarks by domain"
    ),
    "python scripts/run_tests.py --model_path models/my_model/final_model --tests all": owed(
        "checks of a trained model"
    ),
    "python scripts/test_all_reasoning.py --model_path models/my_model/final_model": owed("reasoning suites"),
    'python generate.py --model_path models/my_model/final_model --prompt "Explain quantum computing"': Case(
        "l1 run", MODEL, "--max_tokens 8", says=("Explain quantum computing",)
    ),
    "python serve.py --model_path models/my_model/final_model --port 8000": owed("the server"),
    "python debug_memory.py --model_path models/my_model/final_model": Case(
        "l1 run", MODEL, says=("KV cache", "measured")
    ),
    "python profile_model.py --model_path models/my_model/final_model --batch_size 16": owed("time by layer"),
}

FRAMEWORK_OUTPUT = ("checkpoints/final_model/model.safetensors", "checkpoints/metrics.jsonl")
FRAMEWORK = {
    "python data_prep_tool.py --input_dir ./raw_text_data --output_dir ./processed_data --tokenizer_type bpe "
    "--vocab_size 32000 "
    "--max_length 2048 --num_workers 8": Case(
        makes=("processed_data/tokenizer.json", "processed_data/dataset", "processed_data/metadata.json")
    ),
    "python train.py --data_dir ./processed_data --save_dir ./checkpoints --hidden_size 768 --num_layers 12 "
    "--num_heads 12 --batch_size 32 "
    "--max_steps 100000 --learning_rate 3e-4 --mixed_precision": Case(
        "framework data", makes=FRAMEWORK_OUTPUT
    ),
    "torchrun --nproc_per_node=4 train.py --data_dir ./processed_data --save_dir ./checkpoints --hidden_size "
    "768 --num_layers 12 "
    "--num_heads 12 --batch_size 128 --micro_batch_size 32 --max_steps 100000 --learning_rate 3e-4 "
    "--mixed_precision": Case("framework data", makes=FRAMEWORK_OUTPUT, says=("2 ranks",)),
    'torchrun --nproc_per_node=8 --nnodes=4 --node_rank=0 --master_addr="192.168.1.1" --master_port=29500 '
    "train.py "
    "--data_dir ./processed_data --save_dir ./checkpoints --hidden_size 1024 --num_layers 24 --num_heads 16 "
    "--batch_size 512 --micro_batch_size 16 --max_steps 500000 --learning_rate 3e-4 --mixed_precision": Case(
        "framework data", ONE_NODE, makes=FRAMEWORK_OUTPUT, says=("2 ranks",)
    ),
    'torchrun --nproc_per_node=8 --nnodes=4 --node_rank=1 --master_addr="192.168.1.1" --master_port=29500 '
    "train.py [same args...]": Case(
        "framework data",
        {
            **ONE_NODE,
            "[same args...]": "--hidden_size 32 --num_heads 4 --num_layers 2 --max_steps 4 --batch_size 4 "
            "--micro_batch_size 2",
        },
        makes=FRAMEWORK_OUTPUT,
        says=("2 ranks",),
    ),
    "python train.py --data_dir ./processed_data --save_dir ./checkpoints --hidden_size 256 --num_layers 6 "
    "--num_heads 8 --batch_size 8 "
    "--max_steps 10000 --learning_rate 3e-4": Case("framework data", makes=FRAMEWORK_OUTPUT),
    "python train.py --data_dir ./processed_data --checkpoint ./checkpoints/checkpoint_step_50000.pt [other "
    "args...]": Case(
        "framework run",
        {
            "checkpoint_step_50000": "checkpoint_step_2",
            "[other args...]": "--hidden_size 32 --num_layers 2 --num_heads 4 --learning_rate 1e-4",
        },
        makes=FRAMEWORK_OUTPUT,
        says=("learning_rate: 0.0003 → 0.0001",),
    ),
}

ROOT_CONFIG = {"config.json": "tiny/config.json"}
TRAINER = {
    "torchrun --nproc_per_node=4 scripts/train.py --config config.json": Case(
        "clone", ROOT_CONFIG, makes=FRAMEWORK_OUTPUT, says=("2 ranks",)
    ),
    "python -m torch.distributed.launch --nproc_per_node=4 scripts/train.py --config config.json": Case(
        "clone", ROOT_CONFIG, makes=FRAMEWORK_OUTPUT, says=("2 ranks",)
    ),
    "tensorboard --logdir ./checkpoints/logs": Case(
        "l1 run", add="--inspect", says=("loss", "learning_rate")
    ),
    "python scripts/train.py --config config.json --resume_from_checkpoint ./checkpoints/checkpoint-10000.pt": Case(
        "trainer run",
        {**ROOT_CONFIG, "checkpoint-10000": "checkpoint-2"},
        makes=("checkpoints/best_model/config.json",),
        says=("resuming",),
    ),
}

BASE = {"configs/base_config.yaml": "tiny/base_config.yaml"}
L1 = {
    "python scripts/prepare_data.py --input data/raw/your_text.txt --output data/processed/ --vocab-size "
    "50257 --train-ratio 0.8 "
    "--val-ratio 0.1 --seed 42": Case(
        makes=(
            "data/processed/train.txt",
            "data/processed/val.txt",
            "data/processed/test.txt",
            "data/processed/tokenizer.json",
            "data/processed/dataset",
        )
    ),
    "python scripts/train.py --config configs/base_config.yaml": Case(
        "l1 data", add=TINY_RUN, makes=("checkpoints/best_model/model.safetensors",)
    ),
    "python scripts/train.py --config configs/base_config.yaml --resume checkpoints/checkpoint-1000.pt": Case(
        "l1 run",
        {"checkpoint-1000": "checkpoint-2"},
        TINY_RUN,
        makes=("checkpoints/final_model/model.safetensors",),
        says=("resuming",),
    ),
    "tensorboard --logdir checkpoints/tensorboard": Case(
        "l1 run", add="--inspect", says=("loss", "learning_rate")
    ),
    "python -m torch.distributed.launch --nproc_per_node=2 scripts/train.py --config configs/base_config.yaml": Case(
        "l1 data", add=TINY_RUN, makes=("checkpoints/best_model/model.safetensors",), says=("2 ranks",)
    ),
    "python scripts/evaluate.py --model checkpoints/best_model.pt --data data/processed/test.txt": Case(
        "l1 run", says=("perplexity", "bits per byte")
    ),
    'python scripts/generate.py --model checkpoints/best_model.pt --prompt "The future of AI is" '
    "--max-tokens 100": Case("l1 run", says=("The future of AI is",)),
}

NANOGPT_OUTPUT = ("out-shakespeare-char/best_model/model.safetensors", "out-shakespeare-char/logs/train.log")
# The default data set is OpenWebText, which the network would bring; 2 micro-batches of all ranks are one of
# each.
NANOGPT_ON_TWO = f"{TINY_NANOGPT} --gradient_accumulation_steps=2 --dataset=shakespeare_char --out_dir=out --wandb_log=False".replace(
    " --gradient_accumulation_steps=1", ""
)
NANOGPT_ON_TWO_OUTPUT = ("out/best_model/model.safetensors", "out/logs/train.log")
RESUMED = {"path/to/checkpoints": "out-shakespeare-char"}
ORCHESTRATOR = {
    "python data/shakespeare_char/prepare.py": Case(
        add="--input data/raw/your_text.txt",
        makes=("data/shakespeare_char/dataset/train-00000.tokens", "data/shakespeare_char/tokenizer.json"),
    ),
    "python train_refactored.py config/train_shakespeare_char.py": Case(
        "character data", add=TINY_NANOGPT, makes=NANOGPT_OUTPUT
    ),
    "python train_refactored.py config/train_shakespeare_char.py "
    "--scaling_schedule_file=configs/basic_scaling.yaml": Case(
        "character data",
        {"configs/basic_scaling.yaml": "tiny/basic_scaling.yaml"},
        TINY_NANOGPT,
        makes=(*NANOGPT_OUTPUT, "out-shakespeare-char/operations.jsonl"),
        says=("schedule: 2 operations", 'set_layer_lora_rank ["attn.0", 8]'),
    ),
    "torchrun --standalone --nproc_per_node=4 train_refactored.py config/train_gpt2.py": Case(
        "character data", add=NANOGPT_ON_TWO, makes=NANOGPT_ON_TWO_OUTPUT, says=("2 ranks",)
    ),
    "torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=MASTER_IP --master_port=1234 "
    "train_refactored.py": Case(
        "character data", ONE_NODE, NANOGPT_ON_TWO, makes=NANOGPT_ON_TWO_OUTPUT, says=("2 ranks",)
    ),
    "python train_refactored.py --init_from=resume --out_dir=path/to/checkpoints": Case(
        "character run",
        RESUMED,
        "--max_iters=6 --lr_on_resume=extend",
        makes=NANOGPT_OUTPUT,
        says=("resuming",),
    ),
    "python train_refactored.py --init_from=resume --learning_rate=3e-4 --batch_size=64": Case(
        "character run",
        add="--out_dir=out-shakespeare-char --max_iters=6 --lr_on_resume=extend",
        makes=NANOGPT_OUTPUT,
        says=("learning_rate: 0.001 → 0.0003",),
    ),
    "python train_refactored.py config/train_shakespeare_char.py --attn_lora_rank=16 --embedding_rank=8": Case(
        "character data", add=TINY_NANOGPT, makes=NANOGPT_OUTPUT
    ),
    "python data/shakespeare/prepare.py": Case(
        add="--input data/raw/your_text.txt --ranks ranks.tiktoken",
        makes=("data/shakespeare/dataset/train-00000.tokens",),
    ),
    "python train_refactored.py config/finetune_shakespeare.py "
    "--scaling_schedule_file=configs/finetune_schedule.yaml": Case(
        "character run",
        {
            "config/finetune_shakespeare.py": "config/finetune_shakespeare.py "
            "--init_from=out-shakespeare-char --dataset=shakespeare_char"
        },
        "--max_iters=12 --gradient_accumulation_steps=1 --batch_size=4 --compile=False",
        makes=("out-shakespeare/best_model/model.safetensors", "out-shakespeare/operations.jsonl"),
        says=('freeze_layer "wte"', 'unfreeze_layer "wte"'),
    ),
    "python train_refactored.py --init_from=gpt2-medium --batch_size=32 --learning_rate=3e-4 "
    "--max_iters=50000 "
    "--scaling_schedule_file=configs/progressive_scaling.yaml --wandb_log=True --wandb_project=my_experiment": Case(
        "character run",
        {
            "gpt2-medium": "out-shakespeare-char",
            "configs/progressive_scaling.yaml": "tiny/progressive_scaling.yaml",
            "--wandb_log=True": "",
        },
        "--gradient_accumulation_steps=1 --warmup_iters=1 --eval_iters=1 --dataset=shakespeare_char "
        "--out_dir=out --compile=False",
        makes=("out/best_model/model.safetensors", "out/operations.jsonl"),
        says=("stack_layers [0, 0, 1, 1]", "after the last one: 4 layers × 32"),
    ),
    'python sample.py --init_from=gpt2-xl --start="What is the answer to life, the universe, and '
    'everything?" --num_samples=5 '
    "--max_new_tokens=100": Case(
        "l1 run",
        {
            "gpt2-xl": "checkpoints/best_model",
            " to life, the universe, and everything?": "",
        },  # the tiny model's context is 32
        says=("What is the answer",),
    ),
    'python sample.py --out_dir=out-shakespeare-char --start="ROMEO:"': Case(
        "character run", {"ROMEO:": "line"}, "--max_new_tokens=8", says=("line",)
    ),
    "python sample.py --start=FILE:prompt.txt --out_dir=path/to/model": Case(
        "character run",
        {"path/to/model": "out-shakespeare-char"},
        "--max_new_tokens=8 --num_samples=1",
        says=("line 7",),
    ),
}

CASES = {
    "Enhanced": ENHANCED,
    "Framework": FRAMEWORK,
    "Trainer": TRAINER,
    "L1": L1,
    "Orchestrator": ORCHESTRATOR,
}


def scaled(text: str, case: Case) -> str:
    """The command with its own replacements made, sizes made small, and further arguments added."""
    for old, new in case.replace.items():
        assert old in text or old in {**ONE_NODE, **TINY_FILE}, f"{old!r} is not in {text!r}"
        text = text.replace(old, new)
    for flag, value in SMALL.items():
        text = re.sub(rf"(--{flag}[ =])\S+", rf"\g<1>{value}", text)
    return f"{text} {case.add}".strip()
