"""The smallest language model: the next character from the last one alone. It ends near a loss of 2.5."""
n_layer = 0
position = "none"
batch_size = 32
block_size = 8
max_iters = 3000
eval_interval = 1000
log_interval = 100
