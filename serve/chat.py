"""A chat about images in the terminal: `llava-skip chat MODEL`."""

from __future__ import annotations

import io
import math
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
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
from llava_skip_base.texts import shortened
from serve.answering import Answerer
from serve.conversation import Conversation, Picture
from serve.dropped import take_images, typed_path
from serve.loading import Loaded, choose_device, choose_dtype, find
from serve.saving import Saver

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
        pictures: images of the first question.
    """

    def __init__(self, loaded: Loaded, answerer: Answerer, pictures: Sequence[Picture] = ()) -> None:
        self._loaded, self._answerer = loaded, answerer
        self._conversation = Conversation()
        self._conversation.waiting = list(pictures)
        self._saver = Saver()
        self._commands: dict[str, Callable[[str], bool]] = {
            "/image": self._image, "/clear": self._clear, "/save": self._save, "/help": self._help, "/exit": self._exit,
        }  # fmt: skip

    def take(self, line: str) -> bool:
        """Do what a line says; False ends the chat. Ctrl-C stops what goes on, and never the chat."""
        try:
            with interruptible() as is_stopped:
                return self._do(line, is_stopped)
        except UserError as error:
            print_error(error)
        except KeyboardInterrupt:
            print_aside("\nstopped before an answer")
        if number := len(self._conversation.waiting):
            images = "1 image waits" if number == 1 else f"{number} images wait"
            print_aside(f"{images} for the next question")
        return True

    def _attach(self, paths: Sequence[Path]) -> None:
        """Let images wait for the next question: all of them, or none if one cannot be read."""
        self._conversation.waiting += [Picture.read(path, self._loaded.processor) for path in paths]

    def _do(self, line: str, is_stopped: Callable[[], bool]) -> bool:
        name, rest = [*line.split(maxsplit=1), "", ""][:2]
        try:
            line.encode()
        except UnicodeEncodeError as error:  # halves of characters
            raise UserError("the line has bytes that are no text (UTF-8): type it again.") from error
        if name in self._commands:
            return self._commands[name](rest.strip())
        if name.startswith("/") and "/" not in name[1:] and "." not in name:
            raise UserError(f"there is no command {shortened(name)}; /help lists them.")
        paths, question = take_images(line)
        self._attach(paths)
        if question:
            self._ask(question, is_stopped)
        elif paths:
            self._tell_attached()
        return True

    def _ask(self, question: str, is_stopped: Callable[[], bool]) -> None:
        if is_stopped():  # while the images were read
            raise KeyboardInterrupt
        turn = self._conversation.ask(question)
        try:
            with waiting("reading") as stop_waiting:

                def show(piece: str) -> None:
                    stop_waiting()
                    print_piece(piece)

                turn.answer, cost = self._answerer.answer(self._conversation, show, is_stopped)
        except BaseException:  # whatever it was, there is no answer
            self._conversation.take_back()
            raise
        print_text("")
        print_aside(str(cost))

    def _image(self, rest: str) -> bool:
        if not rest:
            raise UserError("/image needs the path of an image.")
        self._attach([typed_path(rest)])
        self._tell_attached()
        return True

    def _tell_attached(self) -> None:
        print_aside(f"{len(self._conversation.waiting)} attached; now ask")

    def _clear(self, rest: str) -> bool:
        self._conversation.clear()
        self._answerer.clear()
        self._saver.clear()
        print_aside("a new conversation")
        return True

    def _save(self, rest: str) -> bool:
        if not rest:
            raise UserError("/save needs the name of a file.")
        file = typed_path(rest)
        self._saver.save(self._conversation, file)
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
    if sys.stdin is None or sys.stdin.closed:  # started without one
        return
    is_terminal = sys.stdin.isatty()
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


def _let_streams_replace() -> None:
    """Let bytes that are no text, and characters that a terminal does not know, be replaced and not an error."""
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper) and not stream.closed:
            stream.reconfigure(errors=errors)


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
    if math.isnan(temperature):  # it is neither below the least nor above the most
        raise UserError("--temperature is no number: give one from 0 to 10.")
    place = choose_device(device)
    number_format = choose_dtype(dtype, place)
    hide_bars_in_files()
    _let_streams_replace()
    found = find(model)
    pictures = [Picture.read(path, found.processor) for path in image or []]  # a wrong path is told before weights load
    loaded = found.load(place, number_format)
    session = Chat(loaded, Answerer(loaded, max_new_tokens, temperature), pictures)
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
