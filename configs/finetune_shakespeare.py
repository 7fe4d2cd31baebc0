# GPT-2 XL (1.56 B parameters, fetched from the hub) taught Shakespeare in 20 steps; needs a GPU with 40 GB or
# so. A smaller one: --init_from=gpt2 (or gpt2-medium, gpt2-large).
#

init_from = "gpt2-xl"
out_dir = "out-shakespeare"
dataset = "shakespeare"

# 1 sequence x 32 micro-batches x 1024 tokens = 32,768 tokens a step; the text has 301,966 training tokens, so
# 20 steps are two passes
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5  # a twentieth of pretraining's, held constant
decay_lr = False
warmup_iters = 0

eval_interval = 5
eval_iters = 40
always_save_checkpoint = False  # only when the validation loss improves

wandb_log = False
wandb_project = "shakespeare"
wandb_run_name = "ft-gpt2-xl"
