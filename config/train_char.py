"""Character-level Shakespeare, 10.8M parameters: the size of nanoGPT's example of this name. For one GPU."""
batch_size = 64
block_size = 256
ngram = 1  # of nanoGPT's size; n-gram tables were not tried over the 32 epochs that this run takes
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2  # a million characters are few for this size: without it the model learns them by heart
max_iters = 2000
eval_interval = 250
compile = False  # would take longer than the run
