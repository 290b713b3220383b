"""Replies of checkpoints to the quickstart's held-out posts, in a process of its own: replies.py DATA CHECKPOINT … → JSON lists."""

import json
import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

prompts = load_dataset(sys.argv[1], split="test")["prompt"]
answers = []
for checkpoint in sys.argv[2:]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    inputs = tokenizer.apply_chat_template(list(prompts), add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True)
    torch.manual_seed(0)
    ids = model.generate(**inputs, max_new_tokens=200, do_sample=True, temperature=1.0, top_k=0)
    answers.append(tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(json.dumps(answers))
