import base64
import csv
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_skip import SkipConfig
from tests.support.small_models import small_config


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Embedded data, checkpoints and results are below the test's folder."""
    monkeypatch.setenv("LLAVA_SKIP_HOME", str(tmp_path))


@pytest.fixture
def encoded_image() -> Callable[..., str]:
    def make(color: Any = (200, 30, 30), mode: str = "RGB", kind: str = "PNG") -> str:
        buffer = io.BytesIO()
        Image.new(mode, (8, 8), color).save(buffer, kind)
        return base64.b64encode(buffer.getvalue()).decode()

    return make


@pytest.fixture
def write_tsv(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: list[dict[str, Any]], name: str = "data.tsv") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = list(dict.fromkeys(column for row in rows for column in row))
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, delimiter="\t", restval="")
            writer.writeheader()
            writer.writerows(rows)
        return path

    return write


@pytest.fixture
def mmbench_rows(encoded_image: Callable[..., str]) -> list[dict[str, Any]]:
    """Question 7 with two options and question 9 with three, all passes, options rotated right by one each pass."""
    small, large = encoded_image(), encoded_image((0, 0, 255))
    animal = {
        "question": "Which animal?",
        "hint": "Look at\nthe middle.",
        "category": "ocr",
        "l2-category": "finegrained_perception (instance-level)",
        "split": "dev",
    }
    then = {
        "question": "What comes next?",
        "hint": "",
        "category": "future_prediction",
        "l2-category": "logic_reasoning",
        "split": "dev",
    }
    blank = {"C": "", "D": ""}
    return [
        {"index": 7, **animal, "A": "cat", "B": "dog", **blank, "answer": "A", "image": small},
        {"index": 9, **then, "A": "sun", "B": "rain", "C": "snow", "D": "", "answer": "C", "image": large},
        {"index": 1000007, **animal, "A": "dog", "B": "cat", **blank, "answer": "B", "image": "7"},
        {"index": 1000009, **then, "A": "snow", "B": "sun", "C": "rain", "D": "", "answer": "A", "image": "9"},
        {"index": 2000009, **then, "A": "rain", "B": "snow", "C": "sun", "D": "", "answer": "B", "image": "9"},
    ]


@pytest.fixture
def mmstar_rows(encoded_image: Callable[..., str]) -> list[dict[str, Any]]:
    """Five rows in two categories of the official names."""
    places = [
        ("coarse perception", "image emotion", "A"),
        ("math", "geometry", "B"),
        ("math", "geometry", "C"),
        ("coarse perception", "image scene and topic", "D"),
        ("math", "statistical reasoning", "A"),
    ]
    return [
        {
            "index": number,
            "question": f"Question {number}?\nOptions: A: one, B: two, C: three, D: four",
            "image": encoded_image((number, 0, 0)),
            "answer": gold,
            "category": category,
            "l2_category": sub,
            "bench": "none",
        }
        for number, (category, sub, gold) in enumerate(places)
    ]


@pytest.fixture
def mmvet_data(tmp_path: Path) -> Path:
    """Three questions; the first two share a image."""
    folder = tmp_path / "mm-vet"
    (folder / "images").mkdir(parents=True)
    for name in ("a.png", "b.jpg"):
        Image.new("RGB", (8, 8)).save(folder / "images" / name)
    data = {
        "v1_0": {"imagename": "a.png", "question": "x?", "answer": "-1<AND>-5", "capability": ["ocr", "math"]},
        "v1_1": {"imagename": "a.png", "question": "Where?", "answer": "here", "capability": ["rec"]},
        "v1_2": {"imagename": "b.jpg", "question": "Why?", "answer": "so<OR>thus", "capability": ["rec"]},
    }
    path = folder / "mm-vet.json"
    path.write_text(json.dumps(data))
    return path


class ScriptedServer:
    """An OpenAI-compatible endpoint that gives one scripted reply after the other, the last one for ever.

    A reply is a text, an HTTP status, or raw bytes that are sent as the body of a 200.
    """

    def __init__(self, script: list[str | int | bytes]) -> None:
        self.script = script
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.requests.append(json.loads(body))
                outer.keys.append(self.headers.get("Authorization"))
                outer.reply(self, outer.script[min(len(outer.requests), len(outer.script)) - 1])

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def reply(self, handler: BaseHTTPRequestHandler, reply: str | int | bytes) -> None:
        status, body = (reply, b"{}") if isinstance(reply, int) else (200, reply)
        if isinstance(reply, str):
            message = {"role": "assistant", "content": reply}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            body = json.dumps(
                {"id": "1", "object": "chat.completion", "created": 1, "model": "judge", "choices": [choice]}
            ).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        if status != 200:
            handler.send_header("Retry-After", "0")
        handler.end_headers()
        handler.wfile.write(body)


@pytest.fixture
def judge_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[list[str | int | bytes]], ScriptedServer]]:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    started: list[ScriptedServer] = []

    def start(script: list[str | int | bytes]) -> ScriptedServer:
        started.append(ScriptedServer(script))
        return started[-1]

    yield start
    for scripted in started:
        scripted.server.shutdown()
        scripted.server.server_close()


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A folder that looks like a saved model, for runs whose model is replaced by a fake."""
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    small_config(SkipConfig(7, 9)).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder
