"""Character-level Shakespeare with 10.8M parameters, for one GPU: the size of nanoGPT's train_shakespeare_char.py."""
batch_size = 64
block_size = 256
ngram = 1  # n-gram tables were not tested over 32 epochs
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2  # against overfitting on a million characters
max_iters = 2000
eval_interval = 250
compile = False  # compilation takes longer than the run
