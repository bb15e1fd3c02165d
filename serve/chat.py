"""A chat about images in the terminal: `llava-skip chat MODEL`."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from llava_skip_base.console import (
    hide_bars_in_files,
    print_aside,
    print_error,
    print_piece,
    print_text,
    program,
    waiting,
)
from llava_skip_base.errors import UserError
from serve.answering import Answerer
from serve.conversation import Conversation, Picture
from serve.dropped import take_images, typed_path
from serve.loading import Loaded, choose_device, choose_dtype, load

PROMPT = "> "
HELP = """\
Type a question. Name images in it by their paths, or drop their files on the window; a line with images alone keeps
them for the next question.
/image PATH  attach an image
/clear       begin again, without the turns before
/save FILE   write the conversation as a JSON data set of LLaVA's format, its images beside it
/help        this text
/exit        end; so does Ctrl-D. Ctrl-C stops an answer."""


class Chat:
    """What happens with each line. Mistakes are printed, and the chat goes on.

    Args:
        loaded: the model.
        answerer: of its answers.
    """

    def __init__(self, loaded: Loaded, answerer: Answerer) -> None:
        self._loaded, self._answerer = loaded, answerer
        self._conversation = Conversation()
        self._saved: set[Path] = set()
        self._commands: dict[str, Callable[[str], bool]] = {
            "/image": self._image, "/clear": self._clear, "/save": self._save, "/help": self._help, "/exit": self._exit,
        }  # fmt: skip

    def take(self, line: str) -> bool:
        """Do what a line says; False ends the chat."""
        name, _, rest = line.strip().partition(" ")
        try:
            if name in self._commands:
                return self._commands[name](rest.strip())
            if name.startswith("/") and "/" not in name[1:] and "." not in name:
                raise UserError(f"there is no command {name}; /help lists them.")
            self._say(line)
        except UserError as error:
            print_error(error)
        return True

    def attach(self, path: Path) -> None:
        """Let an image wait for the next question."""
        self._conversation.waiting.append(Picture.read(path, self._loaded.processor))

    def _say(self, line: str) -> None:
        paths, question = take_images(line)
        for path in paths:
            self.attach(path)
        if question:
            self._ask(question)
        elif paths:
            print_aside(f"{len(self._conversation.waiting)} attached; now ask")

    def _ask(self, question: str) -> None:
        turn = self._conversation.ask(question)
        try:
            with interruptible() as is_stopped, waiting("reading") as stop_waiting:

                def show(piece: str) -> None:
                    stop_waiting()
                    print_piece(piece)

                turn.answer, cost = self._answerer.answer(self._conversation, show, is_stopped)
        except (UserError, KeyboardInterrupt) as error:
            self._conversation.take_back()
            if isinstance(error, UserError):
                raise
            print_aside("\nstopped before an answer")
            return
        print_text("")
        print_aside(str(cost))

    def _image(self, rest: str) -> bool:
        if not rest:
            raise UserError("/image needs the path of an image.")
        self.attach(typed_path(rest))
        print_aside(f"{len(self._conversation.waiting)} attached; now ask")
        return True

    def _clear(self, rest: str) -> bool:
        self._conversation.clear()
        self._answerer.clear()
        print_aside("a new conversation")
        return True

    def _save(self, rest: str) -> bool:
        if not rest:
            raise UserError("/save needs the name of a file.")
        file = typed_path(rest).expanduser()
        if file.exists() and file.resolve() not in self._saved:
            raise UserError(f"{file} exists: give another name.")
        self._conversation.save(file)
        self._saved.add(file.resolve())
        print_aside(f"written to {file}")
        return True

    def _help(self, rest: str) -> bool:
        print_text(HELP)
        return True

    def _exit(self, rest: str) -> bool:
        return False


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Around an answer: the first Ctrl-C asks it to stop after its next token, the second one ends it at once.

    Yields whether the first one came.
    """
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def lines() -> Iterator[str]:
    """The lines that a user types, or those of a pipe, which are shown, as a terminal would have done."""
    is_terminal = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are no text
    if is_terminal:
        try:
            import readline  # noqa: F401  lines can then be edited, and earlier ones come back
        except ImportError:  # Windows has none
            pass
    while True:
        try:
            if is_terminal:
                yield input(PROMPT)
            elif line := sys.stdin.readline():
                print_text(PROMPT + line.rstrip("\n"))
                yield line
            else:
                return
        except EOFError:
            print_text("")
            return
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print_text("")
            print_aside("Ctrl-D or /exit ends the chat")


def chat(
    model: Annotated[str, typer.Argument(help="Folder or hub name of a saved model.")],
    image: Annotated[list[Path] | None, typer.Option(help="Image of the first question; may be repeated.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Limit of an answer's length.")] = 512,
    temperature: Annotated[
        float, typer.Option(min=0, max=10, help="0: the most likely tokens; larger: more varied ones.")
    ] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: the first GPU, if any.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16; default: bfloat16 on a GPU, float32 on a CPU.")
    ] = None,
) -> None:
    """Ask a model about images in the terminal, in several turns; each answer ends with what it took."""
    place = choose_device(device)
    number_format = choose_dtype(dtype, place)
    hide_bars_in_files()
    loaded = load(model, place, number_format)
    session = Chat(loaded, Answerer(loaded, max_new_tokens, temperature))
    for path in image or []:
        session.attach(path)
    print_aside(f"{loaded.folder.resolve().name} on {place}; /help says what can be typed")
    for typed in lines():
        line = typed.replace("\0", "")  # no path has it
        if line.strip() and not session.take(line):
            return


def main() -> None:
    """Chat from the command line."""
    program(chat)


if __name__ == "__main__":
    main()
