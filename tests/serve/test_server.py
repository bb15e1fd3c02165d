"""The server as its users have it: OpenAI's client, a real process, clients that are wrong, many, or killed."""

import base64
import io
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from PIL import Image

from llava_skip_base.errors import UserError
from serve.listening import bound
from serve.loading import load
from serve.server import serve, tell
from tests.support.openai_messages import data_uri, image_part, user

openai = pytest.importorskip("openai", reason="needs the extra [serve]")
pytest.importorskip("fastapi", reason="needs the extra [serve]")
pytest.importorskip("uvicorn", reason="needs the extra [serve]")

ROOT = Path(__file__).parents[2]
LONGEST = 800
NAME = "talkative"


ANSWERED = {"role": "assistant", "content": "Two dogs."}
CONVERSATIONS = {
    "text": [user("Hello?")],
    "an image": [user(image_part(40, 20), "What is this?")],
    "several images": [user("First", image_part(40, 20), "then", image_part(20, 50), image_part(30, 30), "which?")],
    "turns": [user(image_part(40, 20), "What is this?"), ANSWERED, user("And", image_part(20, 30), "?")],
    "a system": [{"role": "system", "content": "Be short."}, user("Hello?")],
}


@pytest.fixture(scope="module")
def talkative(saved, tmp_path_factory) -> Path:
    """A model of larger random weights, whose answers differ; it says letters and spaces without an end."""
    folder = tmp_path_factory.mktemp("served") / NAME
    shutil.copytree(saved, folder)
    loaded = load(str(saved), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        for name, weight in loaded.model.named_parameters():
            if weight.dim() > 1 and ("projector" in name or ("language_model" in name and "embed" not in name)):
                weight.mul_(3)
    tokenizer = loaded.processor.tokenizer
    said = {tokenizer.convert_tokens_to_ids(token) for token in (*"abcdefghijkl", "Ġ")}
    loaded.model.generation_config.suppress_tokens = [n for n in range(len(tokenizer)) if n not in said]
    loaded.model.save_pretrained(folder)
    return folder


class Server:
    """The process, its log and its address."""

    def __init__(self, model: Path, log: Path, *options: str) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "llava_skip", "serve", str(model), "--port", "0", *options]
        self._log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        self.wait(lambda: "/v1\n" in self.log)
        self.address = self.log.split(" at ")[1].split("/v1")[0]
        self.wait(self._answers)
        self.client = openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=300)

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def threads(self) -> int:
        return psutil.Process(self.process.pid).num_threads()

    @property
    def megabytes(self) -> float:
        return psutil.Process(self.process.pid).memory_info().rss / 2**20

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.address}/health").json() == {"status": "ok"}
        except httpx.TransportError:
            return False

    def wait(self, is_so, seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while not is_so():
            assert self.process.poll() is None and time.monotonic() < end, self.log
            time.sleep(0.05)

    def ask(self, messages: list[dict], **options):
        return self.client.chat.completions.create(model=NAME, messages=messages, **options)

    def post(self, **body) -> httpx.Response:
        content = json.dumps({"model": NAME} | body)
        headers = {"content-type": "application/json"}
        return httpx.post(f"{self.address}/v1/chat/completions", content=content, headers=headers, timeout=300)


@pytest.fixture(scope="module")
def server(talkative, tmp_path_factory):
    options = ["--max-new-tokens", str(LONGEST), "--max-images", "3", "--max-megapixels", "0.1"]
    log = tmp_path_factory.mktemp("log") / "server.log"
    server = Server(talkative, log, "--max-request-mib", "1", "--device", "cpu", "--max-requests", "24", *options)
    yield server
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(60) == 0, server.log
    assert "Traceback" not in server.log and "Exception" not in server.log, server.log


@pytest.fixture(scope="module")
def library(talkative):
    """The answer of the library's `generate` to messages of OpenAI's form, and the length of its prompt."""
    loaded = load(str(talkative), torch.device("cpu"), torch.float32)

    def opened(part: dict) -> dict:
        if part["type"] == "text":
            return part
        content = base64.b64decode(part["image_url"]["url"].split(",")[1])
        return {"type": "image", "image": Image.open(io.BytesIO(content))}

    def answer(messages: list[dict], length: int) -> tuple[str, int]:
        turns = [
            turn | {"content": turn["content"] if isinstance(turn["content"], str) else [*map(opened, turn["content"])]}
            for turn in messages
        ]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = loaded.processor.apply_chat_template(turns, **options)
        width = inputs["input_ids"].shape[1]
        ids = loaded.model.generate(**inputs, max_new_tokens=length, do_sample=False)
        return loaded.processor.decode(ids[0, width:], skip_special_tokens=True).strip(), width

    return answer


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_an_answer_is_that_of_generate_streamed_or_not(server, library, name):
    messages = CONVERSATIONS[name]
    expected, length = library(messages, 12)
    whole = server.ask(messages, max_tokens=12)
    assert whole.choices[0].message.content == expected != ""
    chunks = list(server.ask(messages, max_completion_tokens=12, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks).strip() == expected
    for usage in (whole.usage, chunks[-1].usage):
        assert (usage.prompt_tokens, usage.completion_tokens) == (length, 12)
    assert whole.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "length"
    assert {chunk.id for chunk in chunks} == {chunks[0].id} != {whole.id} and whole.model == chunks[0].model == NAME


def test_an_answer_does_not_depend_on_the_requests_before(server, library):
    """A skipping model with the cache of the first turn would not see what a new pass over both sees."""
    for size in ((40, 20), (40, 21), (20, 30)):
        first = [user(image_part(*size), "x")]
        answer = server.ask(first, max_tokens=12).choices[0].message.content
        messages = [*first, {"role": "assistant", "content": answer}, user("And now?")]
        assert server.ask(messages, max_tokens=12).choices[0].message.content == library(messages, 12)[0]


def test_stops_and_samples(server):
    ask = {"temperature": 1.5, "top_p": 0.9, "max_tokens": 40}
    whole = server.ask(CONVERSATIONS["text"], seed=3, **ask)
    text = whole.choices[0].message.content
    assert server.ask(CONVERSATIONS["text"], seed=3, **ask).choices[0].message.content == text
    assert server.ask(CONVERSATIONS["text"], seed=4, **ask).choices[0].message.content != text
    stop = text[8:11]
    cut = server.ask(CONVERSATIONS["text"], seed=3, stop=[stop, "never"], **ask)
    assert cut.choices[0].message.content == text.partition(stop)[0].strip()
    assert cut.choices[0].finish_reason == "stop" and cut.usage.completion_tokens < 40
    pieces = server.ask(CONVERSATIONS["text"], seed=3, stop=stop, stream=True, **ask)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text.partition(stop)[0]


def test_the_models(server):
    assert [model.id for model in server.client.models.list()] == [NAME]


BAD = {
    "no messages": ({}, 400, "messages must be a list"),
    "empty": ({"messages": []}, 400, "not empty"),
    "another model": ({"model": "gpt2", "messages": [user("x")]}, 404, "there is no model 'gpt2'"),
    "a path": ({"model": "/etc", "messages": [user("x")]}, 404, "loads no other"),
    "no model": ({"model": None, "messages": [user("x")]}, 400, "model is missing"),
    "a number for a model": ({"model": 3, "messages": [user("x")]}, 400, "model must be"),
    "too long an answer": ({"messages": [user("x")], "max_tokens": LONGEST + 1}, 400, f"from 1 to {LONGEST}"),
    "a length that is true": ({"messages": [user("x")], "max_tokens": True}, 400, "an integer"),
    "hot": ({"messages": [user("x")], "temperature": 2.5}, 400, "from 0 to 2"),
    "a seed of text": ({"messages": [user("x")], "seed": "1"}, 400, "seed is 1"),
    "two answers": ({"messages": [user("x")], "n": 2}, 400, "n is not supported"),
    "tools": ({"messages": [user("x")], "tools": [{"type": "function"}]}, 400, "tools is not supported"),
    "settings of generate": ({"messages": [user("x")], "generation_config": "{}"}, 400, "no field"),
    "many stops": ({"messages": [user("x")], "stop": ["a"] * 5}, 400, "stop must be"),
    "a role": ({"messages": [{"role": "tool", "content": "x"}]}, 400, "role is 'tool'"),
    "an answer last": ({"messages": [user("x"), ANSWERED]}, 400, "the last message"),
    "a placeholder": ({"messages": [user("an <image>")]}, 400, "stands for an image"),
    "half a character": ({"messages": [user("\ud800")]}, 400, "no text"),
    "sound": ({"messages": [user("x", {"type": "input_audio"})]}, 400, "of the type text or image_url"),
    "an address": ({"messages": [user("x", {"type": "image_url", "image_url": {"url": "http://localhost/x.png"}})]},
                   400, "opens no addresses"),
    "a file": ({"messages": [user("x", {"type": "image_url", "image_url": {"url": "/etc/passwd"}})]},
               400, "opens no addresses and no files"),
    "a file's address": ({"messages": [user("x", {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}})]},
                         400, "no files"),
    "no base64": ({"messages": [user("x", {"type": "image_url", "image_url": {"url": "data:image/png;base64,?"}})]},
                  400, "image 1 cannot be read"),
    "no image": ({"messages": [user(image_part(8, 8), {"type": "image_url", "image_url": {
        "url": "data:image/png;base64,AAAA"}})]}, 400, "image 2 cannot be read"),
    "four images": ({"messages": [user(*[image_part(8, 8)] * 4)]}, 400, "4 images; at most 3"),
    "large images": ({"messages": [user(*[{"type": "image_url", "image_url": {
        "url": data_uri(Image.new("RGB", (250, 250)))}}] * 2)]}, 400, "more than 0.1 million pixels"),
    "an image of the system": ({"messages": [{"role": "system", "content": [image_part(8, 8)]}, user("x")]},
                               400, "only the user's"),
    "too long a conversation": ({"messages": [user("long " * 2000)]}, 400, "send fewer turns"),
    "text without end": ({"messages": [user("x" * 1_000_001)]}, 400, "at most 1,000"),
}  # fmt: skip


def test_a_wrong_request_is_told_why(server):
    for number, (name, (body, status, message)) in enumerate(BAD.items()):
        response = server.post(**body, stream=bool(number % 2))  # a stream is refused before it begins, too
        error = response.json().get("error", {})
        assert (response.status_code, error.get("type")) == (status, "invalid_request_error"), name
        assert message in error["message"] and len(error["message"]) < 400, (name, error)
        assert error.keys() == {"message", "type", "param", "code"}
    assert server.ask([user("x")], max_tokens=1).choices


def test_openais_client_has_an_error_for_each(server):
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        server.client.chat.completions.create(model="other", messages=[user("x")])
    with pytest.raises(openai.BadRequestError, match="temperature is 3"):
        server.ask([user("x")], temperature=3)
    with pytest.raises(openai.APIStatusError) as caught:  # 1.5 MiB
        server.ask([user("x" * 1_500_000)])
    assert caught.value.status_code == 413 and "more than 1 MiB" in caught.value.message


def test_what_is_no_request_and_paths_that_are_closed(server):
    url = f"{server.address}/v1/chat/completions"
    for content in (b"{", b"[]", b"[" * 100_000, b"\xff", b'{"seed": ' + b"9" * 5000 + b"}", b""):
        response = httpx.post(url, content=content, headers={"content-type": "application/json"})
        assert response.status_code == 400 and response.json()["error"]["message"], content[:20]
    page = httpx.post(url, content=b"{}", headers={"content-type": "text/plain"})
    foreign = httpx.get(f"{server.address}/v1/models", headers={"host": "evil.example:80"})
    assert (page.status_code, foreign.status_code, httpx.get(url).status_code) == (415, 403, 405)
    closed = ["completions", "responses", "systemone", "audio/transcriptions"]
    for path in [*(f"/v1/{name}" for name in closed), "/load_model", "/reset", "/", "/%2e%2e/etc/passwd"]:
        response = httpx.post(server.address + path, json={"model": "gpt2", "prompt": "x", "input": "x"})
        assert response.status_code == 404 and response.json()["error"]["code"] == "closed"
    assert {httpx.get(server.address + path).status_code for path in ("/docs", "/redoc", "/openapi.json")} == {404}
    assert server.ask([user("x")], max_tokens=1).choices


def killed(server: Server, **body) -> None:
    """A client that is gone once it has read the beginning of its answer."""
    content = json.dumps({"model": NAME, "messages": [user("Tell me")], "temperature": 1.0, **body}).encode()
    host, port = server.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        if body.get("stream"):
            received = b""
            while received.count(b"data:") < 3:
                received += connection.recv(4096)
        else:
            time.sleep(0.1)  # the request arrives


def costs(log: str) -> list[str]:
    return [line for line in log.splitlines() if line.startswith("chatcmpl-")]


def test_killed_clients_leave_nothing_behind(server):
    server.ask(CONVERSATIONS["several images"], max_tokens=2)
    before, threads, megabytes = len(costs(server.log)), server.threads, server.megabytes
    for _ in range(3):
        killed(server, stream=True)
        killed(server)
    assert server.ask([user("x")], max_tokens=3).usage.completion_tokens == 3
    *stopped, _ = costs(server.log)[before:]
    assert len(stopped) >= 3 and all(line.endswith(", stopped") for line in stopped)
    assert all(int(line.split(": ")[1].split()[0]) < LONGEST for line in stopped)
    assert server.threads == threads and server.megabytes < megabytes + 50


def test_clients_that_are_killed_while_they_wait_are_passed_over(server):
    before = len(costs(server.log))
    with server.ask([user("Tell me")], stream=True, temperature=1.0, max_tokens=LONGEST) as long:
        next(iter(long))
        for number in range(3):
            killed(server, max_tokens=number + 1)
    server.ask([user("x")], max_tokens=4)
    assert [line.split(": ")[1].split()[0] for line in costs(server.log)[before + 1 :]] == ["4"]


def test_twenty_at_once_have_their_own_answers(server, library):
    questions = [[user(image_part(20 + number, 30), f"What about {number}?")] for number in range(20)]

    def ask(number: int) -> str:
        if number % 2:
            return server.ask(questions[number], max_tokens=4).choices[0].message.content
        pieces = server.ask(questions[number], max_tokens=4, stream=True)
        return "".join(piece.choices[0].delta.content or "" for piece in pieces).strip()

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, range(20)))
    assert answers == [library(question, 4)[0] for question in questions]
    assert len(set(answers)) > 5


def test_an_address_in_use_is_told_before_the_weights_load(saved, monkeypatch):
    monkeypatch.setattr("serve.loading.Found.load", lambda *_: pytest.fail("the weights were read"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(UserError, match="cannot be used \\(Address already in use\\)"):
            serve(str(saved), port=taken.getsockname()[1])
    with pytest.raises(UserError, match="--host no.such.host.invalid"):
        serve(str(saved), host="no.such.host.invalid")


@pytest.mark.parametrize("option", ["max_megapixels", "max_request_mib", "max_seconds"])
def test_a_limit_is_a_number(saved, option):
    for value in (math.inf, math.nan):
        with pytest.raises(UserError, match=f"--{option.replace('_', '-')} is {value}"):
            serve(str(saved), **{option: value})


def test_a_missing_extra_is_named(saved, monkeypatch):
    monkeypatch.setattr("serve.server.is_serve_available", lambda: False)
    with pytest.raises(UserError, match="pip install '.\\[serve\\]'"):
        serve(str(saved))


def test_an_open_address_is_warned_of(capsys):
    for host, is_local in (("127.0.0.1", True), ("0.0.0.0", False)):
        with bound(host, 0) as listener:
            tell("a [red] model\x1b[31m", "cpu", listener, is_local)
        shown = capsys.readouterr().out
        assert "one request at a time" in shown and "vLLM" in shown and "a [red] model\\u001b[31m on cpu at" in shown
        assert ("warning: whoever reaches" in shown) is not is_local
