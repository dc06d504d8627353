"""Step 1: a bigram model, which predicts the next character from the last one alone."""
n_layer = 0
n_embd = 32
position = "none"
norm = "none"
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
