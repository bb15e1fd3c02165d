"""A page to try models on images, and to see what they do with them: `llava-skip demo MODEL`."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from llava_skip_base.console import hide_bars_in_files, print_aside, print_text, program
from llava_skip_base.errors import MissingPackageError
from llava_skip_base.exits import STOPPED_BY
from llava_skip_base.paths import newest_model
from serve.guard import MOST_FILE, Guard
from serve.listening import bound, names_of_host, url_of
from serve.loading import Found, choose_device, choose_dtype, find
from serve.sessions import Model, Sessions


def demo(
    model: Annotated[
        str | None, typer.Argument(help="Folder or hub name of a saved model; default: the newest in checkpoints/.")
    ] = None,
    compare: Annotated[str | None, typer.Option(help="A second model, side by side: folder or hub name.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 7860,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Limit of an answer's length, to begin with.")] = 512,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: the first GPU, if any.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16; default: bfloat16 on a GPU, float32 on a CPU.")
    ] = None,
) -> None:
    """Open a page: chat with images, two models side by side, and what they do with the parts of an image."""
    if find_spec("gradio") is None:
        raise MissingPackageError("the demo needs Gradio: pip install '.[demo]' in a checkout.")
    place = choose_device(device)
    number_format = choose_dtype(dtype, place)
    hide_bars_in_files()
    found = [find(source) for source in (model or str(newest_model()), compare) if source is not None]
    listening = bound(host, port)
    models = [Model(name, one.load(place, number_format)) for name, one in zip(names_of(found), found, strict=True)]
    with listening, tempfile.TemporaryDirectory(prefix="llava-skip-demo-") as uploads:
        serve(models, listening, names_of_host(listening, host), Path(uploads), max_new_tokens)


def names_of(found: list[Found]) -> list[str]:
    """The names of models on the page: those of their folders, with those above them where they are the same."""
    paths = [one.folder.resolve() for one in found]
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name} ({number})" for number, path in enumerate(paths, start=1)]


def serve(
    models: list[Model], listening: socket.socket, hosts: frozenset[str] | None, uploads: Path, max_new_tokens: int
) -> None:
    """Serve the page until Ctrl-C.

    Args:
        models: that are asked.
        listening: where.
        hosts: names by which the page may be asked for; None: any.
        uploads: an empty folder for the files of the page.
        max_new_tokens: limit of an answer's length, to begin with.
    """
    import uvicorn  # of the extra

    app = Guard(application(Sessions(models), uploads, max_new_tokens), uploads, hosts)
    print_text(url_of(listening))
    if hosts is None:
        print_aside("everybody who reaches this address can ask the models")
    print_aside("Ctrl-C ends the demo")
    settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)
    signal.signal(signal.SIGTERM, _end)
    try:
        uvicorn.Server(settings).run(sockets=[listening])
    except KeyboardInterrupt:  # uvicorn ends in good order, and passes on the signal that ended it
        pass


def _end(number: int, frame: object) -> NoReturn:
    """Leave in good order: the uploaded files are deleted on the way out."""
    raise SystemExit(STOPPED_BY + number)


def application(sessions: Sessions, uploads: Path, max_new_tokens: int) -> Any:
    """The page as an ASGI application, to be put behind `Guard`."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    import fastapi  # these take seconds to import, and are in the extra
    import gradio

    from serve import page

    blocks = page.build(sessions, uploads, max_new_tokens)
    blocks.has_launched = True  # Gradio looks at the paths of files only then
    options = {"footer_links": [], "run_history": False, "ssr_mode": False, "mcp_server": False, "pwa": False}
    options |= {"show_error": False, "enable_monitoring": False, "max_file_size": MOST_FILE}
    bare = fastapi.FastAPI(openapi_url=None)
    return gradio.mount_gradio_app(bare, blocks, "/", theme=page.THEME, css=page.CSS, **options)


def main() -> None:
    """Serve the demo from the command line."""
    program(demo)


if __name__ == "__main__":
    main()
