"""Character-level Shakespeare on two CPU cores, in half an hour: 1.9M parameters, 18 epochs."""
batch_size = 8
block_size = 256
n_layer = 4
n_head = 6
n_embd = 192
dropout = 0.2  # against overfitting on a million characters
learning_rate = 1.5e-3  # with n-gram counts, less than the default is better
max_iters = 8960
eval_interval = 1280
log_interval = 128
compile = False
