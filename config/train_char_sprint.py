"""Character-level Shakespeare in seconds: one block and 64 steps. A smoke test."""
batch_size = 16
block_size = 64
n_layer = 1  # the n-gram tables matter more in so few steps
learning_rate = 1e-2  # twice the default for a short run
warmup_iters = 2
max_iters = 64
eval_interval = 64
log_interval = 8
compile = False
