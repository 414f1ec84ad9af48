"""Prompts, and their tokens from `generate` alone and from an engine."""

import random

import torch

from kvpager.integrations.huggingface.engine import Engine

NEW = 16


def some_prompts(model, count=7, longest=40, seed=1):
    source = random.Random(seed)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return [
        [source.randrange(3, vocabulary) for _ in range(source.randint(1, longest))]
        for _ in range(count)
    ]


def alone(model, prompt, **settings):
    """Return the new tokens of `generate` for one prompt."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | settings
    tokens = model.generate(torch.tensor([prompt]), **settings)[0].tolist()
    return tokens[1 if model.config.is_encoder_decoder else len(prompt) :]


def batched(model, prompts, settings=None, **options):
    settings = {"max_new_tokens": NEW, "do_sample": False} | (settings or {})
    with Engine(model, **{"memory": "8MiB", "max_batch_tokens": 24} | options) as engine:
        outputs = engine.generate(prompts, **settings)
        assert_nothing_is_held(engine)
    return [output.token_ids for output in outputs]


def assert_nothing_is_held(engine):
    engine.submit([5], max_new_tokens=1).result()  # its plan tells of the ends before
    while engine.stats().scheduler.num_running:
        pass
    assert engine.stats().pool.num_held == 0
    assert engine.stats().pool.num_sequences == 0
    engine._core.scheduler.check()
