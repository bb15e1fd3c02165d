"""What the demo's server lets in, without Gradio: a stand-in takes the requests that come through."""

import asyncio
import json
import os
import time

import pytest

from serve import guard
from serve.guard import Guard

HEADERS = {"host": "127.0.0.1:7860"}


class Taken:
    """An application that keeps the bodies of its requests."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    async def __call__(self, scope, receive, send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.bodies.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def taken() -> Taken:
    return Taken()


@pytest.fixture
def ask(taken, tmp_path):
    """Sends a request; its status, or None without an answer, and the headers of the answer."""

    def send_one(method, path, body=b"", hosts=frozenset({"127.0.0.1"}), pieces=1, **headers):
        answers = []
        length = {} if pieces > 1 else {"content-length": str(len(body))}
        named = {name.replace("_", "-"): value for name, value in (HEADERS | length | headers).items()}
        parts = [body[n::pieces] if pieces > 1 else body for n in range(pieces)]
        waiting = [{"type": "http.request", "body": part, "more_body": n + 1 < pieces} for n, part in enumerate(parts)]

        async def receive():
            return waiting.pop(0)

        async def send(message):
            answers.append(message)

        raw = [(name.encode(), value.encode()) for name, value in named.items()]
        scope = {"type": "http", "method": method, "path": path, "headers": raw}
        asyncio.run(Guard(taken, tmp_path, hosts)(scope, receive, send))
        return (answers[0]["status"], dict(answers[0]["headers"])) if answers else (None, {})

    return send_one


@pytest.mark.parametrize(
    "path", ["/", "/config", "/theme.css", "/assets/index.js", "/gradio_api/queue/data", "/gradio_api/heartbeat/a1b2"]
)
def test_the_page_is_let_in_and_told_to_load_nothing_from_elsewhere(ask, path):
    status, headers = ask("GET", path)
    assert status == 200 and headers[b"content-security-policy"].startswith(b"default-src 'self'")
    assert b"http" not in headers[b"content-security-policy"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/gradio_api/proxy=http://example.com/", 404),
        ("GET", "/gradio_api/file=https://example.com/x.png", 404),
        ("GET", "/gradio_api/file=setup.py", 404),
        ("GET", "/gradio_api/file=/etc/passwd", 403),
        ("GET", "/gradio_api/stream/a/1/2/playlist.m3u8", 404),
        ("GET", "/gradio_api/openapi.json", 404),
        ("GET", "/docs", 404),
        ("GET", "/monitoring", 404),
        ("POST", "/gradio_api/component_server", 404),
        ("POST", "/gradio_api/process_recording", 404),
        ("POST", "/gradio_api/run-history/connect", 404),
        ("POST", "/login", 404),
        ("PUT", "/", 405),
        ("OPTIONS", "/gradio_api/upload", 405),
    ],
)
def test_what_the_page_does_not_need_is_closed(ask, taken, method, path, status):
    assert ask(method, path)[0] == status and taken.bodies == []


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "http://example.com/a.png",
        "UPLOADS/../secret.png",
        "UPLOADS/link/passwd",
        "setup.py",
        "a\0b",
        None,
        7,
    ],
)
def test_a_file_that_was_not_uploaded_is_refused(ask, taken, tmp_path, path):
    (tmp_path / "link").symlink_to("/etc")
    path = path.replace("UPLOADS", str(tmp_path)) if isinstance(path, str) else path
    body = {"data": [{"text": "What?", "files": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}]}
    for route in ("queue/join", "run/predict"):
        assert ask("POST", f"/gradio_api/{route}", json.dumps(body).encode())[0] == 400
    assert taken.bodies == []


def test_an_uploaded_file_is_let_in_and_what_was_checked_is_read(ask, taken, tmp_path):
    path = json.dumps(str(tmp_path / "hash" / "one.png"))
    body = b'{"data": [{"path": "/etc/passwd", "path": %s}], "n": 1}' % path.encode()  # the last one counts
    assert ask("POST", "/gradio_api/queue/join", body)[0] == 200
    assert [json.loads(own) for own in taken.bodies] == [{"data": [{"path": json.loads(path)}], "n": 1}]
    assert b"/etc/passwd" not in taken.bodies[0]


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_json_is_refused(ask, body):
    assert ask("POST", "/gradio_api/queue/join", body)[0] == 400


def test_requests_are_bounded(ask, taken, tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "MOST_JSON", 100)
    monkeypatch.setattr(guard, "MOST_UPLOAD", 1000)
    assert ask("POST", "/gradio_api/queue/join", b" " * 101)[0] == 413
    assert ask("POST", "/gradio_api/upload", b" " * 1001)[0] == 413
    assert ask("POST", "/gradio_api/upload", b" " * 500, content_length="-1")[0] == 413
    assert ask("POST", "/gradio_api/queue/join", b" " * 101, pieces=3)[0] == 400  # without a length
    assert ask("POST", "/gradio_api/upload", b" " * 1001, pieces=3)[0] is None and taken.bodies == []
    assert ask("POST", "/gradio_api/upload", b" " * 1000)[0] == 200
    (tmp_path / "old.png").write_bytes(b" " * 101)
    monkeypatch.setattr(guard, "MOST_STORED", 100)
    assert ask("POST", "/gradio_api/upload", b" " * 10)[0] == 507


def test_pages_of_others_are_refused(ask):
    assert ask("GET", "/", host="rebound.example:7860")[0] == 403
    assert ask("GET", "/", host="rebound.example:7860", hosts=None)[0] == 200
    for origin in ("http://example.com", "null", "http://127.0.0.1:9999"):
        assert ask("POST", "/gradio_api/queue/join", b"{}", origin=origin)[0] == 403
    assert ask("POST", "/gradio_api/queue/join", b"{}", origin="http://127.0.0.1:7860")[0] == 200


def test_sockets_get_no_answer(taken, tmp_path):
    asyncio.run(Guard(taken, tmp_path, None)({"type": "websocket"}, None, None))
    assert taken.bodies == []


def test_what_is_left_of_broken_uploads_is_deleted(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "MOST_STORED", 100)
    for name, age in (("tmpold", 2 * guard.BROKEN_OFF), ("tmpnew", 0)):
        (tmp_path / name).write_bytes(b"x" * 60)
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    assert ask("POST", "/gradio_api/upload")[0] == 200
    assert [file.name for file in tmp_path.iterdir()] == ["tmpnew"]
    (tmp_path / "whole.png").write_bytes(b"x" * 60)
    assert ask("POST", "/gradio_api/upload")[0] == 507
