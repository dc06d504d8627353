"""Character-level Shakespeare in seconds: one block and 16 steps on top of the n-gram counts. A smoke test."""
batch_size = 16
block_size = 64
n_layer = 1
ngram = 5  # fewer n-grams take less time to count
learning_rate = 1e-2  # twice the default for a short run
warmup_iters = 2
max_iters = 16
eval_interval = 16
log_interval = 4
compile = False
