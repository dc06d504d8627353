"""Character-level Shakespeare on two CPU cores: a validation loss of 1.442 in about 125 seconds."""
batch_size = 8
block_size = 128
n_layer = 4
n_head = 4
n_embd = 128
max_iters = 900
eval_interval = 450
log_interval = 50
compile = False  # compilation takes 40 seconds
