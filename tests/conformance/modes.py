"""Everything that transformers can do with a cache, as functions that return what can be compared.

A mode takes a `Case` - a model and what it is fed - and does the same whether the model is patched
or not. What it returns is nested dictionaries and lists of tensors, numbers and names. A part that
transformers refuses is the name of its error; a mode that it refuses as a whole raises.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers import WatermarkingConfig as Watermark

from tests.conformance import caches
from tests.conformance.case import EQUAL, LONG, ONE, UNLIKE, Case, Mode, run, text, with_options
from tests.support import tiny_models

# Tokens that end a row: random text meets one of them sooner or later, unlike rows at unlike steps.
ENDS = list(range(3, tiny_models.VOCAB, 9))


# ---------------------------------------------------------------- ways to choose tokens


def greedy_one_row(case: Case) -> Any:
    inputs = case.inputs(ONE)
    inputs.pop("attention_mask", None)
    return text(case, inputs)


def sampling(case: Case) -> Any:
    return [text(case, do_sample=True, seed=seed) for seed in (1, 2, 3)]


def stop_strings(case: Case) -> Any:
    words = [f"w{end}" for end in ENDS]
    return text(case, stop_strings=words, tokenizer=_tokenizer(), max_new_tokens=24)


@functools.cache
def _tokenizer() -> Any:
    words = {f"w{token}": token for token in range(tiny_models.VOCAB - 1)}
    words["abcdef"] = tiny_models.VOCAB - 1  # the word that transformers measures others by
    tokenizer = Tokenizer(models.WordLevel(words, "w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w1")


def guidance(case: Case) -> Any:
    negative = tiny_models.prompts(list(ONE), seed=3)["input_ids"]
    return text(case, case.inputs(ONE), guidance_scale=1.5, negative_prompt_ids=negative)


def forced_words(case: Case) -> Any:
    return text(case, num_beams=3, force_words_ids=[[7], [9, 11]])


# ---------------------------------------------------------------- drafts, pieces, long text


def long_text(case: Case) -> Any:
    return text(case, case.inputs(LONG), max_new_tokens=40)


def long_beams(case: Case) -> Any:
    return text(case, case.inputs(LONG), max_new_tokens=24, num_beams=3)


def prompt_lookup(case: Case) -> Any:
    ids = torch.tensor([[5, 9, 33, 71, 12, 40] * 4])
    inputs = case.adapted({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return text(case, inputs, prompt_lookup_num_tokens=4, max_new_tokens=24)


def assisted(case: Case) -> Any:
    """Once by an assistant that is always right, once by one that is mostly wrong."""
    return [
        text(case, case.inputs(ONE), assistant_model=case.assistant(seed), max_new_tokens=20)
        for seed in (0, 1)
    ]


def assisted_sampling(case: Case) -> Any:
    options = {"assistant_model": case.assistant(1), "do_sample": True}
    return text(case, case.inputs(ONE), max_new_tokens=20, **options)


def chunked_prefill(case: Case) -> Any:
    return [text(case, prefill_chunk_size=size, max_new_tokens=6) for size in (1, 5, 16)]


def chunked_beams(case: Case) -> Any:
    return text(case, prefill_chunk_size=5, num_beams=3)


def embeddings(case: Case) -> Any:
    inputs = case.inputs()
    embeds = case.model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    inputs["inputs_embeds"] = embeds
    return [text(case, inputs, num_beams=beams) for beams in (1, 3)]


# ---------------------------------------------------------------- other outputs, and training


def attentions(case: Case) -> Any:
    """As `eager` returns them: other implementations have none."""
    before = case.model.config._attn_implementation
    case.model.set_attn_implementation("eager")
    try:
        return _extra(case, "attentions")
    finally:
        case.model.set_attn_implementation(before)


def hidden_states(case: Case) -> Any:
    return _extra(case, "hidden_states")


def _extra(case: Case, kind: str) -> Any:
    """Return an extra output, such as attentions. Rows have equal lengths, so none has padding."""
    names = (kind, f"encoder_{kind}", f"decoder_{kind}", f"cross_{kind}")
    found = []
    for beams in (1, 2):
        options = {f"output_{kind}": True, "num_beams": beams, "max_new_tokens": 5}
        output = run(case, case.inputs(EQUAL), **options)
        found.append({name: output[name] for name in names if output.get(name) is not None})
    return found


class _Streamer:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[Any] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.tokens.append(tokens.clone())

    def end(self) -> None:
        self.tokens.append("end")


def streamer(case: Case) -> Any:
    """From a thread, as text is streamed to people."""
    streamer, outcome = _Streamer(), []

    def work() -> None:
        try:
            outcome.append(text(case, case.inputs(ONE), streamer=streamer))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return {"result": outcome[0], "streamed": streamer.tokens}


def training(case: Case) -> Any:
    """Loss and gradients of a step in training mode, dropout and all."""
    model, inputs = case.model, case.inputs()
    torch.manual_seed(7)
    labels = tiny_models.prompts(list(UNLIKE), seed=5)["input_ids"]
    labels = labels if case.has_encoder else inputs["input_ids"]
    model.train()
    try:
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        gradients = {
            name: parameter.grad.clone()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
    finally:
        model.zero_grad()
        model.eval()
    return {"loss": loss.detach(), "gradients": gradients}


def named_cache(name: str) -> Mode:
    options = {"cache_implementation": name, "max_new_tokens": 6}
    return lambda case: [text(case, **options), text(case, **options, num_beams=2)]


# group -> name -> mode
MODES: dict[str, dict[str, Mode]] = {
    "tokens": {
        "greedy": with_options(),
        "greedy, one row": greedy_one_row,
        "sampling": sampling,
        "three samples each": with_options(do_sample=True, num_return_sequences=3),
        "top-k, top-p, temperature": with_options(
            do_sample=True, top_k=20, top_p=0.9, temperature=0.7
        ),
        "unlike ends": with_options(eos_token_id=ENDS, max_new_tokens=24),
        "stop strings": stop_strings,
        "logits processors": with_options(
            repetition_penalty=1.3,
            no_repeat_ngram_size=2,
            min_new_tokens=6,
            eos_token_id=ENDS,
            bad_words_ids=[[34]],
        ),
        "watermark": with_options(watermarking_config=Watermark(bias=2.5), do_sample=True),
        "guidance": guidance,
    },
    "beams": {
        "two beams": with_options(num_beams=2, num_return_sequences=2),
        "four beams": with_options(num_beams=4, num_return_sequences=3),
        "beam sampling": with_options(num_beams=3, num_return_sequences=2, do_sample=True),
        "beams with unlike ends": with_options(
            num_beams=3, eos_token_id=ENDS, length_penalty=0.6, early_stopping=True
        ),
    },
    "moved out": {
        "group beams": with_options(num_beams=4, num_beam_groups=2, diversity_penalty=0.5),
        "forced words": forced_words,
        "contrastive search": with_options(penalty_alpha=0.6, top_k=4),
        "dola": with_options(dola_layers="low"),
    },
    "long": {"long text": long_text, "long text with beams": long_beams},
    "drafts": {
        "prompt lookup": prompt_lookup,
        "assistant": assisted,
        "assistant, sampling": assisted_sampling,
    },
    "prefill": {
        "chunked prefill": chunked_prefill,
        "chunked prefill with beams": chunked_beams,
        "input embeddings": embeddings,
    },
    "caches": {
        "continuation": caches.continuation,
        "continuation with beams": caches.continuation_with_beams,
        "copies of a cache": caches.copies,
        "a cache for forward": caches.own_cache,
        "a cache for generate": caches.given_cache,
        "what a cache shows": caches.cache_format,
        "operations on a cache": caches.cache_operations,
    },
    "outputs": {"attentions": attentions, "hidden states": hidden_states, "streamer": streamer},
    "training": {"training": training},
    "other caches": {
        "no cache": with_options(use_cache=False),
        "dynamic": named_cache("dynamic"),
        "static": named_cache("static"),
        "offloaded": named_cache("offloaded"),
        "offloaded static": named_cache("offloaded_static"),
        "quantized": named_cache("quantized"),
    },
}
