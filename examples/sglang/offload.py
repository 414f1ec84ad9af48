"""Run SGLang with a store of kvpager: find a prompt on disk that an earlier run computed.

    python examples/sglang/offload.py MODEL FOLDER    # run it twice: the second finds the prompt

MODEL is a local directory. Prints how many tokens of the prompt came from the store. A third
argument "cpu" selects what SGLang needs on a CPU.
"""

import sys
import time

import sglang

from kvpager.integrations.sglang import offload

PROMPT = [3 + number % 1000 for number in range(600)]  # or a text, for a model with a tokenizer
ON_A_CPU = {
    "device": "cpu",
    "dtype": "float32",
    "attention_backend": "torch_native",
    "grammar_backend": "none",
    "disable_cuda_graph": True,
    "disable_overlap_schedule": True,
    "hicache_io_backend": "direct",
    "hicache_mem_layout": "page_first_direct",
}


def main(model: str, folder: str, device: str = "") -> None:
    engine = sglang.Engine(
        model_path=model,
        skip_tokenizer_init=True,
        page_size=16,
        max_total_tokens=4096,
        **offload(f"disk:{folder}?capacity=1GiB"),
        **(ON_A_CPU if device == "cpu" else {}),
    )
    settings = {"max_new_tokens": 4, "temperature": 0}
    reply = engine.generate(input_ids=PROMPT, sampling_params=settings)
    cached = reply["meta_info"].get("cached_tokens_details") or {}
    print(cached.get("storage", 0), "tokens from stores", reply["output_ids"])
    while not engine.flush_cache().success:  # SGLang is idle when all pages are saved
        time.sleep(0.1)
    engine.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
