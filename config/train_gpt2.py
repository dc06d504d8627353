"""A GPT of 124M parameters on FineWeb, target: the validation loss of GPT-2 (124M), 3.28.

    python prepare.py fineweb --shards=25                         # 2.5 billion tokens, 5.2 GB
    torchrun --nproc_per_node=8 train.py config/train_gpt2.py     # or: python train.py config/train_gpt2.py

Half a million tokens per step (32 x 1024 x 16) for any number of GPUs, 2.49 billion in 4,750 steps. At the measured
542,000 tokens/s of one H200, that is 1.3 hours; on eight, an estimated 10 minutes. Estimated, not measured: a
validation loss of 3.3 (llm.c's GPT-2 reaches 3.28 with 10 billion tokens; Muon and the newer architecture are reported
to need a third to a quarter of them).
"""
dataset = "fineweb"
n_layer = 12
n_head = 12
n_embd = 768
tie_weights = True  # an untied lm_head adds 39M parameters
vocab_multiple = 64  # 50,304 rows instead of 50,257: faster on GPUs
block_size = 1024
batch_size = 32
gradient_accumulation_steps = 16
learning_rate = 2e-3
beta2 = 0.95
warmup_iters = 250
cooldown_frac = 0.4
max_iters = 4750
eval_interval = 250
eval_iters = 320  # 10 million tokens, as in llm.c and modded-nanogpt
