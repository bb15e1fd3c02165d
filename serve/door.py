"""Stands before the server: what is refused at the door, how much is received, and what a lost client leaves behind.

It is an ASGI application around another one. One path more in a later release of that application stays closed.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Collection, Coroutine
from contextlib import suppress
from typing import Any
from uuid import uuid4

from serve.chat_request import Limits, RequestError, error_body
from serve.listening import Message, Receive, Scope, Send, without_port

Application = Callable[[Scope, Receive, Send], Coroutine[Any, Any, None]]

CHAT = "/v1/chat/completions"
OPEN = {CHAT: "POST", "/v1/models": "GET", "/health": "GET"}
"""The paths that are open, and their methods."""
BODY_SECONDS = 60.0
"""Until a request must have been received."""
SEND_SECONDS = 60.0
"""Until a client must have taken a piece of an answer."""
DRAINED = 4
"""Of a request that is too large, so many times its limit is read and thrown away, so that its client hears why."""
ID_HEADER = b"x-request-id"


class _ClientGone(Exception):
    """The client ended the connection, or takes nothing."""


class Door:
    """The application behind its door.

    Args:
        app: answers what is let through, each chat completion under an id of its own in the header `x-request-id`.
        limits: of a request.
        hosts: names under which the server may be called, or None for any: a page of the web that has given its own
            name the address of this machine is then refused.
        ended: called with the id of a chat completion, once its client has the answer or is gone.
    """

    def __init__(
        self, app: Application, limits: Limits, hosts: Collection[str] | None, ended: Callable[[str], None]
    ) -> None:
        self._app, self._limits, self._hosts, self._ended = app, limits, hosts, ended
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the application's start and end."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
            if scope["path"] != CHAT:
                await self._app(scope, receive, send)
                return
            if self._inside >= self._limits.requests:
                message = f"{self._inside} requests are answered or wait, and no more are taken: try again later"
                raise RequestError(message, code="busy", status=503)
            self._inside += 1
            try:
                await self._serve(scope, await self._read(scope, receive), receive, send)
            finally:
                self._inside -= 1
        except RequestError as error:
            await refuse(error, send)
        except _ClientGone:
            pass

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if self._hosts is not None and without_port(host) not in self._hosts:
            raise RequestError(f"this server is not called {host[:80]!r}", code="unknown_host", status=403)
        method = OPEN.get(scope["path"])
        if method is None:
            raise RequestError(f"there is nothing here; this server has {', '.join(OPEN)}", code="closed", status=404)
        if scope["method"] != method:
            raise RequestError(f"{scope['path']} takes {method} alone", code="method_not_allowed", status=405)
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if method == "POST" and kind != b"application/json":  # others may be sent by any page that a browser shows
            raise RequestError("the header content-type must be application/json", code="no_json", status=415)

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """The body of a request."""
        most, parts, size, more = self._limits.body, list[bytes](), 0, True
        loop = asyncio.get_running_loop()
        end = loop.time() + BODY_SECONDS
        while more and size <= DRAINED * most:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - loop.time()))
            except asyncio.TimeoutError as error:
                text = f"the request did not arrive within {BODY_SECONDS:g} s"
                raise RequestError(text, code="slow", status=408) from error
            if message["type"] == "http.disconnect":
                raise _ClientGone
            size += len(message.get("body", b""))
            if size <= most:
                parts.append(message.get("body", b""))
            else:
                parts.clear()
            more = message.get("more_body", False)
        if size > most:
            text = f"the request has more than {most / 2**20:g} MiB: send fewer or smaller images"
            raise RequestError(text, code="too_large", status=413)
        return b"".join(parts)

    async def _serve(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Run the application until it has answered, or until the client is gone."""
        name = f"chatcmpl-{uuid4().hex}"
        headers = [header for header in scope["headers"] if header[0] != ID_HEADER]
        scope = {**scope, "headers": [*headers, (ID_HEADER, name.encode())]}
        gone, messages = asyncio.Event(), [{"type": "http.request", "body": body, "more_body": False}]

        async def give() -> Message:
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def take(message: Message) -> None:
            try:
                await asyncio.wait_for(send(message), SEND_SECONDS)
            except asyncio.TimeoutError:
                gone.set()

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        async def over() -> None:
            await gone.wait()

        tasks = [asyncio.create_task(part) for part in (self._app(scope, give, take), watch(), over())]
        try:
            await asyncio.wait([tasks[0], tasks[2]], return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                tasks[0].result()
        finally:
            self._ended(name)
            for task in tasks:
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):  # what the application had to say is above
                    await task


async def refuse(error: RequestError, send: Send) -> None:
    """Answer with an error."""
    body = json.dumps(error_body(str(error), error.status, error.param, error.code)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.status in (408, 413):  # the rest of the request is not read
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
