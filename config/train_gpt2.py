"""A GPT of 124M parameters on many GPUs: torchrun --nproc_per_node=8 train.py config/train_gpt2.py

Half a million tokens a step, whatever the number of GPUs. Needs a large text: `python prepare.py tinystories
--tokenizer=gpt2` (0.5 billion tokens, 2 GB to download) is the largest that prepare.py knows by name.
"""
dataset = "gpt2"
size = "gpt2"
tied_head = True  # untied, the head would add 39M parameters
vocab_multiple = 64  # 50,257 rows become 50,304, which GPUs multiply faster
block_size = 1024
batch_size = 32
gradient_accumulation_steps = 16
learning_rate = 2e-3
beta2 = 0.95
warmup_iters = 250
decay_share = 0.4
max_iters = 5000
eval_interval = 250
eval_iters = 20
