"""Character-level Shakespeare on two CPU cores: about two minutes from launch to a checkpoint."""
batch_size = 12
block_size = 64
n_layer = 4
n_head = 4
n_embd = 128
norm = "layernorm"  # without learned parameters it learns as RMSNorm does, in one kernel where that takes a dozen
max_iters = 1800
eval_interval = 600
log_interval = 50
compile = False  # would take 40 s of the two minutes
