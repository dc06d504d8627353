"""Step 6: the GPT of config/train_char_cpu.py, with all defaults of train.py."""
n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
batch_size = 8
max_iters = 900
eval_interval = 450
log_interval = 50
compile = False
