"""Namespaces: a prompt is reused within its namespace only.

python examples/huggingface/namespaces.py
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvpager
from kvpager.testing import tiny_llama_path

path = tiny_llama_path()
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
system = "You are given a class with a method that opens a file and reads it line by line. " * 3
inputs = tokenizer(system, add_special_tokens=False, return_tensors="pt")

with kvpager.patch(model, prefix_cache=True, memory="64MiB") as patch:
    for namespace in ("acme", "umbrella", "acme", "umbrella"):
        before = patch.stats().prefix_hit_tokens
        with patch.namespace(namespace):
            model.generate(**inputs, max_new_tokens=4, do_sample=False)
        cached = patch.stats().prefix_hit_tokens - before
        print(f"{namespace:9} {cached:4} of {inputs.input_ids.shape[1]} prompt tokens were cached")
