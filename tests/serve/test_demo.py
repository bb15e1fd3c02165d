"""The demo as its users have it: a real browser, in which images are uploaded and questions asked."""

import base64
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import serve.demo
from llava_skip import preset_config
from llava_skip.pictures import OUTLINE
from llava_skip_base.console import make_app
from llava_skip_base.exits import STOPPED_BY
from serve.answering import Answerer
from serve.demo import application, demo, names_of
from serve.guard import Guard
from serve.listening import bound
from serve.loading import find, load
from serve.sessions import Model, Sessions
from tests.support.browser import NAMES, Browser, Tab, installed

ROOT = Path(__file__).parents[2]
SKIP = preset_config("sv-llava-64").skip_config
FIELD, FILES = "#question textarea", "#question input[type=file]"
LENGTH = "input[type=number][aria-label*='Longest answer']"
WAITING_IMAGES = "document.querySelectorAll('#question .thumbnail-item').length"
READY = "document.querySelector('#stop').disabled && !document.querySelector('#clear').disabled"
COST = r"4 tokens, first after [\d.]+ s, [\d.]+ tokens/s, cache keeps ([\d,]+) of ([\d,]+)"
HOSTILE = """<img src=x onerror="document.title='owned'"><b>bold</b> **bold** [x](javascript:1) $x$ &amp;\n\n# a  b"""


@pytest.fixture(scope="module")
def pages(saved, saved_dense) -> Sessions:
    """The sessions of a demo of two models."""
    cpu = torch.device("cpu"), torch.float32
    return Sessions([Model("skip <b>ping</b>", load(str(saved), *cpu)), Model("dense", load(str(saved_dense), *cpu))])


@pytest.fixture(scope="module")
def server(pages, tmp_path_factory) -> Iterator[str]:
    """The address of the demo."""
    pytest.importorskip("gradio", reason="gradio is not installed; the extra 'demo' has it")
    import uvicorn

    uploads = tmp_path_factory.mktemp("uploads")
    listening = bound("127.0.0.1", 0)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR"):  # the demo sets them
            patch.setenv(name, "")
        app = Guard(application(pages, uploads, 4), uploads, frozenset({"127.0.0.1"}))
        running = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        running.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def browser(server, tmp_path_factory) -> Iterator[Browser]:
    path = installed()
    if path is None:
        pytest.skip(f"no browser found ({', '.join(NAMES)}); 'apt-get install chromium' brings one")
    opened = Browser(path, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def new_tab(server: str, browser: Browser) -> Tab:
    opened = browser.open(server)
    parts = (FIELD, "#clear", "#stop", LENGTH)  # they come one by one
    opened.wait_for(f"{json.dumps(parts)}.every(part => document.querySelector(part))")
    return opened


@pytest.fixture(scope="module")
def one_tab(server, browser) -> Tab:
    return new_tab(server, browser)


@pytest.fixture
def tab(one_tab) -> Tab:
    """A tab with a new conversation."""
    clear(one_tab)
    return one_tab


def clear(tab: Tab) -> None:
    tab.type(FIELD, "to be forgotten")
    tab.run("document.querySelector('#clear').click()")
    tab.wait_for(f"!document.querySelector('.chat .message, .seen, [role=alert]') && {WAITING_IMAGES} == 0")
    tab.wait_for(f"document.querySelector('{FIELD}').value == ''")


@pytest.fixture
def images(tmp_path) -> list[Path]:
    files = [tmp_path / "one & two.png", tmp_path / "second.tiff"]
    for file, colour in zip(files, ("teal", "orange"), strict=True):
        Image.new("RGB", (40, 30), colour).save(file)
    return files


def ask(tab: Tab, question: str, answers: int, files=()) -> None:
    """Ask, and wait until so many answers of both models are there."""
    if files:
        attach(tab, files)
    tab.type(FIELD, question)
    tab.press_enter()
    finished = sides("chat", f"part.querySelectorAll('.bot.message').length == {answers}")
    tab.wait_for(f"{finished}.every(Boolean) && {READY}")


def attach(tab: Tab, files) -> None:
    tab.attach(FILES, list(files))
    tab.wait_for(f"{WAITING_IMAGES} == {len(files)}")


def sides(kind: str, script: str) -> str:
    """A script's values for the `part` of each model's side."""
    return f"[0, 1].map(n => document.getElementById('{kind}-' + n)).map(part => {script})"


def said(tab: Tab, who: str) -> list[list[str]]:
    """What `user` or `bot` has said in the chat of each model."""
    found = tab.run(sides("chat", f"[...part.querySelectorAll('.{who}.message')].map(each => each.innerText)"))
    return [[text.strip() for text in chat if text.strip()] for chat in found]  # an image has no text


def costs(tab: Tab) -> list[tuple[int, int]]:
    """For each model the entries that the cache keeps, and those that were seen."""
    texts = tab.run(sides("cost", "part.innerText"))
    found = [re.search(COST, text) for text in texts]
    assert all(found), texts
    return [(int(each[1].replace(",", "")), int(each[2].replace(",", ""))) for each in found]


def count_of(file: Path, colour: tuple[int, int, int]) -> int:
    """Pixels of about a colour."""
    pixels = numpy.asarray(Image.open(file).convert("RGB"), dtype=int)
    return int((abs(pixels - colour).max(axis=-1) < 40).sum())


def brightness(file: Path) -> float:
    return float(numpy.asarray(Image.open(file).convert("L")).mean())


@pytest.mark.slow
def test_an_image_is_uploaded_a_question_asked_and_the_overlay_drawn(server, tab, images, tmp_path):
    ask(tab, "What is this?", 1, images[:1])
    (kept, seen), (dense_kept, dense_seen) = costs(tab)
    assert seen - kept == SKIP.num_skipping and dense_kept == dense_seen
    tab.wait_for("document.querySelectorAll('.seen').length == 2")
    counts = tab.run(sides("overlay", "[...part.querySelectorAll('[data-count]')].map(each => each.innerText)"))
    patches = str(preset_config("llava").patches)
    assert counts == [[str(SKIP.length), str(SKIP.num_kept), str(SKIP.num_kept)], [patches] * 3]
    panels = tab.run(sides("overlay", "[...part.querySelectorAll('figure')].map(each => each.dataset.panel)"))
    assert panels == [["retained", "merged", "summary1", "summary2"], ["image"]]
    tab.wait_for("[...document.querySelectorAll('.seen img')].every(each => each.complete && each.naturalWidth)")

    tab.screenshot(tmp_path / "page.png")
    for panel in ("retained", "merged", "image"):
        tab.screenshot(tmp_path / f"{panel}.png", f"[data-panel={panel}] .drawn")
    outlined, plain = (count_of(tmp_path / f"{name}.png", OUTLINE) for name in ("retained", "image"))
    assert outlined > 300 and plain == 0, "the retained patches are not outlined"
    assert brightness(tmp_path / "retained.png") < 0.7 * brightness(tmp_path / "image.png"), "the others are not dimmed"
    assert count_of(tmp_path / "merged.png", (255, 255, 255)) > 300, "the parts that keep their token have no frame"

    others = [address for address in tab.requests() if not address.startswith((server, "data:", "blob:"))]
    assert others == [] and len(tab.requests()) > 10
    assert "skip <b>ping</b>" in tab.run("document.body.innerText")


@pytest.mark.slow
def test_two_tabs_have_their_own_turns(pages, server, browser, tab, images):
    other = new_tab(server, browser)
    ask(tab, "first here", 1, images)
    ask(other, "first there", 1)
    ask(tab, "second here", 2)
    assert said(tab, "user") == [["first here", "second here"]] * 2
    assert said(other, "user") == [["first there"]] * 2
    (kept, seen), _ = costs(tab)
    assert seen - kept == 2 * SKIP.num_skipping  # of two images, a turn ago
    (kept, seen), _ = costs(other)
    assert kept == seen
    clear(tab)
    assert said(other, "bot")[0]
    ask(tab, "third here", 1)
    (kept, seen), _ = costs(tab)
    assert seen == kept and said(tab, "user") == [["third here"]] * 2
    assert len(pages) == 2
    other.close()
    end = time.monotonic() + 60
    while len(pages) == 2:  # a closed tab is forgotten
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
def test_an_image_is_dropped(tab, images):
    script = """(() => {
        const bytes = Uint8Array.from(atob(%s), letter => letter.charCodeAt(0));
        const data = new DataTransfer();
        data.items.add(new File([bytes], "dropped.png", {type: "image/png"}));
        const place = document.querySelector("#question .full-container");
        for (const kind of ["dragenter", "dragover", "drop"])
            place.dispatchEvent(new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true}));
    })()"""
    tab.run(script % json.dumps(base64.b64encode(images[0].read_bytes()).decode()))
    tab.wait_for(f"{WAITING_IMAGES} == 1")
    ask(tab, "What is this?", 1)
    tab.wait_for("document.querySelector('.seen h3')?.innerText.endsWith('image 1: dropped.png')")


@pytest.mark.slow
def test_no_text_is_markup(tab, monkeypatch):
    real = Answerer.answer
    monkeypatch.setattr(Answerer, "answer", lambda *words: (HOSTILE, real(*words)[1]))
    ask(tab, HOSTILE, 1)
    assert said(tab, "bot") == said(tab, "user") == [[HOSTILE]] * 2
    assert tab.run("document.title") != "owned"
    assert not tab.run("!!document.querySelector('.chat .message b, .chat .message img, .chat .message a')")


@pytest.mark.slow
def test_an_answer_is_stopped(tab):
    tab.run(f"document.querySelector({json.dumps(LENGTH)}).select()")
    tab.call("Input.insertText", text="4000")
    tab.type(FIELD, "Say much.")
    tab.press_enter()
    tab.wait_for("!document.querySelector('#stop').disabled")
    tab.run("document.querySelector('#stop').click()")
    tab.wait_for(READY)
    line = tab.run(sides("cost", "part.innerText"))[0].strip()
    assert line.endswith("stopped") and int(line.split()[0].replace(",", "")) < 4000
    assert said(tab, "bot")[1] == []  # the second model was not asked


@pytest.mark.slow
def test_what_is_no_image_is_told_and_the_question_stays(tab, tmp_path):
    (broken := tmp_path / "broken.png").write_bytes(b"<svg onload=alert(1)>")
    attach(tab, [broken])
    tab.type(FIELD, "What is this?")
    tab.press_enter()
    tab.wait_for("document.querySelector('[role=alert]')?.innerText.includes('is no image that can be read')")
    assert tab.run(f"document.querySelector('{FIELD}').value") == "What is this?" and said(tab, "user") == [[], []]


@pytest.mark.slow
def test_the_program_ends_in_good_order(saved, tmp_path):
    pytest.importorskip("gradio", reason="gradio is not installed; the extra 'demo' has it")
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "llava_skip", "demo", str(saved), "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | own, **pipes) as process:
        try:
            address = next(line.strip() for line in process.stdout if line.startswith("http"))
            page = httpx.get(address, trust_env=False, timeout=60)
            assert page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]
            assert list(tmp_path.glob("llava-skip-demo-*"))
        finally:
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=60)
    assert process.returncode == STOPPED_BY + signal.SIGTERM and "Traceback" not in errors
    assert not list(tmp_path.glob("llava-skip-demo-*"))


def test_a_demo_needs_gradio(saved, monkeypatch):
    monkeypatch.setattr(serve.demo, "find_spec", lambda name: None)
    assert message(saved).startswith("error: the demo needs Gradio: pip install '.[demo]'")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["/nowhere"], "/nowhere"),
        (["SAVED", "--compare", "/nowhere"], "/nowhere"),
        (["SAVED", "--port", "IN USE"], "port \\d+ cannot be used \\(Address already in use\\): give others"),
        (["SAVED", "--host", "no such host"], "--host no such host --port"),
        (["SAVED", "--device", "abacus"], "--device abacus"),
        (["SAVED", "--dtype", "float8"], "--dtype is 'float8'"),
    ],
)
def test_a_mistake_is_one_message_before_weights_load(saved, monkeypatch, words, told):
    monkeypatch.setattr(serve.demo, "find_spec", lambda name: True)
    monkeypatch.setattr(serve.loading.Found, "load", None)
    with bound("127.0.0.1", 0) as used:
        own = {"SAVED": str(saved), "IN USE": str(used.getsockname()[1])}
        shown = message(*(own.get(word, word) for word in words))
    assert shown.startswith("error: ") and shown.count("\n") == 1 and re.search(told, shown), shown


def message(*words) -> str:
    done = CliRunner().invoke(make_app(demo), [str(word) for word in words])
    assert done.exit_code == 2, done.output
    return done.output


def test_by_default_the_newest_model_is_served_to_this_machine_alone(saved, monkeypatch):
    served = []
    monkeypatch.setattr(serve.demo, "find_spec", lambda name: True)
    monkeypatch.setattr(serve.demo, "newest_model", lambda: saved)
    monkeypatch.setattr(serve.demo, "serve", lambda *words: served.append((words[0], words[1].getsockname()[0])))
    assert CliRunner().invoke(make_app(demo), ["--port", "0"]).exit_code == 0
    assert [([model.name for model in models], host) for models, host in served] == [([saved.name], "127.0.0.1")]


def test_models_of_one_name_have_two(saved, saved_dense):
    one, other = find(str(saved)), find(str(saved_dense))
    assert names_of([one, other]) == ["random", "dense"]
    assert names_of([one, one]) == ["random (1)", "random (2)"]
