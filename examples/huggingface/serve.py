"""Serve OpenAI's API with `kvpager.Engine`: completions and chats, with streaming.

pip install "transformers[serving]"
python examples/huggingface/serve.py --port 8000 --memory 4GiB

Client: openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="-")
The server has no authentication, so it listens on the loopback interface only.
"""

import argparse
import json
import time
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvpager import Engine, KVPagerError
from kvpager.testing import tiny_llama_path

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=str(tiny_llama_path()))
parser.add_argument("--port", type=int, default=8000)
parser.add_argument("--memory", default="1GiB")
args = parser.parse_args()
tokenizer = AutoTokenizer.from_pretrained(args.model)
if tokenizer.chat_template is None:  # as in the bundled model
    tokenizer.chat_template = "{% for each in messages %}{{ each['content'] }}{% endfor %}"
model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
app = FastAPI()


class Body(BaseModel, extra="forbid"):  # a setting that is not served is refused, not ignored
    model: str
    prompt: str = ""
    messages: list[dict[str, Any]] | None = None
    max_tokens: int = 64
    max_completion_tokens: int | None = None
    stop: str | list[str] | None = None
    temperature: float = 1.0
    seed: int | None = None
    stream: bool = False


@app.post("/v1/completions")
@app.post("/v1/chat/completions")
async def complete(given: dict[str, Any]) -> Any:
    try:
        body = Body(**given)
        text = body.prompt
        if body.messages is not None:
            text = tokenizer.apply_chat_template(
                body.messages, add_generation_prompt=True, tokenize=False
            )
        stream = engine.submit(
            tokenizer(text, add_special_tokens=False),  # a chat template writes its own
            max_new_tokens=body.max_completion_tokens or body.max_tokens,
            do_sample=body.temperature != 0,
            temperature=body.temperature or None,
            stop_strings=body.stop or None,
            seed=body.seed,
        )
        if body.stream:
            return StreamingResponse(events(stream, body), media_type="text/event-stream")
        output = await stream
    except (ValueError, KVPagerError) as error:  # a wrong request, or for example a full queue
        status = 400 if isinstance(error, ValueError) else 503
        return JSONResponse({"error": {"message": str(error)}}, status)
    num_prompt, num_new = len(output.prompt_token_ids), len(output.token_ids)
    usage = {"prompt_tokens": num_prompt, "completion_tokens": num_new}
    usage["total_tokens"] = num_prompt + num_new
    return answer(stream, body, output.text, output.samples[0].finish_reason) | {"usage": usage}


async def events(stream: Any, body: Body) -> Any:
    async for piece in stream.text():
        yield f"data: {json.dumps(answer(stream, body, piece, None))}\n\n"
    reason = stream.partial().samples[0].finish_reason
    yield f"data: {json.dumps(answer(stream, body, '', reason))}\n\ndata: [DONE]\n\n"


def answer(stream: Any, body: Body, text: str, reason: str | None) -> dict[str, Any]:
    kind, content = "text_completion", {"text": text}
    if body.messages is not None:
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        content = {"delta" if body.stream else "message": {"role": "assistant", "content": text}}
    choice = content | {"index": 0, "finish_reason": reason}
    head = {"id": stream.request_id, "object": kind, "created": int(time.time())}
    return head | {"model": body.model, "choices": [choice]}


with Engine(model, tokenizer=tokenizer, memory=args.memory) as engine:
    uvicorn.run(app, host="127.0.0.1", port=args.port)
