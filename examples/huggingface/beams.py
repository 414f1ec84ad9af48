"""Beams share the blocks of the prompt and of the tokens that they have in common.

python examples/huggingface/beams.py
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvpager
from kvpager.testing import tiny_llama_path

path = tiny_llama_path()
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
inputs = tokenizer("If the file is not found, " * 12, add_special_tokens=False, return_tensors="pt")

with kvpager.patch(model) as patch:
    best = model.generate(**inputs, num_beams=8, num_return_sequences=3, max_new_tokens=24)
    stats = patch.stats()

print("\n".join(tokenizer.batch_decode(best[:, inputs.input_ids.shape[1] :])))
print(f"8 beams at their peak: {stats.peak_held_bytes / 2**20:.1f} MiB in blocks, ", end="")
print(f"{stats.peak_dense_bytes / 2**20:.1f} MiB in DynamicCache; ", end="")
print(f"{stats.copied_blocks} blocks were copied")
