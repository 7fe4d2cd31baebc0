# Fine-tune GPT-2 XL (1.56 B parameters, downloaded from the Hub) on Shakespeare in 20 steps. It needs a GPU
# with about 40 GB; for a smaller model use --init_from=gpt2 (or gpt2-medium, gpt2-large).
#
#   python data/shakespeare/prepare.py
#   python train_refactored.py config/finetune_shakespeare.py

init_from = "gpt2-xl"
out_dir = "out-shakespeare"
dataset = "shakespeare"

# 1 sequence x 32 micro-batches x 1024 tokens = 32,768 tokens per step; the text has 301,966 training tokens,
# so 20 steps are two epochs
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
