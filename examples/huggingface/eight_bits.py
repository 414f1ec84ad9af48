"""Store keys and values in eight bits: about half of bfloat16's memory. Tokens may differ.

python examples/huggingface/eight_bits.py
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvpager
from kvpager.testing import tiny_llama_path

path = tiny_llama_path()
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
inputs = tokenizer("The return value is ", add_special_tokens=False, return_tensors="pt")

for kv_cache_dtype in (None, "int8", "fp8_e4m3"):
    with kvpager.patch(model, kv_cache_dtype=kv_cache_dtype) as patch:
        output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        held = patch.stats().peak_held_bytes / 1024
    print(f"{kv_cache_dtype or 'bfloat16':9} {held:5.1f} KiB  {tokenizer.decode(output[0])}")
