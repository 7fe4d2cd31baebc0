# A small character model of Shakespeare's plays (1.1 MB): 10.7 M parameters, a few minutes on a GPU.
# nanoGPT's README reports a validation loss of 1.4697 after about 3 minutes on an A100.
#
#   python data/shakespeare_char/prepare.py
#   python train_refactored.py config/train_shakespeare_char.py
#
# On the CPU of a laptop, make it smaller:
#   --n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --batch_size=12 --max_iters=2000
#   --lr_decay_iters=2000 --dropout=0.0

out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256  # context, in characters
dropout = 0.2  # 1 M characters are few: the model sees each of them 80 times

# 64 sequences x 256 characters = 16,384 characters per step
batch_size = 64
gradient_accumulation_steps = 1
max_iters = 5000

learning_rate = 1e-3  # small models tolerate more
min_lr = 1e-4
lr_decay_iters = 5000
warmup_iters = 100
beta2 = 0.99  # few tokens per step: average the squared gradients over more steps

eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # the model overfits towards the end; the best one is kept

wandb_log = False
wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt"
