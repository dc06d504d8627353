"""Character-level Shakespeare on two CPU cores: about 100 seconds from launch to a validation loss of 1.51.

What brings how much is in the README's table of ablations.
"""
batch_size = 8
block_size = 128
n_layer = 4
n_head = 4
n_embd = 128
max_iters = 900
eval_interval = 450
log_interval = 50
compile = False  # would take 40 s of the two minutes
