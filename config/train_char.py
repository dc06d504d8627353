"""Character-level Shakespeare with 10.8M parameters, for one GPU: the size of nanoGPT's train_shakespeare_char.py."""
batch_size = 64
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.35  # this and weight_decay against overfitting on a million characters
learning_rate = 1.5e-3  # with n-gram counts, less than the default is better
weight_decay = 1.0
max_iters = 1200
eval_interval = 150
compile = False  # compilation takes longer than the run
