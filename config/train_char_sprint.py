"""Character-level Shakespeare in seconds: one block and 64 steps. The shortest way to see everything work."""
batch_size = 16
block_size = 64
n_layer = 1  # beside the n-gram tables, which do most of the work this early
learning_rate = 1e-2  # twice the default, for so few steps
warmup_iters = 2
max_iters = 64
eval_interval = 64
log_interval = 8
compile = False
