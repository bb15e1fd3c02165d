"""The chat as its users have it: a real terminal, Ctrl-C and Ctrl-D, and a pipe; what it saves is training data."""

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava_skip import preset_config
from llava_skip.checkpoints.processor import load_processor
from llava_skip_base.errors import UserError
from llava_skip_base.files import read_json
from serve.answering import Answerer
from serve.chat import Chat, interruptible
from serve.chat import chat as start
from serve.conversation import Picture
from serve.loading import choose_device, choose_dtype, load
from tests.support.hostile import ALL, lacking
from train.data import ConversationDataset, load_records

SKIPPED = preset_config("sv-llava-64").skip_config.num_skipping
ROOT = Path(__file__).parents[2]
COST = r"[\d,]+ tokens, first after [\d.]+ s, [\d.]+ tokens/s, cache keeps ([\d,]+) of ([\d,]+)"


@pytest.fixture
def image(tmp_path):
    Image.new("RGB", (40, 30), "teal").save(path := tmp_path / "my image.png")
    return path


@pytest.fixture
def chat(saved):
    loaded = load(str(saved), torch.device("cpu"), torch.float32)
    return Chat(loaded, Answerer(loaded, 4))


def _hear_the_terminal() -> None:
    """Let Ctrl-C reach a process, also where tests run in the background, which ignores it and hands that on."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Terminal:
    """A process in a pseudo-terminal."""

    def __init__(self, *words: str) -> None:
        self._own, theirs = pty.openpty()
        environment = os.environ | {"TERM": "xterm", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llava_skip", *words],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
            preexec_fn=_hear_the_terminal,
        )
        os.close(theirs)
        self.text = ""

    def wait_for(self, pattern: str, seconds: float = 600) -> str:
        """What is shown until a pattern is; later calls look behind it."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text)):
            assert time.monotonic() < end, f"{pattern} is not in {self.text!r}"
            if select.select([self._own], [], [], 0.2)[0]:
                try:
                    self.text += os.read(self._own, 4096).decode(errors="replace")
                except OSError:  # the process has ended
                    assert self.process.wait(60) is not None and re.search(pattern, self.text), self.text
        shown, self.text = self.text[: found.end()], self.text[found.end() :]
        return shown

    def type(self, text: str) -> None:
        os.write(self._own, text.encode())

    def interrupt(self, pattern: str) -> None:
        """Press Ctrl-C until a pattern is shown: Python does not hear one just before it waits for a key."""
        end = time.monotonic() + 120
        while time.monotonic() < end:
            self.type("\x03")
            if self.shows(pattern, 10):
                return
        raise AssertionError(f"{pattern} is not in {self.text!r}")

    def shows(self, pattern: str, seconds: float) -> bool:
        """Whether a pattern is shown within some seconds."""
        try:
            self.wait_for(pattern, seconds)
        except AssertionError:
            return False
        return True

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._own)


def test_a_terminal(saved, image, tmp_path):
    terminal = Terminal("chat", str(saved), "--max-new-tokens", "900")
    try:
        terminal.wait_for("random on cpu; /help[^>]*> ")
        terminal.type(f"'{image}'\n")
        terminal.wait_for(r"1 attached; now ask[^>]*> ")
        terminal.type("What is this?\n")
        terminal.wait_for("reading")  # it is shown inside of what Ctrl-C stops
        terminal.type("\x03")  # Ctrl-C stops the answer, which would be long
        shown = terminal.wait_for(COST + ", stopped[^>]*> ")
        kept, seen = (int(number.replace(",", "")) for number in re.search(COST, shown).groups())
        assert seen - kept == SKIPPED and seen < 900
        terminal.type("half a line")
        terminal.wait_for("half a line")  # the line editor shows it: it is there, and Ctrl-C is its own
        terminal.interrupt("Ctrl-D or /exit ends the chat[^>]*> ")
        terminal.type(f"/save {tmp_path / 'talk.json'}\n")
        terminal.wait_for("written to .*talk.json[^>]*> ")
        terminal.type("\x04")
        assert terminal.process.wait(300) == 0
    finally:
        terminal.close()
    assert (tmp_path / "talk.json_images/1.png").read_bytes() == image.read_bytes()


def test_a_pipe(saved, image, monkeypatch, capsys):
    lines = f"What?\n\n{image}\nAnd?\n/image {image}\nThis?\n/nothing\n/clear\n\0Again?\n/exit\nnever asked\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    capsys.readouterr()
    start(str(saved), image=[image], max_new_tokens=3)
    shown = capsys.readouterr()
    dropped = [int(seen) - int(kept) for kept, seen in re.findall(COST, shown.out)]
    assert dropped == [SKIPPED, 2 * SKIPPED, 3 * SKIPPED, 0]
    assert "Again?" in shown.out and "never asked" not in shown.out and "\x1b" not in shown.out
    errors = [line for line in shown.err.splitlines() if line.startswith("error")]
    assert errors == ["error: there is no command /nothing; /help lists them."]


def test_what_is_saved_is_training_data(chat, image, saved, tmp_path, capsys):
    for line in (f"'{image}' '{image}' compare", "Why?", f"/save {tmp_path / 'talk.json'}"):
        assert chat.take(line)
    record = read_json(tmp_path / "talk.json")[0]
    assert record["image"] == ["talk.json_images/1.png", "talk.json_images/2.png"]
    assert [said["from"] for said in record["conversations"]] == ["human", "gpt"] * 2
    assert record["conversations"][0]["value"] == "<image>\n<image>\ncompare"
    records = load_records(str(tmp_path / "talk.json"), str(tmp_path))
    sample = ConversationDataset(records, load_processor(saved), 4096)[0]
    assert len(sample["pixel_values"]) == 2 and any(label != -100 for label in sample["labels"])
    assert chat.take(f"/save {tmp_path / 'talk.json'}")  # its own file
    assert chat.take(f"/save {image}") and "exists" in capsys.readouterr().err
    assert Image.open(image).size == (40, 30)


def test_nothing_is_overwritten_but_the_same_conversations_own_save(chat, image, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.json_images").mkdir()
    (tmp_path / "dangling.json").symlink_to("nowhere")
    (tmp_path / "file").write_text("theirs")
    assert chat.take(f"'{image}' What?")
    for line in (
        "/save a.json",
        "/save a.jsonl",
        r"/save two\ words.json",
        "/save 'more words.json'",
        "/save\ttab.json",
    ):
        assert chat.take(line)
    assert capsys.readouterr().err == ""
    for name in ("two words", "more words", "tab"):
        assert (tmp_path / f"{name}.json").is_file()
    (record,) = (json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines())
    assert record["image"] == "a.jsonl_images/1.png" and read_json(tmp_path / "a.json")[0]["image"] != record["image"]
    assert chat.take(f"'{image}' And?") and chat.take("/save a.json")
    assert len(read_json(tmp_path / "a.json")[0]["image"]) == 2
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    refused = ("b.json", "dangling.json", "file", ".", "..", "/", "b.json_images")
    failing = ("file/x.json", "~nobody-has-this-name/x.json", "x" * 5000, "/proc/x.json", "\udcff.json")
    for name in (*refused, *failing):
        assert chat.take(f"/save {name}")
        error = capsys.readouterr().err
        assert (
            error.count("error:") == 1 and len(error) < 700 and ("exists: give another" in error) == (name in refused)
        )
    assert chat.take("/clear") and chat.take("Hello?") and chat.take("/save a.json")
    assert "a.json exists" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_images_of_a_line_that_fails_do_not_stay_unsaid(chat, image, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert chat.take(f"'{image}' {tmp_path / 'broken.png'} what?") and "wait" not in capsys.readouterr().out
    assert chat.take(f"'{image}' '{image}' {'long ' * 600}")
    assert capsys.readouterr().out == "2 images wait for the next question\n"
    assert chat.take(f"/image\t{image}") and "3 attached" in capsys.readouterr().out
    assert chat.take("what?")
    assert len(chat._conversation.turns[0].pictures) == 3


def test_ctrl_c_while_an_image_is_read_ends_no_chat(chat, image, monkeypatch, capsys):
    interrupts = []

    def read(path, processor):
        for _ in range(interrupts[-1]):
            signal.raise_signal(signal.SIGINT)
        return picture

    picture = Picture.read(image, chat._loaded.processor)
    monkeypatch.setattr("serve.chat.Picture.read", read)
    for number, line, stays in ((1, f"'{image}' what?", 1), (2, f"'{image}' what?", 1), (2, f"/image {image}", 1)):
        interrupts.append(number)
        assert chat.take(line) and len(chat._conversation.waiting) == stays
        assert capsys.readouterr().out == "\nstopped before an answer\n1 image waits for the next question\n"
    assert chat._conversation.turns == []


def test_mistakes_are_one_message_and_the_chat_goes_on(chat, image, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no image")
    expected = {
        "/image": "/image needs the path",
        "/image nowhere.png": "nowhere.png cannot be read",
        "/image /dev/zero": "is no file",
        "/image " + "x" * 5000: "cannot be read",
        f"{tmp_path / 'broken.png'} what?": "no image that can be read",
        "/save": "/save needs the name",
        f"/save {tmp_path / 'x.json'}": "no answer to save",
        "an <image> in words": "stands for an image",
        "half \udcff of one": "no text (UTF-8)",
        "/" + "nothing" * 1000: "no command",
        f"'{image}' {'long ' * 600}": "/clear begins again",
    }
    for line, message in expected.items():
        assert chat.take(line)
        error = capsys.readouterr().err
        assert message in error and error.count("error:") == 1 and len(error) < 600
    assert chat.take("/clear") and chat.take("Hello?") and not chat.take("/exit")
    assert re.search(COST, capsys.readouterr().out)


def test_nothing_that_a_model_says_is_markup(saved, capsys, monkeypatch):
    class Saying:
        def answer(self, conversation, show, is_stopped):
            for piece in ALL:
                show(piece + "\n")
            return "x", "cost [red]"

    assert Chat(load(str(saved), torch.device("cpu"), torch.float32), Saying()).take("What?")
    shown = capsys.readouterr().out
    assert lacking(shown) == [] and shown.endswith("cost [red]\n")


def test_a_wrong_image_is_told_before_the_weights_load(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("serve.loading.Found.load", lambda *_: pytest.fail("the weights were read"))
    with pytest.raises(UserError, match="nope.png cannot be read"):
        start(str(saved), image=[tmp_path / "nope.png"])


def test_no_input_and_an_output_of_few_characters(saved, tmp_path, monkeypatch):
    (tmp_path / "mod\xe8le").mkdir()
    for file in saved.iterdir():
        (tmp_path / "mod\xe8le" / file.name).symlink_to(file)
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", output)
    monkeypatch.setattr("sys.stdin", None)
    start(str(tmp_path / "mod\xe8le"))
    typed = io.BytesIO("\xe9?\n".encode() + b"/exit \xff\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(typed, encoding="utf-8"))
    start(str(tmp_path / "mod\xe8le"), max_new_tokens=3)
    output.flush()
    shown = output.buffer.getvalue().decode("ascii")
    assert shown.count("mod\\xe8le on cpu") == 2 and "> \\xe9?" in shown and re.search(COST, shown)


def test_a_long_prompt_brings_no_warning_of_the_tokenizer_to_the_chat(chat, monkeypatch):
    chat._loaded.processor.tokenizer.model_max_length = 5
    monkeypatch.setattr("transformers.tokenization_utils_base.logger.warning", lambda *text: pytest.fail(str(text)))
    assert chat.take("a question of more than five tokens")


def test_the_second_interrupt_ends_an_answer_at_once():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interruptible() as is_stopped:
        assert not is_stopped()
        signal.raise_signal(signal.SIGINT)
        assert is_stopped()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_models_and_devices_that_cannot_be_used_are_named(saved, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load(str(tmp_path / "nowhere"), torch.device("cpu"), torch.float32)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="llava-skip convert"):
        load(str(tmp_path), torch.device("cpu"), torch.float32)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="merge-lora"):
        load(str(tmp_path), torch.device("cpu"), torch.float32)
    for name in ("gpu", "meta", "cuda:99"):
        with pytest.raises(UserError, match=f"--device {name}"):
            choose_device(name)
    assert choose_dtype(None, torch.device("cpu")) is torch.float32
    with pytest.raises(UserError, match="--dtype"):
        choose_dtype("int8", torch.device("cpu"))
    with pytest.raises(UserError, match="--temperature"):
        start(str(saved), temperature=float("nan"))
