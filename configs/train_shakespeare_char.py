# A small character model of Shakespeare's plays (1.1 MB): 10.7 M parameters, minutes on a GPU.
# nanoGPT's README gives a validation loss of 1.4697 for it, after about 3 minutes on an A100.
#
#
# On a laptop's CPU make it smaller:

out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256  # context, in characters
dropout = 0.2  # 1 M characters are few: this model has seen each of them 80 times by the end

# 64 sequences x 256 characters = 16,384 characters a step
batch_size = 64
gradient_accumulation_steps = 1
max_iters = 5000

learning_rate = 1e-3  # small models bear more
min_lr = 1e-4
lr_decay_iters = 5000
warmup_iters = 100
beta2 = 0.99  # few tokens a step: average the gradients' squares for longer

eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # it overfits towards the end; the best model is kept

wandb_log = False
wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt"
