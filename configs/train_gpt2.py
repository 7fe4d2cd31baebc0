# GPT-2 124 M on OpenWebText (9 B tokens), as nanoGPT trains it on eight A100 40GB in about four days, to a
# loss of about 2.85.
#

# 12 sequences x 1024 tokens x 5 micro-batches x 8 ranks = 491,520 tokens a step
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
