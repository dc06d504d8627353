"""A GPT of 124M parameters on the web's text, to about the loss of GPT-2's size: 3.28 on FineWeb's validation shard.

    python prepare.py fineweb --shards=25                         # 2.5 billion tokens, 5.2 GB
    torchrun --nproc_per_node=8 train.py config/train_gpt2.py     # or: python train.py config/train_gpt2.py

Half a million tokens a step (32 x 1024 x 16), whatever the number of GPUs; 4,750 steps see 2.49 billion tokens once.
ESTIMATED, not run: a validation loss of 3.3 (llm.c's GPT-2 comes to 3.28 with 10 billion tokens; Muon and the newer
architecture are said to need a third to a quarter of them). 6 x 124M x 2.49 billion = 1.85e18 FLOPs without attention,
at 40 % of an H100's 989 TFLOPS: 1.3 hours on one GPU, 10 minutes on eight, at $2.5 per GPU-hour $3.3 on either.
"""
dataset = "fineweb"
n_layer = 12
n_head = 12
n_embd = 768
tie_weights = True  # untied, the head would add 39M parameters
ngram = 1  # n-gram tables may help here too (arXiv 2501.16975 says so); not tried at this size
vocab_multiple = 64  # 50,257 rows become 50,304, which GPUs multiply faster
block_size = 1024
batch_size = 32
gradient_accumulation_steps = 16
learning_rate = 2e-3
beta2 = 0.95
warmup_iters = 250
cooldown_frac = 0.4
max_iters = 4750
eval_interval = 250
eval_iters = 320  # 10 million tokens, as many as llm.c's and modded-nanogpt's losses are over
