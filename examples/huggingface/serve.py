"""Serve OpenAI's API with `kvpager.Engine`: completions and chats, with streaming.

Packages: pip install "transformers[serving]", with fastapi, uvicorn and openai.
Server: python examples/huggingface/serve.py --port 8000 --memory 4GiB
Client: openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="-")

The server has no authentication, so it listens on the loopback interface only.
"""

import argparse
import json
import sys
import time
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvpager import Engine, KVPagerError
from kvpager.testing import tiny_llama_path

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default=str(tiny_llama_path()))
parser.add_argument("--port", type=int, default=8000)
parser.add_argument("--memory", default="1GiB", help="Bytes of the KV cache.")
args = parser.parse_args()
tokenizer = AutoTokenizer.from_pretrained(args.model)
# The bundled model has no chat template.
template = tokenizer.chat_template or "{% for each in messages %}{{ each['content'] }}{% endfor %}"
model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
engine = Engine(model, tokenizer=tokenizer, memory=args.memory)
app = FastAPI()


class Body(BaseModel):
    model_config = {"extra": "forbid"}  # a setting that is not served is refused, not ignored

    model: str = ""
    prompt: str = ""
    messages: list[dict[str, Any]] | None = None
    max_tokens: int = 64
    max_completion_tokens: int | None = None
    stop: str | list[str] | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stream: bool = False


@app.post("/v1/completions")
@app.post("/v1/chat/completions")
async def complete(body: Body) -> Any:
    text = body.prompt
    if body.messages is not None:
        text = tokenizer.apply_chat_template(
            body.messages, chat_template=template, add_generation_prompt=True, tokenize=False
        )
    # A chat template writes special tokens itself, and the bundled tokenizer would end the prompt
    # with its end-of-text token. Completions of a model with a BOS token need True.
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    sampling: dict[str, Any] = {"do_sample": body.temperature > 0}
    if body.temperature > 0:
        sampling |= {"temperature": body.temperature, "top_p": body.top_p}
    sampling["max_new_tokens"] = body.max_completion_tokens or body.max_tokens
    if body.stop:
        sampling["stop_strings"] = body.stop
    try:
        stream = engine.submit(ids, seed=body.seed, **sampling)
        if body.stream:
            return StreamingResponse(events(stream, body), media_type="text/event-stream")
        output = await stream
    except ValueError as error:
        return refusal(error, 400)
    except KVPagerError as error:  # the queue is full, the request failed, the engine is closed
        return refusal(error, 503)
    num_new = len(output.token_ids)
    usage = {"prompt_tokens": len(ids), "completion_tokens": num_new}
    usage["total_tokens"] = len(ids) + num_new
    reason = output.samples[0].finish_reason
    return answer(stream, body, output.text, reason) | {"usage": usage}


@app.exception_handler(RequestValidationError)
async def invalid(_: Any, error: RequestValidationError) -> JSONResponse:
    found = error.errors()[0]
    return refusal(ValueError(f"{found['loc'][-1]}: {found['msg']}"), 400)


def refusal(error: Exception, status_code: int) -> JSONResponse:
    return JSONResponse({"error": {"message": str(error)}}, status_code=status_code)


async def events(stream: Any, body: Body) -> Any:
    async for piece in stream.text():
        yield f"data: {json.dumps(answer(stream, body, piece, None))}\n\n"
    reason = stream.partial().samples[0].finish_reason
    yield f"data: {json.dumps(answer(stream, body, '', reason))}\n\ndata: [DONE]\n\n"


def answer(stream: Any, body: Body, text: str, reason: str | None) -> dict[str, Any]:
    kind, content = "text_completion", {"text": text}
    if body.messages is not None:
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        part = "delta" if body.stream else "message"
        content = {part: {"role": "assistant", "content": text}}
    choice = {"index": 0, "finish_reason": reason, "logprobs": None} | content
    head = {"id": stream.request_id, "object": kind, "created": int(time.time())}
    return head | {"model": body.model, "choices": [choice]}


with engine:
    print(f"Serving {args.model} at http://127.0.0.1:{args.port}/v1", file=sys.stderr, flush=True)
    uvicorn.run(app, host="127.0.0.1", port=args.port, log_level="warning")
