"""Finetune GPT-2 (124M parameters) on a text prepared with `python prepare.py --tokenizer=gpt2`. For one GPU.

Downloads the weights once, 548 MB. nanoGPT publishes a validation loss of 2.9 on tiny Shakespeare; not measured here.
"""
init_from = "gpt2"
dataset = "gpt2"
dropout = 0.1  # against overfitting on 300,000 tokens; best.pt keeps the lowest validation loss
optimizer = "adamw"  # the optimizer of the pretraining; Muon's full-rank updates change the weights more
learning_rate = 3e-5
decay_lr = False
weight_decay = 0.1
batch_size = 8
gradient_accumulation_steps = 4  # 32,768 tokens per step: an epoch of tiny Shakespeare is nine steps
max_iters = 100
eval_interval = 10
log_interval = 5
