"""Runs that meet damaged files of their own, a full disk, a template of others or a file that changes under them."""

import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import eval.answering.generate
import llava_skip.foreign_templates
from eval.answering.answers import AnswerLog
from eval.answering.generate import Generator, numerics
from eval.answering.models import check_model
from eval.run import app
from eval.scoring.judge import read_replies
from llava_skip_base.errors import UserError
from llava_skip_base.files import write_json
from tests.support.answering import AtOnce

Rows = list[dict[str, Any]]
RUN = {"model_sha256": "m"}
DEEP = "[" * 200_000 + "]" * 200_000


class Echo(AtOnce):
    """A fake model that opens its images and answers A."""

    def __init__(self, *_: Any) -> None:
        pass

    def answer(self, prompts: Sequence[str], images: Sequence[Sequence[Any]], max_new_tokens: int) -> list[str]:
        for own in images:
            for image in own:
                image.open()
        return ["A"] * len(prompts)


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model_folder: Path) -> Callable[..., Result]:
    monkeypatch.setattr(eval.answering.generate, "Generator", Echo)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.chdir(tmp_path)

    def run(data: str | Path, *options: object) -> Result:
        words = ["--benchmarks", "mmstar", "--model", model_folder, "--data", data, "--batch-size", 1, *options]
        return CliRunner().invoke(app, [str(word) for word in words])

    return run


def start_log(folder: Path) -> Path:
    with AnswerLog(folder, RUN) as log:
        log.append([{"index": n, "prompt": "?", "prediction": "A"} for n in range(2)])
    return folder


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "run.json is not valid JSON"),
        ('{"model_sha', "run.json is not valid JSON"),
        ("[]", r"run.json: expected a JSON object, saw a list.*--output"),
        ("7", "saw a int"),
        (DEEP, "nested more than 100 levels"),
        ('{"model_sha256": "' + "x" * 9000 + '"}', "another run"),
        ('{"model_sha256": ["m"]}', r"model_sha256: \['m'\] there, m now"),
    ],
)
def test_a_damaged_run_file_loses_no_answer(tmp_path: Path, content: str, message: str) -> None:
    log = start_log(tmp_path) / "answers.jsonl"
    before = log.read_bytes()
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        AnswerLog(tmp_path, RUN)
    assert log.read_bytes() == before and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"index": [1], "prediction": "A"}', r"its index is \[1\], and no number or text"),
        ('{"index": {"a": 1}, "prediction": "A"}', "its index is"),
        ('{"index": null, "prediction": "A"}', "its index is None"),
        ('{"index": true, "prediction": "A"}', "its index is True"),
        ('{"index": 1.5, "prediction": "A"}', "its index is 1.5"),
        ('{"index": 5}', "no text as its prediction"),
        ('{"index": 5, "prediction": ["A"]}', "no text as its prediction"),
        ("[1]", "expected a JSON object, saw a list"),
        (DEEP, "nested more than 100 levels"),
        ('{"index": 5, "prediction": "A", "n": ' + "9" * 5000 + "}", "more than 4300 digits"),
        ('{"index": 5, "prediction": "\\ud83d"}', "half a character"),
        (b'{"index": 5, "prediction": "\xff"}', "can't decode"),
    ],
)
def test_a_line_that_is_no_answer_is_named(tmp_path: Path, line: str | bytes, message: str) -> None:
    log = start_log(tmp_path) / "answers.jsonl"
    whole = log.read_bytes() + (line if isinstance(line, bytes) else line.encode()) + b"\n"
    log.write_bytes(whole)
    with pytest.raises(UserError, match=rf"answers.jsonl, line 3: not an answer \(.*{message}.*remove that line"):
        AnswerLog(tmp_path, RUN)
    assert log.read_bytes() == whole


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file can grow beyond a size, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_every_whole_answer(tmp_path: Path) -> None:
    answers = [{"index": n, "prompt": "?", "prediction": "A" * 50} for n in range(9)]
    with AnswerLog(tmp_path, RUN) as log, room_for(400):
        with pytest.raises(UserError, match=r"cannot be written \(.*make room.*the 4 answers before it are kept"):
            for answer in answers:
                log.append([answer])
    with AnswerLog(tmp_path, RUN) as log:
        assert list(log.answers) == [0, 1, 2, 3]
        log.append(answers[4:])
    with AnswerLog(tmp_path, RUN) as log:
        assert [log.answers[n] for n in range(9)] == answers


@pytest.mark.parametrize("size", [100, 900, 2500, 5000])
def test_a_full_disk_ends_an_evaluation_with_one_message_and_room_ends_it_as_ever(
    evaluate: Callable[..., Result], write_tsv: Callable[..., Path], mmstar_rows: Rows, size: int
) -> None:
    data = write_tsv(mmstar_rows)
    assert evaluate(data, "--output", "calm").exit_code == 0
    with room_for(size):
        done = evaluate(data, "--output", "full")
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit), done.output
    assert "cannot be written" in done.stderr and "make room" in done.stderr
    assert not list(Path("full").rglob("*.tmp"))
    assert evaluate(data, "--output", "full").exit_code == 0
    for name in ("answers.jsonl", "run.json", "predictions.json", "per_sample.json", "results.json"):
        assert Path("full/mmstar/tiny", name).read_bytes() == Path("calm/mmstar/tiny", name).read_bytes()


def test_a_folder_that_cannot_be_made_is_named(
    evaluate: Callable[..., Result], write_tsv: Callable[..., Path], mmstar_rows: Rows
) -> None:
    Path("out").mkdir()
    Path("out/mmstar").write_text("a file")
    done = evaluate(write_tsv(mmstar_rows), "--output", "out")
    assert done.exit_code == 2 and "out/mmstar/tiny cannot be written" in done.stderr


def test_paths_that_the_system_cannot_look_up(
    evaluate: Callable[..., Result], write_tsv: Callable[..., Path], mmstar_rows: Rows
) -> None:
    data, long = write_tsv(mmstar_rows), "x" * 5000
    for words in ([data, "--output", long], [data, "--images", long], [data, "--model", long], [f"mmstar={long}"]):
        done = evaluate(*words)
        assert done.exit_code == 2 and isinstance(done.exception, SystemExit), words
        assert len(done.stderr) < 400 and done.stderr.startswith("error: ")


def test_a_file_replaced_during_a_run_is_refused_and_the_answers_before_are_kept(
    evaluate: Callable[..., Result], write_tsv: Callable[..., Path], mmstar_rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{**row, "image": row["image"] + " " * 100} for row in mmstar_rows]
    data, other = write_tsv(rows), write_tsv(rows[::-1], "other.tsv")
    asked: list[str] = []
    answer = Echo.answer

    def replace_after_two(self: Echo, *words: Any) -> list[str]:
        asked.append(words[0][0])
        if len(asked) == 3:
            shutil.copy(other, data)
        return answer(self, *words)

    monkeypatch.setattr(Echo, "answer", replace_after_two)
    done = evaluate(data)
    assert done.exit_code == 2 and "data.tsv: has been replaced or changed since it was read" in done.stderr
    assert Path("results/mmstar/tiny/answers.jsonl").read_bytes().count(b"\n") == 2
    assert not Path("results/mmstar/tiny/results.json").exists()
    done = evaluate(data)  # the other file: other answers
    assert done.exit_code == 2 and "holds the answers of another run (data_sha256" in done.stderr
    write_tsv(rows)
    assert evaluate(data).exit_code == 0 and len(asked) == 3 + 3


def test_a_file_replaced_between_reading_and_hashing_is_refused(
    evaluate: Callable[..., Result], write_tsv: Callable[..., Path], mmstar_rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_tsv(mmstar_rows)

    def late(*_: Any) -> Any:
        time.sleep(0.01)
        data.write_text(data.read_text().replace("one", "two"))
        return numerics()

    monkeypatch.setattr(eval.answering.generate, "numerics", late)
    done = evaluate(data)
    assert done.exit_code == 2 and "data.tsv: has been replaced or changed since its questions were read" in done.stderr
    assert not os.path.exists("results/mmstar/tiny/answers.jsonl")


LOOP = "{%% for %s in range(99999) %%}%s{%% endfor %%}"
ENDLESS = LOOP % ("a", LOOP % ("b", LOOP % ("c", "")))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for", "its chat template fails .TemplateSyntaxError"),
        ("{{ raise_exception('no user') }}", "its chat template fails .TemplateError: no user"),
        ("{{ messages[0].content.a.b }}", "its chat template fails .UndefinedError"),
        ("{{ 1 / 0 }}", "its chat template fails .ZeroDivisionError"),
        ("{{ 1 + 'a' }}", "its chat template fails .TypeError"),
        ("{{ ''.__class__.__mro__ }}", "its chat template fails .SecurityError"),
        ("{% for a in range(10 ** 9) %}{% endfor %}", "its chat template fails .OverflowError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "its chat template fails .RecursionError"),
        (ENDLESS, "its chat template does not end within 0.5 s"),
    ],
)
def test_a_chat_template_that_fails_is_named_before_weights_load(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, message: str
) -> None:
    folder = shutil.copytree(saved, tmp_path / "foreign")
    (folder / "chat_template.jinja").write_text(template)
    monkeypatch.setattr(eval.answering.generate.AutoModelForImageTextToText, "from_pretrained", None)
    monkeypatch.setattr(llava_skip.foreign_templates, "SECONDS", 0.5)
    with pytest.raises(UserError, match=f"foreign: {message}.*--template NAME"):
        Generator(check_model(folder), numerics())


def test_a_chat_template_that_fails_for_one_question_alone(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(saved, tmp_path / "foreign")
    text = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(
        "{% if 'loop' in messages[0].content %}" + ENDLESS + "{% endif %}"
        "{% if 'fail' in messages[0].content %}{{ 1 / 0 }}{% endif %}" + text
    )
    monkeypatch.setattr(llava_skip.foreign_templates, "SECONDS", 0.5)
    generator = Generator(check_model(folder), numerics())
    assert len(generator.answer(["fine"], [()], 2)) == 1
    with pytest.raises(UserError, match="does not end within"):
        generator.answer(["a loop"], [()], 2)
    with pytest.raises(UserError, match="ZeroDivisionError"):
        generator.answer(["a fail"], [()], 2)
    assert len(generator.answer(["fine"], [()], 2)) == 1


@pytest.mark.parametrize("content", ["[1]", '{"v1_0": 7}', '{"v1_0": {"asked": "x", "score": 1}}', DEEP])
def test_damaged_grades_are_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "grades.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"grades.json.*(move it away|not valid JSON)"):
        read_replies(path, {"v1_0": "?"}, score=list)
    write_json(path, {"other": {"score": [1.0]}})
    assert json.dumps(read_replies(path, {"v1_0": "?"}, score=list))
