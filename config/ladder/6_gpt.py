"""Step 6: the run of config/train_char_cpu.py, RoPE, RMSNorm, n-gram counts and Muon included."""
n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
batch_size = 8
learning_rate = 2e-3
max_iters = 900
eval_interval = 450
log_interval = 50
compile = False
