"""Run vLLM with kvpager's tiers: find a prompt that left the device in host memory, or on disk.

    python examples/vllm/offload.py MODEL FOLDER        # run it twice: the second finds the prompt

MODEL is a local directory. Prints how many tokens of the prompt were not computed.
"""

import sys

from vllm import LLM, SamplingParams

from kvpager.integrations.vllm import offload

PROMPT = [3 + number % 1000 for number in range(600)]  # or a text, for a model with a tokenizer


def main(model: str, folder: str) -> None:
    tiers = [f"disk:{folder}?capacity=1GiB"]
    llm = LLM(
        model,
        kv_transfer_config=offload(host_memory="64MiB", tiers=tiers),
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=1024,
        block_size=32,
    )
    settings = SamplingParams(max_tokens=4, temperature=0, detokenize=False)
    for when in ("first", "after a reset"):
        [output] = llm.generate([{"prompt_token_ids": PROMPT}], settings, use_tqdm=False)
        print(when, output.num_cached_tokens, list(output.outputs[0].token_ids))
        llm.generate([{"prompt_token_ids": [7] * 40}], settings, use_tqdm=False)  # saves go out
        llm.reset_prefix_cache()  # the device forgets; kvpager does not
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
