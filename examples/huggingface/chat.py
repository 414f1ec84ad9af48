"""Chat: each turn passes the whole conversation to `generate`, which computes the new part only.

python examples/huggingface/chat.py
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvpager
from kvpager.testing import tiny_llama_path

path = tiny_llama_path()
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
system = "The following is about a class that keeps items in a list. " * 4
questions = ["What does the method return? ", "And when the list is empty? ", "Who calls it? "]

print(f"system: {system}")
history = system
with kvpager.patch(model, prefix_cache=True) as patch:
    for question in questions:
        history += question
        inputs = tokenizer(history, add_special_tokens=False, return_tensors="pt")
        before = patch.stats().prefix_hit_tokens
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        length = inputs.input_ids.shape[1]
        cached = patch.stats().prefix_hit_tokens - before
        reply = tokenizer.decode(output[0, length:], skip_special_tokens=True)
        print(f"user: {question}\nassistant: {reply}")
        print(f"        ({cached} of {length} prompt tokens were cached)")
        history += reply + " "
