"""First rung: a bigram model. The next character from the last one alone; it ends near a loss of 2.5."""
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
