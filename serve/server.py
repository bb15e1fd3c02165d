"""An OpenAI-compatible server of one model: `llava-skip serve MODEL`."""

from __future__ import annotations

import socket
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

import typer
from transformers.utils.import_utils import is_serve_available

from llava_skip_base.console import hide_bars_in_files, print_aside, print_text, program
from llava_skip_base.errors import MissingPackageError, UserError
from serve.chat_request import Limits
from serve.door import Door
from serve.loading import choose_device, choose_dtype, find

_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
_IDLE_CONNECTIONS = 128
"""Connections beside those of the requests that are taken."""
_CLOSING_SECONDS = 3
ONE_AT_A_TIME = "it answers one request at a time, in their order: for load, serve the model with vLLM"


def serve(
    model: Annotated[str, typer.Argument(help="Folder or hub name of a saved model: the only one that is served.")],
    host: Annotated[str, typer.Option(help="Address to listen on; others than this open it.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free one.")] = 8000,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: the first GPU, if any.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16; default: bfloat16 on a GPU, float32 on a CPU.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = Limits.new_tokens,
    max_images: Annotated[int, typer.Option(min=0, help="Most images of a request.")] = Limits.images,
    max_megapixels: Annotated[
        float, typer.Option(min=0.001, help="Most million pixels of a request's images together.")
    ] = Limits.pixels / 1e6,
    max_request_mib: Annotated[float, typer.Option(min=0.001, help="Most MiB of a request.")] = Limits.body / 2**20,
    max_seconds: Annotated[
        float, typer.Option(min=0.001, help="Seconds after which an answer is cut; waiting does not count.")
    ] = Limits.seconds,
    max_requests: Annotated[
        int, typer.Option(min=1, help="Requests that are answered or wait; more are told to come again.")
    ] = Limits.requests,
) -> None:
    """Answer chat completions of OpenAI's interface with a model; one request at a time, on this machine alone."""
    if not is_serve_available():
        raise MissingPackageError("serve needs fastapi, uvicorn and openai: pip install '.[serve]' in a checkout.")
    limits = Limits(
        max_new_tokens, max_images, int(max_megapixels * 1e6), int(max_request_mib * 2**20), max_seconds, max_requests
    )
    place = choose_device(device)
    number_format = choose_dtype(dtype, place)
    hide_bars_in_files()
    with bound(host, port) as listener:  # before the weights load
        loaded = find(model).load(place, number_format)
        name = loaded.folder.resolve().name if Path(model).is_dir() else model

        from serve.transformers_app import build_app  # needs the extra

        app, answers = build_app(loaded, name, limits)
        is_local = ip_address(listener.getsockname()[0]).is_loopback
        door = Door(app, limits, (*_LOCAL_NAMES, host.lower()) if is_local else None, answers.end)
        tell(name, str(place), listener, is_local)
        run(door, listener, limits)


def bound(host: str, port: int) -> socket.socket:
    """A socket that has an address and does not listen yet.

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
    except (OSError, UnicodeError) as error:
        if listener is not None:
            listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--host {host} --port {port} cannot be used ({reason}): give others.") from error
    return listener


def tell(name: str, place: str, listener: socket.socket, is_local: bool) -> None:
    """Say what is served, where, and to whom."""
    address, port = listener.getsockname()[:2]
    address = f"[{address}]" if ":" in address else address
    print_text(f"{name} on {place} at http://{address}:{port}/v1")
    if not is_local:
        print_text(
            "warning: whoever reaches this address can use the model, without a password and without encryption: "
            "put a proxy with both in front of it (docs/security.md)"
        )
    print_aside(ONE_AT_A_TIME)


def run(app: Door, listener: socket.socket, limits: Limits) -> None:
    """Serve until Ctrl-C or a signal."""
    import uvicorn  # of the extra

    config = uvicorn.Config(
        app,
        http="h11",  # the limits of the headers are its own
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=limits.requests + _IDLE_CONNECTIONS,
        timeout_graceful_shutdown=_CLOSING_SECONDS,
    )
    with suppress(KeyboardInterrupt):  # the usual end, once all is closed
        uvicorn.Server(config).run(sockets=[listener])


def main() -> None:
    """Serve from the command line."""
    program(serve)


if __name__ == "__main__":
    main()
