"""Step 2: one attention head over the last eight characters."""
n_layer = 1
n_head = 1
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
