"""Character-level Shakespeare on two CPU cores, in one to two minutes."""
batch_size = 8
block_size = 128
n_layer = 4
n_head = 4
n_embd = 128
learning_rate = 2e-3  # with n-gram counts, less than the default is better
max_iters = 900
eval_interval = 450
log_interval = 50
compile = False  # compilation takes 40 seconds
