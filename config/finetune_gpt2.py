"""Finetune GPT-2 (124M parameters) on a text prepared with `python prepare.py --tokenizer=gpt2`. For one GPU.

The weights are fetched once, 548 MB. On tiny Shakespeare: expected around 2.9 to 3.1 nats a token (nanoGPT publishes
2.9), in a few minutes on one GPU; not measured by us.
"""
init_from = "gpt2"
dataset = "gpt2"
dropout = 0.1  # 300,000 tokens of Shakespeare are soon learnt by heart; best.pt keeps the model from before that
optimizer = "adamw"  # as GPT-2 was trained: Muon's updates are of full rank, which undoes more of what it knows
learning_rate = 3e-5
decay_lr = False
weight_decay = 0.1
batch_size = 1
gradient_accumulation_steps = 32  # 32,768 tokens an update: nine updates go once through tiny Shakespeare
max_iters = 100
warmup_iters = 5
eval_interval = 10
log_interval = 5
