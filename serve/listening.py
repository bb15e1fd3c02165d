"""Where a server listens, and the types of ASGI (https://asgi.readthedocs.io), which what stands before one has."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, MutableMapping
from ipaddress import ip_address
from typing import Any

from llava_skip_base.errors import UserError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
"""Names of this machine for itself."""


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens: nobody else can take its address while weights load, and who comes early waits.

    Raises:
        UserError: the address is not one of this machine, or is in use.
    """
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except (OSError, UnicodeError) as error:
        if listener is not None:
            listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--host {host} --port {port} cannot be used ({reason}): give others.") from error
    return listener


def names_of_host(listener: socket.socket, host: str) -> frozenset[str] | None:
    """The names under which a server may be asked for; None, any, where other machines reach it.

    A page of the web that has given its own name the address of this machine asks under that name.
    """
    local = ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback
    return LOCAL_NAMES | {host.lower()} if local else None


def url_of(listener: socket.socket) -> str:
    """The address of a server, as a browser takes it."""
    address, port = listener.getsockname()[:2]
    return f"http://{f'[{address}]' if ':' in address else address}:{port}"


def without_port(host: str) -> str:
    """The name in a header `Host`."""
    if host.startswith("["):
        return host.partition("]")[0][1:].lower()
    return host.partition(":")[0].lower()
