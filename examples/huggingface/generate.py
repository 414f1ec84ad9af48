"""One line puts a model's KV cache into shared blocks. The tokens stay the same.

python examples/huggingface/generate.py
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvpager
from kvpager.testing import tiny_llama_path

path = tiny_llama_path()  # a small trained model in the package; use any other model here
tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
prompts = ["This method ", "When an instance of the class is created, the ", "An exception "]
inputs = tokenizer(prompts, padding=True, add_special_tokens=False, return_tensors="pt")

expected = model.generate(**inputs, max_new_tokens=40, do_sample=False)

with kvpager.patch(model) as patch:
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    print(patch.report())

print()
print("\n".join(tokenizer.batch_decode(output, skip_special_tokens=True)))
print("the same tokens as without kvpager:", torch.equal(output, expected))
