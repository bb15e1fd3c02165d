"""What stands before the server, around an application that does as little as possible."""

import asyncio
import json

import pytest

from serve import door
from serve.chat_request import Limits
from serve.door import CHAT, Door


class Application:
    """Answers with the id of each request; with `waits`, only once it is let."""

    def __init__(self, waits: bool = False) -> None:
        self.let, self.cancelled, self.bodies, self.ids = asyncio.Event(), 0, [], []
        if not waits:
            self.let.set()

    async def __call__(self, scope, receive, send):
        message = await receive()
        self.bodies.append(message["body"])
        self.ids.append(dict(scope["headers"])[b"x-request-id"].decode())
        try:
            await self.let.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


class Client:
    """One request; `gone` ends its connection."""

    def __init__(self, *parts: bytes, path: str = CHAT, stalls: bool = False, **headers: str) -> None:
        headers = {"host": "localhost:8000", "content-type": "application/json"} | headers
        self.scope = {"type": "http", "method": "POST", "path": path}
        self.scope["headers"] = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        self._parts, self._stalls = list(parts or (b"{}",)), stalls
        self.gone, self.status, self.body = asyncio.Event(), None, b""

    async def receive(self):
        if not self._parts:
            await self.gone.wait()
            return {"type": "http.disconnect"}
        part = self._parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(self._parts)}

    async def send(self, message):
        if self._stalls:
            await asyncio.Event().wait()
        self.status = message.get("status", self.status)
        self.body += message.get("body", b"")

    async def ask(self, app: Door) -> "Client":
        await app(self.scope, self.receive, self.send)
        return self

    @property
    def code(self) -> str:
        return json.loads(self.body)["error"]["code"]


def guarded(app: Application, ended: list[str], **limits) -> Door:
    return Door(app, Limits(**limits), ("localhost", "::1"), ended.append)


async def soon(is_so) -> None:
    for _ in range(1000):
        if is_so():
            return
        await asyncio.sleep(0.005)
    raise AssertionError


def test_a_request_gets_an_id_of_its_own_and_its_end_is_told():
    async def run():
        app, ended = Application(), []
        client = await Client(b'{"a"', b": 1}", x_request_id="chosen").ask(guarded(app, ended))
        assert client.status == 200 and app.bodies == [b'{"a": 1}']
        assert app.ids == ended and ended[0].startswith("chatcmpl-")

    asyncio.run(run())


def test_a_lost_client_cancels_its_answer():
    async def run():
        app, ended = Application(waits=True), []
        client = Client()
        task = asyncio.create_task(client.ask(guarded(app, ended)))
        await soon(lambda: app.ids)
        assert not ended
        client.gone.set()
        await task
        assert app.cancelled == 1 and ended == app.ids and client.status is None

    asyncio.run(run())


def test_more_requests_than_are_taken_are_told_to_come_again():
    async def run():
        app, ended = Application(waits=True), []
        entry = guarded(app, ended, requests=2)
        tasks = [asyncio.create_task(Client().ask(entry)) for _ in range(2)]
        await soon(lambda: len(app.ids) == 2)
        refused = await Client().ask(entry)
        assert (refused.status, refused.code) == (503, "busy")
        app.let.set()
        assert [(await task).status for task in tasks] == [200, 200]
        assert (await Client().ask(entry)).status == 200

    asyncio.run(run())


@pytest.mark.parametrize("stalls", [False, True])
def test_a_client_that_sends_or_takes_nothing_is_not_waited_for(monkeypatch, stalls):
    monkeypatch.setattr(door, "BODY_SECONDS", 0.05)
    monkeypatch.setattr(door, "SEND_SECONDS", 0.05)

    async def run():
        app, ended = Application(), []
        client = Client(stalls=stalls)
        if not stalls:
            client.receive = asyncio.Event().wait
        await asyncio.wait_for(client.ask(guarded(app, ended)), 30)
        assert (ended, app.ids) == (app.ids, []) and client.code == "slow" if not stalls else ended == app.ids != []

    asyncio.run(run())


@pytest.mark.parametrize("size", [101, 390, 5000])
def test_a_request_that_is_too_large_is_not_kept(size):
    async def run():
        app, ended = Application(), []
        client = await Client(*[b"x"] * size).ask(guarded(app, ended, body=100))
        assert (client.status, client.code, app.ids, ended) == (413, "too_large", [], [])
        assert (await Client(*[b"x"] * 100).ask(guarded(app, ended, body=100))).status == 200

    asyncio.run(run())


def test_an_error_of_the_application_is_not_hidden():
    async def broken(scope, receive, send):
        raise ZeroDivisionError

    ended = []
    with pytest.raises(ZeroDivisionError):
        asyncio.run(Client().ask(Door(broken, Limits(), None, ended.append)))
    assert len(ended) == 1


def test_names_and_kinds():
    async def run():
        app, ended = Application(), []
        local = guarded(app, ended)
        for host, status in (("localhost", 200), ("[::1]:8000", 200), ("evil.example", 403), ("", 403)):
            assert (await Client(host=host).ask(local)).status == status
        assert (await Client(host="any.name").ask(Door(app, Limits(), None, ended.append))).status == 200
        for kind, status in (("application/json; charset=utf-8", 200), ("text/plain", 415), ("", 415)):
            assert (await Client(content_type=kind).ask(local)).status == status

    asyncio.run(run())
