"""The demo's page: a chat for each model side by side, and below them what each did with the images.

It needs the extra `demo`, which has Gradio. Texts of models and users are never markup: Gradio gets them escaped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from llava_skip_base.errors import UserError
from llava_skip_base.files import write_bytes
from llava_skip_base.texts import plain
from serve.conversation import Picture, check_question
from serve.overlay import overlay, thumbnail
from serve.sessions import Session, Sessions, Settings, Side

MOST_IMAGES = 16
"""Images of one question."""
MOST_PIXELS = 50_000_000
"""Pixels of one image: decoded, these are 150 MB."""
MOST_WAITING = 16
"""Questions that wait for their turn; more are refused."""
MOST_TOKENS = 4096
"""The largest length of an answer that can be chosen."""

CSS = """
.chat [aria-label="Share"] { display: none; }
.chat .message .md { white-space: pre-wrap; overflow-wrap: anywhere; }
.cost { font-size: .85rem; opacity: .8; min-height: 1.3rem; }
.fault { border-left: 3px solid #c33; padding-left: .5rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.seen { overflow-x: auto; margin-bottom: 1.2rem; }
.seen h3 { overflow-wrap: anywhere; }
.seen th, .seen td { padding: .1rem .8rem .1rem 0; text-align: right; }
.seen th:first-child, .seen td:first-child { text-align: left; }
.panels { display: flex; flex-wrap: wrap; gap: .8rem; }
.panels figure { margin: 0; flex: 0 1 15rem; }
.drawn { position: relative; }
.drawn svg { position: absolute; inset: 0; width: 100%; height: 100%; }
.drawn rect { fill: transparent; }
.drawn g:hover rect { stroke: #fff; stroke-width: 4; }
.panels img { width: 100%; height: auto; image-rendering: pixelated; }
.panels figcaption { font-size: .8rem; opacity: .8; }
"""
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
"""Fonts of the system: no address of others is asked for one."""


def build(sessions: Sessions, uploads: Path, max_new_tokens: int) -> gr.Blocks:
    """The page.

    Args:
        sessions: of all who have it open.
        uploads: the folder of Gradio's files, for small copies of the images.
        max_new_tokens: limit of an answer's length, to begin with.
    """
    with gr.Blocks(title="llava-skip", analytics_enabled=False, delete_cache=(600, 24 * 3600)) as blocks:
        page = _Page(sessions, uploads, max_new_tokens)
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        message = [page.box, page.length, page.temperature]
        page.box.submit(page.ask, message, page.all, concurrency_limit=1, **private)
        page.stop.click(page.end_answer, queue=False, **private)
        clears = [page.clear.click, *(chat.clear for chat in page.chats)]  # each chat has a button of its own
        gr.on(clears, page.forget, None, page.all, queue=False, **private)
        blocks.unload(page.close)
    blocks.queue(max_size=MOST_WAITING, api_open=False, default_concurrency_limit=1)
    return blocks


class _Page:
    """The parts of the page, and what happens on it; to be made inside of its `Blocks`. Arguments as those of `build`.

    What happens gives new values of parts, or changes of them.
    """

    def __init__(self, sessions: Sessions, uploads: Path, max_new_tokens: int) -> None:
        self._sessions, self._uploads = sessions, uploads
        self.chats: list[gr.Chatbot] = []
        self._lines: list[gr.HTML] = []
        with gr.Row(equal_height=True):
            for model in sessions.models:
                self._add_chat(model.name)
        self._notice = gr.HTML(elem_id="notice", padding=False)
        self.box = gr.MultimodalTextbox(
            elem_id="question", file_types=["image"], file_count="multiple", sources=["upload"], show_label=False,
            placeholder="Ask a question; drop images here", max_plain_text_length=100_000, autofocus=True,
        )  # fmt: skip
        with gr.Row():
            self.stop = gr.Button("Stop", elem_id="stop", interactive=False)
            self.clear = gr.Button("Clear", elem_id="clear")
            most, first = MOST_TOKENS, min(max_new_tokens, MOST_TOKENS)
            self.length = gr.Slider(1, most, first, step=1, label="Longest answer, tokens")
            self.temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature (0: the most likely tokens)")
        self._drawn: list[gr.HTML] = []
        with gr.Row():
            for number in range(len(sessions.models)):
                with gr.Column(min_width=320):
                    self._drawn.append(gr.HTML(elem_id=f"overlay-{number}"))
        self.all = [*self.chats, *self._lines, self._notice, self.box, self.stop, self.clear, *self._drawn]

    def _add_chat(self, name: str) -> None:
        """The column of a model: its chat, and the line about its last answer."""
        number = len(self.chats)
        with gr.Column(min_width=320):
            chat = gr.Chatbot(
                label=plain(name), height=360, render_markdown=False, sanitize_html=True, buttons=[],
                group_consecutive_messages=False, elem_id=f"chat-{number}", elem_classes="chat",
            )  # fmt: skip
            self.chats.append(chat)
            self._lines.append(gr.HTML(elem_id=f"cost-{number}", elem_classes="cost", padding=False))

    # --- what happens

    def ask(self, message: Any, tokens: Any, temperature: Any, request: gr.Request) -> Iterator[dict[Any, Any]]:
        """A question is sent."""
        session = self._session(request)
        try:
            settings = Settings(*_numbers(tokens, temperature))
            question, pictures = _read(message or {}, session)
            for number, _ in enumerate(session.ask(question, pictures, settings)):
                yield self._asked(session) if number == 0 else self._said(session)
        except UserError as error:
            yield {self._notice: _fault(str(error)), **self._idle()}
            return
        except Exception:  # a fault of the program, which goes on for others
            yield {self._notice: _fault("the demo has failed: its terminal says why."), **self._idle()}
            raise
        yield self._said(session)
        failed = all(side.fault for side in session.sides)  # nobody has the question: it goes back into its field
        yield {**self._overlays(session, bool(pictures)), **self._idle(), **({self.box: message} if failed else {})}

    def forget(self, request: gr.Request) -> dict[Any, Any]:
        """A new conversation is asked for."""
        session = self._session(request)
        try:
            session.clear()
        except UserError as error:
            return {self._notice: _fault(str(error))}
        return {self._notice: "", self.box: None, **self._said(session), **self._overlays(session)}

    def end_answer(self, request: gr.Request) -> None:
        """The answer is to end."""
        self._session(request).stop()

    def close(self, request: gr.Request) -> None:
        """The page was closed."""
        self._sessions.remove(str(request.session_hash))

    def _session(self, request: gr.Request) -> Session:
        return self._sessions.get(str(request.session_hash))

    # --- what is shown

    def _asked(self, session: Session) -> dict[Any, Any]:
        """A question was taken, and is being answered."""
        buttons = {self.stop: gr.Button(interactive=True), self.clear: gr.Button(interactive=False)}
        return {self._notice: "", self.box: None, **buttons, **self._said(session)}

    def _idle(self) -> dict[Any, Any]:
        """No question is being answered."""
        return {self.stop: gr.Button(interactive=False), self.clear: gr.Button(interactive=True)}

    def _said(self, session: Session) -> dict[Any, Any]:
        """The conversations, and the lines below them."""
        found: dict[Any, Any] = {}
        for chat, line, side in zip(self.chats, self._lines, session.sides, strict=True):
            found[chat] = self._messages(side)
            found[line] = _fault(side.fault) if side.fault else _text(str(side.cost or ""))
        return found

    def _overlays(self, session: Session, are_new: bool = True) -> dict[Any, Any]:
        """What the models did with the images of the last question that had some; those that are drawn stay."""
        pairs = zip(self._drawn, session.sides, strict=True)
        return {place: overlay(side) for place, side in pairs if are_new or not side.conversation.pictures}

    def _messages(self, side: Side) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for turn in side.conversation.turns:
            images = [{"path": self._small(picture)} for picture in turn.pictures]
            found.append({"role": "user", "content": [*images, _text(turn.question)]})
            answer = turn.answer if turn.answer is not None else f"{side.text or ''} ..."
            found.append({"role": "assistant", "content": _text(answer)})
        return found

    def _small(self, picture: Picture) -> str:
        """The file of a small copy of an image."""
        path = self._uploads / f"{hashlib.sha256(picture.content).hexdigest()}.webp"
        if not path.exists():
            write_bytes(path, thumbnail(picture))
        return str(path)


def _numbers(tokens: Any, temperature: Any) -> tuple[int, float]:
    """What the sliders say; a request may say something else."""
    try:
        length, heat = int(tokens), float(temperature)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError("length and temperature must be numbers.") from error
    if not 1 <= length <= MOST_TOKENS or not 0 <= heat <= 2:
        raise UserError(f"the length must be from 1 to {MOST_TOKENS:,}, and the temperature from 0 to 2.")
    return length, heat


def _read(message: dict[str, Any], session: Session) -> tuple[str, list[Picture]]:
    """Question and images of a message.

    Raises:
        UserError: there is no question, or an image cannot be read, or they are too many.
    """
    question, files = str(message.get("text") or "").strip(), message.get("files") or []
    if not question:
        raise UserError("type a question." if not files else "type a question about the image.")
    check_question(question)
    if len(files) > MOST_IMAGES:
        raise UserError(f"{len(files)} images: one question takes at most {MOST_IMAGES}.")
    processors = [_Bounded(), *(side.model.loaded.processor for side in session.sides)]
    return question, [Picture.read(Path(file), *processors, shown=Path(file).name) for file in files]


class _Bounded:
    """Looks at an image's size as processors do."""

    def check_image_size(self, width: int, height: int) -> None:
        """Raise UserError for an image that would fill the server's memory."""
        if width * height > MOST_PIXELS:
            raise UserError(f"an image of {width} x {height} pixels is too large: at most {MOST_PIXELS:,} pixels.")


def _text(text: str) -> str:
    """A text as HTML, which Gradio's chat takes every message for, also without Markdown."""
    return escape(plain(text))


def _fault(message: str) -> str:
    return f'<div class="fault" role="alert">{_text(message)}</div>'
