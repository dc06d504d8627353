"""Step 3: four attention heads, each with a quarter of the channels."""
n_layer = 1
n_head = 4  # was 1
mlp = False
residual = False
norm = "none"
n_embd = 32
position = "learned"
zero_init = False
qk_norm = False
ngram = 1
learning_rate = 1e-2
block_size = 8
batch_size = 32
max_iters = 5000
eval_interval = 1000
log_interval = 500
compile = False
