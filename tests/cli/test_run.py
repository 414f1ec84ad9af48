"""`kvpager run`: other programs with every model patched, `transformers serve` among them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("transformers")

from kvpager.testing import tiny_llama_path
from tests.support.programs import run_program
from tests.support.servers import free_port, wait_for

KVPAGER = (sys.executable, "-c", "from kvpager.cli import main; main()")
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
QUESTION = "The with statement "
NEW_TOKENS = 22


def run(*arguments: str, at: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return run_program("kvpager", "run", *arguments, cwd=at, COLUMNS="80")


# --- which program, and how it ends ---------------------------------------------------------------


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(
        "import sys\n"
        "from transformers import DynamicCache\n"
        "print(__name__, sys.argv[1:], type(DynamicCache()).__name__)\n"
        "sys.exit(7)\n"
    )
    return path


@pytest.mark.slow
def test_a_script_gets_its_own_options_and_a_paged_cache(script: Path) -> None:
    result = run("--memory", "8MiB", "program.py", "--memory", "x", "--", at=script.parent)
    assert result.stdout == "__main__ ['--memory', 'x', '--'] PagedCache\n"
    assert result.returncode == 7, result.stderr


@pytest.mark.slow
def test_a_module_runs_as_with_python_m(script: Path) -> None:
    result = run("-m", "program", "a", at=script.parent)
    assert result.stdout == "__main__ ['a'] PagedCache\n"
    assert result.returncode == 7, result.stderr


@pytest.mark.slow
def test_a_console_script_runs_by_its_name() -> None:
    result = run("transformers", "--help")
    assert result.returncode == 0, result.stderr
    assert "serve" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["nothing-of-this-name"], "no installed Python program has this name"),
        (["missing.py"], "no such file"),
        (["python", "script.py"], "Leave it out"),
        (["-m"], "-m: no module given"),
        (["--memroy", "4GiB", "x.py"], "--memroy: no such option (meant: --memory?). See `kvpager"),
        (["--memroy=4GiB", "x.py"], "--memroy: no such option (meant: --memory?). See `kvpager"),
        (["-x", "x.py"], "-x: no such option. See `kvpager run --help`."),
        (["--memory", "much", "-m", "json.tool"], "--memory='much'"),
        (["--block-size", "12", "-m", "json.tool"], "--block-size=12: "),
    ],
)
def test_what_cannot_run_is_one_line_and_exit_code_2(arguments: list[str], problem: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert problem in result.stderr
    assert result.stderr.count("\n") == 1


# --- transformers serve ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with a fast tokenizer of the same bytes, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny_llama_path(), folder)
    special = ["<pad>", "</s>", "<unk>"]
    letters = [bytes_to_unicode()[byte] for byte in range(256)]
    vocabulary = {token: number for number, token in enumerate([*special, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.save_pretrained(folder)
    return folder


@dataclass
class Server:
    client: Any
    process: subprocess.Popen[str]
    log: Path

    def stop(self) -> str:
        """Interrupt the server as Ctrl-C does; return all that it printed."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(60)
        return self.log.read_text()


@pytest.fixture(params=["continuous batching", "one by one"])
def server(request: pytest.FixtureRequest, chat_model: Path, tmp_path: Path) -> Iterator[Server]:
    openai = pytest.importorskip("openai")
    pytest.importorskip("fastapi")
    port, log = free_port(), tmp_path / "log"
    batching = ["--continuous-batching"] if request.param == "continuous batching" else []
    where = ["--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with log.open("w") as output:
        process = subprocess.Popen(
            [*KVPAGER, "run", "--memory", "64MiB", "--report", "transformers", "serve",
             str(chat_model), *batching, *where],
            env={**ENVIRONMENT, "PYTHONPATH": path},
            stdout=output, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    try:
        wait_for(port, process, log)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", timeout=120)
        yield Server(client, process, log)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def expected(chat_model: Path) -> str:
    """The reply of unpatched transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    model = AutoModelForCausalLM.from_pretrained(chat_model, dtype="float32")
    inputs = tokenizer(QUESTION, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))


@pytest.mark.slow
def test_the_openai_client_gets_transformers_own_replies(
    server: Server, chat_model: Path, expected: str
) -> None:
    ask = {
        "model": str(chat_model),
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
    }
    whole = server.client.chat.completions.create(**ask)
    assert whole.choices[0].message.content == expected
    chunks = server.client.chat.completions.create(**ask, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == expected
    assert len(pieces) > 2
    printed = server.stop()
    assert "blocks of 16 tokens: " in printed, printed
    assert "nothing was paged" not in printed, printed
    assert "Traceback" not in printed, printed
