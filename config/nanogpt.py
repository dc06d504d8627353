"""nanoGPT's defaults: `python train.py config/nanogpt.py THEIR_CONFIG.py` reproduces nanoGPT's settings.

A GPT-2 of 124M parameters on data/openwebtext. device, dtype and compile stay "auto".
"""
dataset = "openwebtext"
wandb_project = "owt"
wandb_run_name = "gpt2"
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
vocab_multiple = 64  # 50304 rows for GPT-2's 50257 tokens
bias = False
position = "learned"
norm = "layernorm"
norm_affine = True
qk_norm = False
ngram = 1
activation = "gelu"
tie_weights = True
zero_init = False
optimizer = "adamw"
learning_rate = 6e-4
beta2 = 0.95
schedule = "cosine"
warmup_iters = 2000
lr_decay_iters = 600000
min_lr = 6e-5
batch_size = 12
gradient_accumulation_steps = 5 * 8
max_iters = 600000
eval_interval = 2000
eval_iters = 200
log_interval = 1
