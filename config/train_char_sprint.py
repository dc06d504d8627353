"""Character-level Shakespeare in seconds: one block and 8 steps on top of the n-gram counts. A smoke test."""
batch_size = 32
block_size = 64
n_layer = 1
ngram = 5  # fewer n-grams take less time to count
max_iters = 8
eval_interval = 8
log_interval = 2
compile = False
