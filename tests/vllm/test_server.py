"""vLLM's own server, asked by eight clients at once with the `openai` package."""

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from llava_skip.checkpoints.processor import load_processor
from tests.support.small_models import SKIP
from tests.vllm.engines import NEW, answers, images_of, prompts, questions, save

SECONDS_TO_START = 600


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "served", SKIP)


@pytest.fixture(scope="module")
def address(folder, tmp_path_factory):
    """A server process of its own, without any flag that the plug-in could need."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--dtype", "float32"]
    words += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--served-model-name", "served"]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with open(log, "w") as file:
        server = subprocess.Popen(words, stdout=file, stderr=file, env=environment, start_new_session=True)
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + SECONDS_TO_START
    try:
        while not _is_ready(url):
            assert server.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
            time.sleep(0.5)
        yield f"{url}/v1"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _is_ready(url: str) -> bool:
    try:
        return urllib.request.urlopen(f"{url}/health", timeout=2).status == 200
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def as_url(image) -> str:
    image.save(file := io.BytesIO(), "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def test_eight_clients_at_once(address, folder):
    from openai import OpenAI

    asked = questions(12)
    expected = answers(folder, asked)

    def ask(conversation):
        parts = [
            {"type": "image_url", "image_url": {"url": as_url(part["image"])}} if part["type"] == "image" else part
            for part in conversation[0]["content"]
        ]
        client = OpenAI(base_url=address, api_key="none", max_retries=0)
        options = {"min_tokens": NEW, "return_token_ids": True}
        messages = [{"role": "user", "content": parts}]
        return client.chat.completions.create(
            model="served", messages=messages, temperature=0, max_tokens=NEW, extra_body=options
        )

    with ThreadPoolExecutor(8) as clients:
        replies = list(clients.map(ask, asked))
    assert [reply.choices[0].token_ids for reply in replies] == expected
    tokenizer = load_processor(folder).tokenizer
    for reply, conversation, prompt in zip(replies, asked, prompts(folder, asked), strict=True):
        words = len(tokenizer(prompt["prompt"].replace("<image>", ""))["input_ids"])
        assert reply.usage.prompt_tokens == words + 7 * len(images_of(conversation))  # 7 of an image are kept


def test_a_wrong_request_is_refused_and_others_go_on(address):
    from openai import BadRequestError, OpenAI

    client = OpenAI(base_url=address, api_key="none", max_retries=0)
    with pytest.raises(BadRequestError):
        parts = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
        client.chat.completions.create(model="served", messages=[{"role": "user", "content": parts}])
    with pytest.raises(BadRequestError, match="context length"):
        client.chat.completions.create(model="served", messages=[{"role": "user", "content": "word " * 200}])
    (own,) = questions(1)
    text = own[0]["content"][-1]["text"]
    assert client.chat.completions.create(model="served", messages=[{"role": "user", "content": text}], max_tokens=2)
