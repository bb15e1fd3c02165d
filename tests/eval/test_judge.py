import hashlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from eval.benchmarks.mmvet import MMVet
from eval.errors import JudgeUnavailable
from eval.scoring.grading import REASK
from eval.scoring.judge import Judge, parse_retry_after
from llava_skip_base.errors import UserError

ROOT = Path(__file__).parents[2]
TROUBLES = ("429", "500", "hang", "garbage", "range", "words", "reset", "drip", "cut", "no choices", "list")


class RoughServer:
    """Grades by a hash of the prompt, but meets the first requests for each prompt with trouble, in turn.

    Attributes:
        troubles: what to do before a prompt is answered well; a prompt starts at a place that its hash says.
        asked: how often each prompt came.
        most: the most requests under way at once.
    """

    def __init__(self, troubles: tuple[str, ...], times: int = 1, pause: float = 0.0) -> None:
        self.troubles, self.times, self.pause = troubles, times, pause
        self.asked: Counter[str] = Counter()
        self.met: Counter[str] = Counter()
        self.starts: list[tuple[str, float]] = []
        self.keys: set[str | None] = set()
        self.now = self.most = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.serve(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def serve(self, handler: BaseHTTPRequestHandler, request: dict[str, Any]) -> None:
        prompt = request["messages"][0]["content"].removesuffix(REASK)
        number = int(hashlib.sha256(prompt.encode()).hexdigest(), 16)
        with self.lock:
            count = self.asked[prompt]
            self.asked[prompt] += 1
            self.starts.append((prompt, time.monotonic()))
            self.keys.add(handler.headers.get("Authorization"))
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            time.sleep(self.pause)
            if self.troubles and count < self.times:
                trouble = self.troubles[(number + count) % len(self.troubles)]
                with self.lock:
                    self.met[trouble] += 1
                self.misbehave(handler, trouble)
            else:
                self.reply(handler, f"{number % 11 / 10:.1f}")
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client gave up, as it should
        finally:
            with self.lock:
                self.now -= 1

    def misbehave(self, handler: BaseHTTPRequestHandler, trouble: str) -> None:
        if trouble == "429":
            self.send(handler, 429, b"{}", {"Retry-After": "1"})
        elif trouble == "500":
            self.send(handler, 500, b"<h1>no</h1>")
        elif trouble == "down":
            self.send(handler, 503, f"bad key {handler.headers.get('Authorization')}".encode())
        elif trouble == "refuse":
            self.send(handler, 401, f"bad key {handler.headers.get('Authorization')}".encode())
        elif trouble == "hang":
            time.sleep(1.5)
        elif trouble == "garbage":
            self.send(handler, 200, bytes(range(256)))
        elif trouble == "no choices":
            self.send(handler, 200, b'{"choices": []}')
        elif trouble == "list":
            self.send(handler, 200, b'[{"message": "0.5"}]')
        elif trouble == "range":
            self.reply(handler, "7.3")
        elif trouble == "words":
            self.reply(handler, "Correctness: 0.9")
        elif trouble == "reset":
            linger = struct.pack("ii", 1, 0)
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            handler.connection.close()
        elif trouble == "cut":
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            handler.wfile.write(b'{"choices": [{"message": {"content": "0.0"}}]}')
        elif trouble == "drip":
            handler.send_response(200)
            handler.send_header("Content-Length", "100")
            handler.end_headers()
            for _ in range(40):  # four seconds, no gap as long as the time-out
                handler.wfile.write(b" ")
                handler.wfile.flush()
                time.sleep(0.1)

    def reply(self, handler: BaseHTTPRequestHandler, text: str) -> None:
        self.send(handler, 200, json.dumps({"choices": [{"message": {"content": text}}]}).encode())

    def send(
        self, handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None
    ) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)


@pytest.fixture
def rough(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RoughServer]]:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    started: list[RoughServer] = []

    def start(*troubles: str, **options: Any) -> RoughServer:
        started.append(RoughServer(troubles, **options))
        return started[-1]

    yield start
    for server in started:
        server.server.shutdown()
        server.server.server_close()


def samples_and_answers(count: int) -> tuple[list[Any], dict[Any, str]]:
    rows = [
        {"id": f"v1_{n}", "question": f"How many {n}?", "answer": str(n), "capability": ["rec", "math"][: 1 + n % 2]}
        for n in range(count)
    ]
    return MMVet().samples(rows), {f"v1_{n}": f"It is {n}." for n in range(count)}


def judge_at(server: RoughServer, folder: Path, **options: Any) -> Judge:
    settings: dict[str, Any] = {"runs": 2, "timeout": 0.5, "backoff": 0.01, **options}
    return Judge(server.url, folder, "tiny", "judge", **settings)


def test_trouble_of_every_kind_changes_nothing(rough: Callable[..., RoughServer], tmp_path: Path) -> None:
    samples, answers = samples_and_answers(44)
    smooth, bumpy = rough(), rough(*TROUBLES, times=1)
    expected = MMVet().score(samples, answers, judge_at(smooth, tmp_path / "smooth", concurrency=16))
    score = MMVet().score(samples, answers, judge_at(bumpy, tmp_path / "bumpy", concurrency=16))
    assert set(bumpy.met) == set(TROUBLES), bumpy.met
    assert score.status == "scored"
    assert score.scores == expected.scores
    name = "tiny_judge-grade-2runs.json"
    assert (tmp_path / "bumpy" / name).read_text() == (tmp_path / "smooth" / name).read_text()
    # Whoever was told to wait a second did.
    times: dict[str, list[float]] = {}
    for prompt, start in bumpy.starts:
        times.setdefault(prompt, []).append(start)
    numbers = {prompt: int(hashlib.sha256(prompt.encode()).hexdigest(), 16) for prompt in times}
    waited = [own[1] - own[0] for prompt, own in times.items() if TROUBLES[numbers[prompt] % len(TROUBLES)] == "429"]
    assert waited and min(waited) >= 1.0


def test_requests_run_at_once_up_to_the_limit(rough: Callable[..., RoughServer], tmp_path: Path) -> None:
    samples, answers = samples_and_answers(24)
    server = rough(pause=0.05)
    assert MMVet().score(samples, answers, judge_at(server, tmp_path, concurrency=3, runs=1)).status == "scored"
    assert server.most == 3


@pytest.mark.parametrize("trouble", ["down", "refuse"])
def test_permanent_outage_stops_soon_and_goes_on_later(
    rough: Callable[..., RoughServer], tmp_path: Path, trouble: str
) -> None:
    samples, answers = samples_and_answers(60)
    server = rough(trouble, times=10**6)
    score = MMVet().score(samples, answers, judge_at(server, tmp_path, retries=2))
    assert (score.status, score.score, score.scores) == ("incomplete", None, {})
    assert score.counts["grades"] == 0
    assert len(server.starts) < 60  # most questions were never put
    again = MMVet().score(samples, answers, judge_at(rough(), tmp_path))
    assert again.status == "scored"


def test_one_question_that_gets_no_reply_does_not_keep_others_from_theirs(
    rough: Callable[..., RoughServer], tmp_path: Path
) -> None:
    samples, answers = samples_and_answers(8)
    server = rough("down", times=10**6)
    server.serve = lambda handler, request: (  # type: ignore[method-assign]
        server.misbehave(handler, "refuse")
        if "It is 3." in request["messages"][0]["content"]
        else server.reply(handler, "0.5")
    )
    score = MMVet().score(samples, answers, judge_at(server, tmp_path, runs=1, concurrency=2))
    assert (score.status, score.counts["grades"]) == ("incomplete", 7)


def test_budget_counts_every_request(rough: Callable[..., RoughServer], tmp_path: Path) -> None:
    samples, answers = samples_and_answers(10)
    server = rough("500", times=1)
    score = MMVet().score(samples, answers, judge_at(server, tmp_path, budget=11, concurrency=1, runs=1))
    assert score.status == "incomplete"
    assert "the budget of 11 requests is used up" in score.notes[0]
    assert (len(server.starts), score.counts["grades"]) == (11, 5)
    score = MMVet().score(samples, answers, judge_at(server, tmp_path, budget=11, runs=1))
    assert score.status == "scored"


def test_dry_run_shows_what_it_would_ask_and_sends_nothing(
    rough: Callable[..., RoughServer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples, answers = samples_and_answers(3)
    server = rough()
    score = MMVet().score(samples, answers, judge_at(server, tmp_path, dry_run=True, runs=1))
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [request["messages"][0]["content"].endswith(f"It is {n}. | ") for n, request in enumerate(shown)] == [
        True
    ] * 3
    assert (score.status, server.starts) == ("unscored", [])
    assert "3 answers would be put to the judge" in score.notes[0]
    assert list(tmp_path.iterdir()) == []


def command(folder: Path, server: RoughServer, *options: str) -> tuple[list[str], dict[str, str]]:
    samples, answers = samples_and_answers(30)
    data = {
        s.id: {"question": s.fields["question"], "answer": s.fields["answer"], "capability": ["rec"]} for s in samples
    }
    (folder / "mm-vet.json").write_text(json.dumps(data))
    (folder / "answers.json").write_text(json.dumps(answers))
    words = [sys.executable, "-m", "eval.score", "mmvet", "--predictions", str(folder / "answers.json")]
    words += ["--data", str(folder / "mm-vet.json"), "--json", str(folder / "out" / "score.json")]
    words += ["--judge-url", server.url, "--judge-model", "judge", *options]
    return words, {**os.environ, "OPENAI_API_KEY": "sk-very-secret", "PYTHONPATH": str(ROOT)}


def test_outage_fails_the_command_and_the_key_is_nowhere(rough: Callable[..., RoughServer], tmp_path: Path) -> None:
    server = rough("refuse", times=10**6)
    words, environment = command(tmp_path, server)
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    result = json.loads((tmp_path / "out" / "score.json").read_text())
    assert (result["status"], result["score"]) == ("incomplete", None)
    assert server.keys == {"Bearer sk-very-secret"}
    written = "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    assert "secret" not in done.stdout + done.stderr + written + " ".join(words)


def test_killed_grading_goes_on_without_asking_twice(rough: Callable[..., RoughServer], tmp_path: Path) -> None:
    server = rough(pause=0.1)
    words, environment = command(tmp_path, server, "--judge-concurrency", "2")
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(server.starts) < 10 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(json.loads((tmp_path / "out" / "answers_judge-grade-1runs.json").read_text()))
    before = len(server.starts)
    assert 0 < kept <= before < 30
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(server.starts) == before + 30 - kept
    expected = rough()
    samples, answers = samples_and_answers(30)
    MMVet().score(samples, answers, judge_at(expected, tmp_path / "whole", runs=1))
    grades = [json.loads(path.read_text()) for path in sorted(tmp_path.rglob("*-grade-1runs.json"))]
    assert grades[0] == grades[1]


@pytest.mark.parametrize(("header", "seconds"), [("2", 2.0), ("0.5", 0.5), ("-3", 0.0), ("soon", None), ("", None)])
def test_retry_after_in_seconds(header: str, seconds: float | None) -> None:
    assert parse_retry_after(header) == seconds


def test_retry_after_as_a_date() -> None:
    later = datetime.now(timezone.utc) + timedelta(seconds=30)
    assert 27 < (parse_retry_after(format_datetime(later, usegmt=True)) or 0) <= 30
    assert parse_retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert parse_retry_after("Wed, 21 Oct 2015 07:28:00 -0000") is None


def test_a_pause_beyond_reason_is_an_outage(rough: Callable[..., RoughServer], tmp_path: Path) -> None:
    server = rough("429", times=10**6)
    server.send = lambda handler, status, body, headers=None: RoughServer.send(  # type: ignore[method-assign]
        server, handler, status, body, {"Retry-After": "86400"}
    )
    start = time.monotonic()
    with pytest.raises(JudgeUnavailable, match="asks to wait for 86400 s"):
        judge_at(server, tmp_path).ask("?", 0.0, 3)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("option", [{"concurrency": 0}, {"budget": 0}, {"timeout": 0}])
def test_options_are_checked(tmp_path: Path, option: dict[str, int]) -> None:
    with pytest.raises(UserError, match=f"judge {next(iter(option))} 0: expected"):
        Judge("http://localhost/v1", tmp_path, "x", **option)  # type: ignore[arg-type]
