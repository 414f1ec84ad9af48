"""The example server, as OpenAI's own client sees it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")

import openai

from kvpager.testing import tiny_llama_path
from tests.support.servers import free_port, wait_for

ROOT = Path(__file__).resolve().parents[2]
# In bfloat16 no token of the reply is a near tie, which another kernel would decide otherwise.
PROMPT = "The class definition "
GREEDY: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": PROMPT}],
    "max_tokens": 22,
    "temperature": 0,
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    folder = ROOT / "examples" / "huggingface"
    command = ["-m", "uvicorn", "--app-dir", str(folder), "serve:app", "--port", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=output, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    try:
        wait_for(port, process, log)
        url = f"http://127.0.0.1:{port}/v1"
        with openai.OpenAI(base_url=url, api_key="-", timeout=120) as found:
            yield found
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def expected() -> str:
    """The reply of unpatched transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_path())
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_path(), dtype="auto")
    inputs = tokenizer(PROMPT, add_special_tokens=False, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=22, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))


def test_a_reply_is_transformers_own(client: Any, expected: str) -> None:
    reply = client.chat.completions.create(**GREEDY)
    message = reply.choices[0].message
    assert (message.role, message.content) == ("assistant", expected)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.prompt_tokens == len(PROMPT)
    assert reply.usage.completion_tokens == 22


def test_messages_are_joined_by_the_models_template(client: Any, expected: str) -> None:
    messages = [{"role": "system", "content": PROMPT[:9]}, {"role": "user", "content": PROMPT[9:]}]
    reply = client.chat.completions.create(**GREEDY | {"messages": messages})
    assert reply.choices[0].message.content == expected


def test_stop_strings_and_max_completion_tokens_are_served(client: Any) -> None:
    stopped = client.chat.completions.create(stop=["e"], **GREEDY)
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].message.content.endswith("e")
    short = {name: GREEDY[name] for name in ("model", "messages", "temperature")}
    reply = client.chat.completions.create(max_completion_tokens=3, **short)
    assert reply.usage.completion_tokens == 3


def test_a_seed_repeats_a_sampled_reply(client: Any) -> None:
    options = GREEDY | {"temperature": 1, "seed": 7}
    replies = [client.chat.completions.create(**options) for _ in range(2)]
    first, second = (reply.choices[0].message.content for reply in replies)
    assert first == second


def test_a_setting_that_is_not_served_is_refused(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match=r"\nn\n +Extra inputs"):
        client.chat.completions.create(n=2, **GREEDY)


def test_a_streamed_reply_has_the_same_text(client: Any, expected: str) -> None:
    chunks = list(client.chat.completions.create(stream=True, **GREEDY))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert len(chunks) > 2
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "length"]


def test_what_cannot_be_served_is_a_client_error(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="max_new_tokens"):
        client.chat.completions.create(**GREEDY | {"max_tokens": 0})
