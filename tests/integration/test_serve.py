"""`transformers serve` on a quantized checkpoint: OpenAI's chat endpoint, over HTTP."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.import_utils import is_serve_available

from tests.integration.conftest import SavedSmolLM2

if not is_serve_available():
    pytest.skip("needs transformers[serving]", allow_module_level=True)

START_SECONDS = 120
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
# The console script; the server knows nothing of us but the installed package.
COMMAND = [
    *(sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve"),
    *("--host", "127.0.0.1", "--device", "cpu"),
]


@pytest.fixture(scope="module")
def quantized(smollm2_quantized: SavedSmolLM2) -> Path:
    return smollm2_quantized.path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server(quantized: Path) -> Iterator[str]:
    """Address of a server of the checkpoint, stopped at the end."""
    port = free_port()
    log = quantized.parent / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*COMMAND, "--port", str(port), str(quantized)],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=quantized.parent,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while not is_healthy(address):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def is_healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def ask(address: str, model: Path, **options: object) -> HTTPResponse:
    body = {
        "model": str(model),
        "messages": MESSAGES,
        "max_tokens": 24,
        "temperature": 0,
        **options,
    }
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    return urllib.request.urlopen(request, timeout=120)


@pytest.fixture(scope="module")
def expected(quantized: Path) -> str:
    """What the model answers without a server."""
    tokenizer = AutoTokenizer.from_pretrained(quantized)
    model = AutoModelForCausalLM.from_pretrained(quantized)
    inputs = tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    start = inputs["input_ids"].shape[1]
    text: str = tokenizer.decode(output[0, start:], skip_special_tokens=True)
    assert text.strip()
    return text


def test_chat(server: str, quantized: Path, expected: str) -> None:
    with ask(server, quantized) as response:
        answer = json.load(response)
    assert answer["object"] == "chat.completion"
    message = answer["choices"][0]["message"]
    assert message["role"] == "assistant"
    assert message["content"].strip() == expected.strip()
    assert answer["usage"]["completion_tokens"] > 0


def test_streamed_chat_is_the_same_text(server: str, quantized: Path, expected: str) -> None:
    with ask(server, quantized, stream=True) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        lines = [line.decode().strip() for line in response]
    events = [
        json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")
    ]
    pieces = [event["choices"][0]["delta"].get("content") or "" for event in events]
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(pieces).strip() == expected.strip()
    assert events[-1]["choices"][0]["finish_reason"] in ("stop", "length")


def test_the_example(server: str, quantized: Path, expected: str) -> None:
    example = Path(__file__).parents[2] / "examples" / "serve.py"
    result = subprocess.run(
        [sys.executable, example, quantized, MESSAGES[0]["content"]],
        capture_output=True,
        text=True,
        env={**os.environ, "OPENAI_BASE_URL": f"{server}/v1"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(expected)  # it asks for more tokens
