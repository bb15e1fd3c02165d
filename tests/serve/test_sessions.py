"""Sessions of open pages: their own turns, one answer at a time, and no more caches than fit."""

import threading

import pytest
import torch

from llava_skip_base.errors import UserError
from serve import sessions
from serve.answering import Answerer
from serve.conversation import Picture
from serve.loading import load
from serve.sessions import Model, Sessions, Settings, text_of
from tests.support.conversations import random_image

SETTINGS = Settings(3, 0.0)


@pytest.fixture(scope="module")
def models(saved, saved_dense) -> list[Model]:
    cpu = torch.device("cpu"), torch.float32
    return [Model("skip", load(str(saved), *cpu)), Model("dense", load(str(saved_dense), *cpu))]


@pytest.fixture
def pages(models) -> Sessions:
    return Sessions(models)


@pytest.fixture
def wordy(models, monkeypatch) -> Settings:
    """Settings of long answers whose text comes word by word: of the bytes, only a letter and a space are chosen."""
    loaded = models[0].loaded
    words = set(loaded.processor.tokenizer("a ", add_special_tokens=False)["input_ids"])
    others = [token for token in range(len(loaded.processor.tokenizer)) if token not in words]
    monkeypatch.setattr(loaded.model.generation_config, "suppress_tokens", others)
    return Settings(300, 1.0)


def finish(steps) -> int:
    return sum(1 for _ in steps)


def picture() -> Picture:
    return Picture("one.png", b"", random_image(20, 20, seed=1))


def test_each_page_has_its_own_turns_and_each_model_its_own_answers(pages):
    one, other = pages.get("one"), pages.get("other")
    assert finish(one.ask("What is this?", [picture()], SETTINGS)) >= 4
    finish(other.ask("Who?", [], Settings(2, 0.0)))
    finish(one.ask("Why?", [], SETTINGS))
    for side in one.sides:
        assert [turn.question for turn in side.conversation.turns] == ["What is this?", "Why?"]
        assert all(turn.answer is not None for turn in side.conversation.turns)
        assert side.cost.tokens == 3 and side.cost.reused > 10 and side.text is None
    assert one.sides[0].cost.kept < one.sides[0].cost.seen and one.sides[1].cost.kept == one.sides[1].cost.seen
    assert [[turn.question for turn in side.conversation.turns] for side in other.sides] == [["Who?"]] * 2
    assert other.sides[0].cost.tokens == 2
    one.clear()
    assert [side.conversation.turns for side in one.sides] == [[], []] and other.sides[0].conversation.turns


def test_a_stop_keeps_what_there_is_and_asks_no_other_model(pages, wordy):
    session = pages.get("one")
    steps = session.ask("Say much.", [], wordy)
    while not session.sides[0].text:
        next(steps)
    session.stop()
    finish(steps)
    first, second = session.sides
    assert first.cost.stopped and first.cost.tokens < 300 and first.conversation.turns[0].answer is not None
    assert second.conversation.turns == [] and second.cost is None
    finish(session.ask("And?", [], SETTINGS))
    assert not first.cost.stopped and len(second.conversation.turns) == 1


def test_a_question_that_fails_is_taken_back_and_told(pages):
    first, second = (session := pages.get("one")).sides
    finish(session.ask("a <image> in words", [picture()], SETTINGS))
    assert "stands for an image" in first.fault and first.conversation.turns == second.conversation.turns == []
    finish(session.ask("x" * 100_000, [picture()], SETTINGS))
    assert "begin again" in first.fault and first.conversation.turns == first.conversation.waiting == []
    session.clear()
    finish(session.ask("And?", [], SETTINGS))
    assert first.fault == "" and len(first.conversation.turns) == 1


def test_a_conversation_takes_so_many_images(pages, monkeypatch):
    monkeypatch.setattr("serve.sessions.MOST_PICTURES", 2)
    session = pages.get("one")
    finish(session.ask("x", [picture()], SETTINGS))
    with pytest.raises(UserError, match="at most 2 images: clear it"):
        finish(session.ask("y", [picture(), picture()], SETTINGS))
    finish(session.ask("y", [picture()], SETTINGS))
    assert len(session.sides[0].conversation.pictures) == 2


def test_a_page_that_is_closed_ends_its_answer(pages, wordy):
    session = pages.get("one")
    steps = session.ask("Say much.", [picture()], wordy)
    while not session.sides[0].text:
        next(steps)
    with pytest.raises(UserError, match="still being answered"):
        next(session.ask("Another.", [], SETTINGS))
    with pytest.raises(UserError, match="stop it first"):
        session.clear()
    made = len(session.sides[0].text)
    steps.close()  # waits for the thread, which ends after its token
    assert session.sides[0].conversation.turns == [] and not session.sides[0].model.lock.locked() and made < 200
    pages.remove("one")
    assert len(pages) == 0 and pages.get("one") is not session


def test_a_model_answers_one_question_at_a_time(pages, monkeypatch):
    running, most = [], []
    real = Answerer.answer

    def answer(self, *words):
        running.append(self)
        most.append(len(running))
        try:
            return real(self, *words)
        finally:
            running.remove(self)

    monkeypatch.setattr(Answerer, "answer", answer)
    monkeypatch.setattr(pages, "models", pages.models[:1])
    work = [threading.Thread(target=lambda n=n: finish(pages.get(str(n)).ask("?", [], SETTINGS))) for n in range(3)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join(60)
    assert most == [1, 1, 1] and len(pages) == 3


def test_caches_and_conversations_are_not_kept_without_end(pages, monkeypatch):
    monkeypatch.setattr(sessions, "KEPT_CACHES", 1)
    monkeypatch.setattr(sessions, "KEPT_SESSIONS", 2)
    monkeypatch.setattr(pages, "models", pages.models[:1])
    first = pages.get("first")
    finish(first.ask("One?", [], SETTINGS))
    pages.get("second")
    assert pages.get("first") is first
    finish(first.ask("Two?", [], SETTINGS))
    assert first.sides[0].cost.reused == 0 and len(first.sides[0].conversation.turns) == 2  # its cache was gone
    pages.get("second")
    pages.get("third")
    assert len(pages) == 2 and pages.get("first") is not first


def test_text_comes_while_the_call_runs_and_its_fault_is_raised():
    go_on = threading.Event()

    def work(show):
        show("a")
        assert go_on.wait(60)
        show("b")
        show("c")
        raise UserError("broken")

    pieces = text_of(work)
    assert next(pieces) == "a"
    go_on.set()
    rest = ""
    with pytest.raises(UserError, match="broken"):
        for piece in pieces:
            rest += piece
    assert rest == "bc"
