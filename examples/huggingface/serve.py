"""Many requests at once: continuous batching of a transformers model.

Requests of unlike lengths and settings come and go; each step computes a token for all that run,
and parts of the prompts of those that begin, in one forward pass without padding.

python examples/huggingface/serve.py
"""

from __future__ import annotations

import asyncio

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvpager import Engine
from kvpager.testing import tiny_llama_path

path = tiny_llama_path()
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")


def encode(text: str) -> list[int]:
    """The ids of a text."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


async def client(engine: Engine, text: str) -> str:
    """One of many users: reads its text as it comes."""
    stream = engine.submit(encode(text), max_new_tokens=24, do_sample=False)
    return "".join([piece async for piece in stream.text()])


async def serve(engine: Engine, texts: list[str]) -> list[str]:
    """All users at once."""
    return await asyncio.gather(*(client(engine, text) for text in texts))


texts = ["The with statement ", "An exception is ", "A function that ", "The with statement "]
with Engine(model, tokenizer=tokenizer, memory="16MiB") as engine:
    replies = asyncio.run(serve(engine, texts))
    for text, reply in zip(texts, replies, strict=True):
        print(f"{text!r} goes on: {reply!r}")

    # Four samples of one prompt: computed once, its blocks shared.
    torch.manual_seed(0)
    output = engine.submit(
        encode("The with statement "), max_new_tokens=12, do_sample=True, num_return_sequences=4
    ).result()
    for sample in output.samples:
        print(f"sampled: {sample.text!r}")
    stats = engine.stats()
    print(
        f"{stats.scheduler.total_tokens} tokens in {stats.scheduler.total_steps} steps, "
        f"{stats.pool.total_copied} blocks copied on write"
    )

inputs = torch.tensor([encode(texts[0])])
alone = model.generate(inputs, max_new_tokens=24, do_sample=False)[0, inputs.shape[1] :]
print("the same tokens as alone:", tokenizer.decode(alone) == replies[0])
