"""What the demo's server lets in: the requests of its own page, and of them no more than it can hold.

Gradio's server has many other routes (files by address, a proxy, run histories, recordings), and takes the path of any
file, or an address, where a page sends an uploaded one. All of that ends here.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from serve.listening import Message, Receive, Scope, Send, without_port

MOST_FILE = 20 * 2**20
"""Bytes of one uploaded file."""
MOST_UPLOAD = 8 * MOST_FILE
"""Bytes of one request with files."""
MOST_STORED = 2 * 2**30
"""Bytes of all uploaded files; more are taken only after old ones are deleted."""
BROKEN_OFF = 600
"""Seconds after which a part of an upload, which Gradio names tmp..., is no longer being written."""
MOST_JSON = 2**20
"""Bytes of any other request."""

_API = "/gradio_api/"
_GET = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt)|/(assets|static)/[^?]+|"
    rf"{_API}(info|startup-events|app_id|upload_progress|queue/data|heartbeat/\w+|file=/[^?]+)"
)
_FILE = f"{_API}file="
_UPLOAD = re.compile(rf"{_API}upload")
_JSON = re.compile(rf"{_API}(queue/join|run/\w+|cancel|reset)/?")
_HEADERS = {
    "content-security-policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
"""The page may load nothing from elsewhere, whatever is in it, and stands in no other page."""


class Refused(Exception):
    """A request that is not let in: status and reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Guard:
    """Around an ASGI application (https://asgi.readthedocs.io).

    Args:
        app: what answers the requests that are let in.
        uploads: the folder of uploaded files.
        hosts: names by which the server may be asked for; None: any.
    """

    def __init__(self, app: Callable[..., Any], uploads: Path, hosts: frozenset[str] | None) -> None:
        self._app, self._uploads, self._hosts = app, uploads.resolve(), hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        try:
            receive = await self._checked(scope, receive)
        except Refused as refusal:
            body = json.dumps({"error": str(refusal)}).encode()
            headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
            await send({"type": "http.response.body", "body": body})
            return
        await self._app(scope, receive, _with_headers(send))

    async def _checked(self, scope: Scope, receive: Receive) -> Receive:
        """What the application may read of a request.

        Raises:
            Refused: the request is not let in.
        """
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        self._check_origin(headers)
        method, path = scope["method"], scope["path"]
        if method in ("GET", "HEAD"):
            if not _GET.fullmatch(path):
                raise Refused(404, "there is no such page.")
            if path.startswith(_FILE) and not self._is_uploaded(path.removeprefix(_FILE)):
                raise Refused(403, "the file was not uploaded here.")
            return receive
        if method != "POST":
            raise Refused(405, "only GET and POST are answered.")
        if _UPLOAD.fullmatch(path):
            if self._stored() > MOST_STORED:
                raise Refused(507, "there are too many uploaded files; restart the demo, or wait a day.")
            return _bounded(headers, receive, MOST_UPLOAD)
        if not _JSON.fullmatch(path):
            raise Refused(404, "there is no such page.")
        return await self._json(scope, headers, receive)

    def _stored(self) -> int:
        """Bytes of all uploaded files; what is left of uploads that broke off is deleted."""
        stored, now = 0, time.time()
        for file in self._uploads.rglob("*"):
            with suppress(FileNotFoundError):  # deleted meanwhile
                known = file.stat()
                if file.parent == self._uploads and file.name.startswith("tmp") and now - known.st_mtime > BROKEN_OFF:
                    file.unlink()
                elif file.is_file():
                    stored += known.st_size
        return stored

    def _check_origin(self, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        if self._hosts is not None and without_port(host) not in self._hosts:
            raise Refused(403, "the server is not asked for by its own name.")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            raise Refused(403, "requests of other pages are not answered.")

    async def _json(self, scope: Scope, headers: dict[str, str], receive: Receive) -> Receive:
        """A body in which every file is one that was uploaded; the application reads what was checked."""
        body, more, limited = b"", True, _bounded(headers, receive, MOST_JSON)
        while more:
            message = await limited()
            if message["type"] != "http.request":  # the client is gone
                raise Refused(400, "the request has no end.")
            body, more = body + message.get("body", b""), message.get("more_body", False)
        try:
            value = json.loads(body or b"{}")
        except (ValueError, RecursionError) as error:
            raise Refused(400, "the request is not JSON.") from error
        self._check_files(value)
        checked = json.dumps(value).encode()
        kept = [(name, own) for name, own in scope["headers"] if name.lower() != b"content-length"]
        scope["headers"] = [*kept, (b"content-length", str(len(checked)).encode())]
        waiting = [{"type": "http.request", "body": checked, "more_body": False}]

        async def read() -> Message:
            return waiting.pop() if waiting else await receive()

        return read

    def _check_files(self, value: Any) -> None:
        """Raise Refused if a file in a request is not an uploaded one."""
        if isinstance(value, list):
            for entry in value:
                self._check_files(entry)
        elif isinstance(value, dict):
            if "path" in value and not self._is_uploaded(value["path"]):
                raise Refused(400, "a file was not uploaded here.")
            for entry in value.values():
                self._check_files(entry)

    def _is_uploaded(self, path: Any) -> bool:
        if not isinstance(path, str) or "\0" in path or not path.startswith("/"):
            return False
        return Path(path).resolve().is_relative_to(self._uploads)


def _bounded(headers: dict[str, str], receive: Receive, most: int) -> Receive:
    """What is read of a body that may have so many bytes.

    Raises:
        Refused: it says that it has more; or, while it is read, it has more.
    """
    length = headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit() or int(length) > most:
        raise Refused(413, f"a request of {length} bytes is too large: at most {most:,}.")
    taken = 0

    async def read() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > most:
            return {"type": "http.disconnect"}  # a body without a length went on: for the application, it broke off
        return message

    return read


def _with_headers(send: Send) -> Send:
    async def guarded(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
            message["headers"] = [*message.get("headers", []), *own]
        await send(message)

    return guarded
