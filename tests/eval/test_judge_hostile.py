"""Endpoints that never end, compress a bomb or send what nothing can read: bad replies, in bounded time and memory."""

import gzip
import json
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from eval.errors import JudgeUnavailable
from eval.scoring.judge import LONGEST_REPLY, Judge

Behaviour = Callable[[socket.socket], None]
OK = b"HTTP/1.1 200 OK\r\n"
RECEIVED: list[bytes] = []


def completion(content: str) -> bytes:
    return b'{"choices": [{"message": {"content": ' + content.encode() + b"}}]}"


def read_request(connection: socket.socket) -> bytes:
    """A whole request; closing a connection with a part unread would reset it."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(1 << 20)
    head, _, body = received.partition(b"\r\n\r\n")
    left = int(head.lower().split(b"content-length:")[1].split()[0]) - len(body)
    while left > 0:
        received += (more := connection.recv(left))
        left -= len(more)
    return received


@pytest.fixture
def serve() -> Iterator[Callable[[Behaviour], str]]:
    """Starts an endpoint that reads a request and then does what it is told with the connection."""
    listeners = []

    def start(behaviour: Behaviour) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

        def answer(connection: socket.socket) -> None:
            with connection:
                try:
                    RECEIVED.append(read_request(connection))
                    behaviour(connection)
                except OSError:
                    pass  # the judge gave up, as it should

        threading.Thread(target=accept, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/v1"

    yield start
    for listener in listeners:
        listener.close()


def judge(url: str, folder: Path) -> Judge:
    return Judge(url, folder, "tiny", "judge", timeout=0.6, retries=0, backoff=0.01)


def whole(body: bytes, *headers: bytes) -> Behaviour:
    lines = [b"Content-Length: %d" % len(body), *headers]
    return lambda connection: connection.sendall(OK + b"\r\n".join(lines) + b"\r\n\r\n" + body)


def forever(start: bytes, block: bytes, pause: float) -> Behaviour:
    def send(connection: socket.socket) -> None:
        connection.sendall(start)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            connection.sendall(block)
            time.sleep(pause)

    return send


ENDLESS: dict[str, Behaviour] = {
    "silence": lambda connection: time.sleep(20),
    "dripped headers": forever(OK, b"X", 0.1),
    "many short headers": forever(OK, b"X-A: b\r\n", 0.1),
    "100 Continue": forever(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.01),
    "a flood of 100 Continue": forever(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000, 0),
    "a dripped body": forever(OK + b"Content-Length: 1000\r\n\r\n", b" ", 0.1),
    "dripped chunks": forever(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n", 0.1),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_one_time_limit_covers_a_whole_request(serve: Callable[[Behaviour], str], tmp_path: Path, kind: str) -> None:
    start = time.monotonic()
    with pytest.raises(JudgeUnavailable, match="no whole reply within 0.6 s|RemoteProtocolError"):
        judge(serve(ENDLESS[kind]), tmp_path).ask("?", 0.0, 3)
    assert time.monotonic() - start < 4


def test_a_connection_that_is_never_accepted(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        filled = [socket.socket() for _ in range(4)]
        for one in filled:
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
        start = time.monotonic()
        with pytest.raises(JudgeUnavailable, match="no whole reply within"):
            judge(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", tmp_path).ask("?", 0.0, 3)
        assert time.monotonic() - start < 4
        for one in filled:
            one.close()


@pytest.mark.parametrize("encoding", [b"gzip", b"gzip, gzip", b"deflate", b"br"])
def test_a_compressed_reply_is_never_unpacked(
    serve: Callable[[Behaviour], str], tmp_path: Path, encoding: bytes
) -> None:
    bomb = gzip.compress(gzip.compress(b" " * 100_000_000))
    assert len(bomb) < 5000
    asked = judge(serve(whole(bomb, b"Content-Encoding: " + encoding)), tmp_path)
    tracemalloc.start()
    with pytest.raises(JudgeUnavailable, match="a compressed reply"):
        asked.ask("?", 0.0, 3)
    assert tracemalloc.get_traced_memory()[1] < 30_000_000
    tracemalloc.stop()


def test_no_compression_is_asked_for(serve: Callable[[Behaviour], str], tmp_path: Path) -> None:
    url = serve(whole(completion('"0.5"'), b"Content-Encoding: identity"))
    assert judge(url, tmp_path).ask("?", 0.0, 3) == "0.5"
    assert b"accept-encoding: identity\r\n" in RECEIVED[-1].lower()


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 200_000,
        b"[" * 200_000 + b"]" * 200_000,
        b'{"choices": ' + b"[" * 500 + b"]" * 500 + b"}",
        completion(r'"\ud83d"'),
        completion(r'"0.5 \udc00"'),
        completion("9" * 5000),
        completion("[]"),
        b'{"choices": {"0": 1}}',
        b"\xff\xfe",
        b"",
        b"null",
    ],
)
def test_a_reply_that_is_no_completion_is_a_bad_reply(
    serve: Callable[[Behaviour], str], tmp_path: Path, body: bytes
) -> None:
    with pytest.raises(JudgeUnavailable, match="replies that are no chat completions"):
        judge(serve(whole(body)), tmp_path).ask("?", 0.0, 3)


def test_a_reply_without_end_is_cut_off(serve: Callable[[Behaviour], str], tmp_path: Path) -> None:
    url = serve(forever(OK + b"Content-Type: text/plain\r\n\r\n", b" " * (LONGEST_REPLY // 4), 0))
    asked = Judge(url, tmp_path, "tiny", "judge", timeout=20, retries=0)
    with pytest.raises(JudgeUnavailable, match="an endless reply"):
        asked.ask("?", 0.0, 3)


def test_good_replies_are_read(serve: Callable[[Behaviour], str], tmp_path: Path) -> None:
    text = json.dumps("0.5 \U0001f600", ensure_ascii=True)
    assert judge(serve(whole(completion(text))), tmp_path).ask("?", 0.0, 3) == "0.5 \U0001f600"
    assert judge(serve(whole(b"\xef\xbb\xbf" + completion("null"))), tmp_path).ask("?", 0.0, 3) == ""
