"""Files are read with messages that say what is wrong, and written whole or not at all."""

import multiprocessing
import os
import resource
import signal
import stat
from pathlib import Path

import pytest

from llava_skip.checkpoints.layouts import find_tower
from llava_skip_base import files
from llava_skip_base.errors import MissingFileError, UserError

OLD, NEW = b"old" * 100, b"new" * 100_000


def in_child(function, *arguments) -> int:
    """Exit code of a forked process that runs a function."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "file.txt"
    path.write_bytes(OLD)
    return path


def visible(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if not path.name.startswith(".")]


def test_a_reader_keeps_the_content_that_it_opened(target):
    with target.open("rb") as reader:
        files.write_bytes(target, NEW)
        assert reader.read() == OLD
    assert target.read_bytes() == NEW and os.listdir(target.parent) == ["file.txt"]


def test_a_process_that_is_killed_before_the_end_leaves_the_old_file(target):
    def write():
        os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
        files.write_bytes(target, NEW)

    assert in_child(write) == -signal.SIGKILL
    assert target.read_bytes() == OLD and visible(target.parent) == ["file.txt"]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(target):
    def write():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(OSError, match="too large"):
            files.write_bytes(target, NEW)

    assert in_child(write) == 0
    assert target.read_bytes() == OLD and os.listdir(target.parent) == ["file.txt"]


def test_two_processes_write_one_path_at_once(target):
    contents = [OLD, *(letter * 200_000 for letter in (b"a", b"b"))]

    def write(content):
        for _ in range(30):
            files.write_bytes(target, content)

    writers = [multiprocessing.get_context("fork").Process(target=write, args=(c,)) for c in contents[1:]]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert target.read_bytes() in contents
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert os.listdir(target.parent) == ["file.txt"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_the_mode_follows_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        files.write_text(tmp_path / "new" / "file", "text")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new" / "file").stat().st_mode) == mode


def test_what_is_written_is_read(tmp_path):
    path, value = tmp_path / "file.json", {"b": ["ä", 1], "a": None}
    files.write_json(path, value)
    assert files.read_json(path) == value and "ä" in path.read_text(encoding="utf-8")
    files.write_json(path, value | {"path": path}, sort_keys=True)
    assert list(files.read_json(path)) == ["a", "b", "path"] and files.read_json(path)["path"] == str(path)
    assert files.as_json((1, path)) == [1, str(path)]
    files.write_json_lines(path, [value, 3])
    assert list(files.read_json_lines(path)) == [(1, value), (2, 3)]


def test_a_byte_order_mark_is_left_out(tmp_path):
    path = tmp_path / "file.json"
    path.write_bytes(b"\xef\xbb\xbf[1]")
    assert files.read_text(path) == "[1]" and files.read_json(path) == [1]
    assert list(files.read_json_lines(path)) == [(1, [1])]


def test_mistakes_are_named(tmp_path):
    path = tmp_path / "file.jsonl"
    for read in (files.read_text, files.read_json, lambda path: list(files.read_json_lines(path))):
        path.unlink(missing_ok=True)
        with pytest.raises(MissingFileError, match=r"has no file\.jsonl"):
            read(path)
        path.write_bytes(b'{"name": "M\xfcller"}')
        with pytest.raises(UserError, match=r"file\.jsonl is not UTF-8 text .*convert it to UTF-8"):
            read(path)
    path.write_text('{"a": 1}\n\n{"a": \n')
    with pytest.raises(UserError, match=r"file\.jsonl is not valid JSON"):
        files.read_json(path)
    lines = files.read_json_lines(path)
    assert next(lines) == (1, {"a": 1})
    with pytest.raises(UserError, match=r"file\.jsonl, line 3: not valid JSON"):
        next(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 200_000 + "]" * 200_000, "nested more than 100 levels deep"),
        ('{"a": ' * 101 + "1" + "}" * 101, "nested more than 100 levels deep"),
        ("[" + "7" * 5000 + "]", "a number has more than 4300 digits"),
        (r'["\ud83d"]', r"holds half a character, \\ud83d without its other half"),
        (r'{"\udc00": 1}', r"holds half a character, \\udc00"),
    ],
)
def test_json_that_would_end_a_program_later_is_named(tmp_path, text, message):
    path = tmp_path / "file.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"file\.jsonl is not valid JSON \({message}"):
        files.read_json(path)
    path.write_text(f"1\n{text}\n")
    with pytest.raises(UserError, match=rf"file\.jsonl, line 2: not valid JSON \({message}"):
        list(files.read_json_lines(path))


def test_json_at_the_limits_is_read():
    assert files.parse_json('{"a": ' * 100 + "1" + "}" * 100)
    assert files.parse_json("1" * 4300) == int("1" * 4300)
    assert files.parse_json(r'["\ud83d\ude00", "\\ud83d", NaN]')[:2] == ["\U0001f600", r"\ud83d"]


@pytest.mark.parametrize("name", ["../x.png", "/etc/x.png", "a/../../x.png", "a/..", "//x.png", "../" * 2000])
def test_an_image_is_below_its_folder(tmp_path, name):
    with pytest.raises(UserError, match=r"leaves the image folder") as caught:
        files.image_path(tmp_path, name)
    assert len(str(caught.value)) < 400
    assert files.image_path(tmp_path, "a/..b/x.png") == tmp_path / "a/..b/x.png"


@pytest.mark.parametrize("source", ["openai/clip-vit-large-patch14-336", "Qwen/Qwen2.5-7B", "lmsys/vicuna-7b-v1.5"])
def test_hub_names(source):
    assert files.local_path(source) is None and files.find_local(source, "model") is None


@pytest.mark.parametrize(
    "source",
    ["model", "./model", "/a/b", "~/model", "../a/b", "a/b/c", "data/projector.bin", "data/train.json", Path("a/b")],
)
def test_local_paths(source, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.local_path(source) == Path(str(source).replace("~", str(tmp_path)))
    with pytest.raises(MissingFileError, match="The model .* does not exist: give a folder or a hub name"):
        files.find_local(source, "model")


@pytest.mark.parametrize("source", ["x" * 9000, "x/" * 4500, "a\0b"])
def test_names_that_no_file_can_have(source):
    with pytest.raises(MissingFileError, match="does not exist") as caught:
        files.find_local(source, "model")
    assert len(str(caught.value)) < 500
    assert find_tower({"mm_vision_tower": source}, None, Path()) == source


def test_what_exists_is_local(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert files.find_local("owner/name", "model") == Path("owner/name")
