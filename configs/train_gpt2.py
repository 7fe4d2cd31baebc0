# GPT-2 124 M on OpenWebText (9 B tokens), as in nanoGPT: about four days on eight A100 40GB, to a loss of
# about 2.85.
#
#   python data/openwebtext/prepare.py
#   torchrun --standalone --nproc_per_node=8 train_refactored.py config/train_gpt2.py

# 12 sequences x 1024 tokens x 5 micro-batches x 8 ranks = 491,520 tokens per step
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

# 600,000 steps x 491,520 = 295 B tokens
max_iters = 600000
lr_decay_iters = 600000
warmup_iters = 2000
learning_rate = 6e-4
min_lr = 6e-5
weight_decay = 1e-1

dataset = "openwebtext"
out_dir = "out-gpt2"

eval_interval = 1000
eval_iters = 200
log_interval = 10

wandb_log = False
wandb_project = "owt"
wandb_run_name = "gpt2-124M"
