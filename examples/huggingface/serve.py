"""Serve OpenAI's chat completions with `kvpager.Engine`, whole or streamed.

pip install "transformers[serving]"
uvicorn --app-dir examples/huggingface serve:app --port 8000
Client: openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="-")
"""

import json
import time

from fastapi import FastAPI, responses
from pydantic import AliasChoices, BaseModel, Field
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvpager import Engine
from kvpager.testing import tiny_llama_path

NAME = tiny_llama_path()  # or the name of a chat model
tokenizer = AutoTokenizer.from_pretrained(NAME)
model = AutoModelForCausalLM.from_pretrained(NAME, dtype="auto")
engine = Engine(model, tokenizer=tokenizer, memory="1GiB")
app = FastAPI()


class Body(BaseModel, extra="forbid"):  # a setting that is not served is refused, not ignored
    model: str = Field(exclude=True)
    messages: list[dict] = Field(exclude=True)
    stream: bool = Field(False, exclude=True)
    max_new_tokens: int = Field(64, alias=AliasChoices("max_completion_tokens", "max_tokens"))
    stop_strings: str | list[str] | None = Field(None, alias="stop")
    temperature: float = 1.0
    seed: int | None = None


@app.post("/v1/chat/completions")
async def complete(given: dict):
    try:
        body = Body(**given)
        prompt = tokenizer.apply_chat_template(body.messages, add_generation_prompt=True)
        stream = engine.submit(prompt, do_sample=body.temperature > 0, **body.model_dump())
    except ValueError as error:
        return responses.JSONResponse({"error": {"message": str(error)}}, 400)
    head = {"id": stream.request_id, "created": int(time.time()), "model": body.model}
    if body.stream:
        return responses.StreamingResponse(events(stream, head), media_type="text/event-stream")
    output = await stream
    message = {"role": "assistant", "content": output.text}
    choice = {"index": 0, "message": message, "finish_reason": output.finish_reason}
    read, new = len(output.prompt_token_ids), len(output.token_ids)
    usage = {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}
    return head | {"object": "chat.completion", "choices": [choice], "usage": usage}


async def events(stream, head):
    head["object"] = "chat.completion.chunk"
    async for piece in stream.text():
        choice = {"index": 0, "delta": {"content": piece}, "finish_reason": None}
        yield f"data: {json.dumps(head | {'choices': [choice]})}\n\n"
    choice = {"index": 0, "delta": {}, "finish_reason": stream.partial().finish_reason}
    yield f"data: {json.dumps(head | {'choices': [choice]})}\n\ndata: [DONE]\n\n"
