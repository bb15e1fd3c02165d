"""An OpenAI-compatible server of one model: `llava-skip serve MODEL`."""

from __future__ import annotations

import math
import socket
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from transformers.utils.import_utils import is_serve_available

from llava_skip_base.console import hide_bars_in_files, print_aside, print_text, program
from llava_skip_base.errors import MissingPackageError, UserError
from serve.chat_request import Limits
from serve.door import Door
from serve.listening import bound, names_of_host, url_of
from serve.loading import choose_device, choose_dtype, find

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
    sizes = {"megapixels": max_megapixels, "request-mib": max_request_mib, "seconds": max_seconds}
    for option, size in sizes.items():
        if not math.isfinite(size):
            raise UserError(f"--max-{option} is {size}; it must be a number above 0.")
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
        names = names_of_host(listener, host)
        door = Door(app, limits, names, answers.end)
        tell(name, str(place), listener, is_local=names is not None)
        run(door, listener, limits)


def tell(name: str, place: str, listener: socket.socket, is_local: bool) -> None:
    """Say what is served, where, and to whom."""
    print_text(f"{name} on {place} at {url_of(listener)}/v1")
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
