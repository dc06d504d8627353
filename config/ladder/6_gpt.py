"""Top: the whole GPT, larger and with all that train.py has by default, as in config/train_char_cpu.py."""
n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
batch_size = 8
max_iters = 900
eval_interval = 450
log_interval = 50
compile = False
