"""The body of a chat completion, damaged at every place: it is read, or refused with a message."""

import copy
import json

import pytest

from serve.chat_request import ChatRequest, Limits, RequestError, error_body, read_request
from serve.conversation import without_placeholder

BODY = {
    "model": "m", "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 5, "temperature": 0.5,
    "top_p": 0.5, "seed": 1, "stop": ["x"], "n": 1, "user": "someone",
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "What?"},
                                     {"type": "image_url", "image_url": {"url": "data:,", "detail": "low"}}]},
        {"role": "assistant", "content": "A <image>!", "refusal": None, "annotations": []},
        {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "this?"}]},
    ],
}  # fmt: skip
VALUES = (None, True, 0, -1, 10**30, 1e308, float("nan"), "", "x", [], [None], [[]], {}, {"type": "text"}, "\ud800")


def read(body) -> ChatRequest:
    return read_request(body, "m", Limits())


def places(value, path=()):
    """The path to each value of a body."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from places(part, (*path, key))


def test_a_body_is_read():
    request = read(BODY)
    assert request.stream and request.seed == 1
    assert (request.options.max_new_tokens, request.options.temperature, request.options.stops) == (5, 0.5, ("x",))
    assert [role for role, _ in request.turns] == ["system", "user", "assistant", "user"]
    assert request.turns[2][1] == "A !" and request.turns[3][1] == "And this?"
    plain = read({"model": "m", "messages": [{"role": "developer", "content": "x"}, {"role": "user", "content": "y"}]})
    assert plain.turns[0][0] == "system" and not plain.stream and plain.options.temperature == 0
    assert plain.options.max_new_tokens == Limits.new_tokens


def test_a_damaged_body_is_read_or_refused():
    found = {True: 0, False: 0}
    for path in places(BODY):
        for value in VALUES if path else ():
            body = copy.deepcopy(BODY)
            place = body
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value
            try:
                found[isinstance(read(body), ChatRequest)] += 1
            except RequestError as error:
                found[False] += 1
                assert error.status in (400, 404) and 0 < len(str(error)) < 400
                json.dumps(error_body(str(error), 400, error.param), ensure_ascii=False).encode()
    assert found[True] > 50 and found[False] > 300


@pytest.mark.parametrize("body", [{"\ud800": 1}, {"stop": ["\ud800" * 201]}, {"stream_options": {"\ud800": True}}])
def test_halves_of_characters_can_be_sent_back(body):
    with pytest.raises(RequestError) as caught:
        read(BODY | body)
    json.dumps(error_body(str(caught.value), 400, caught.value.param), ensure_ascii=False).encode()


@pytest.mark.parametrize("given", [{"n": True}, {"presence_penalty": False}, {"stream_options": {"include_usage": 1}}])
def test_a_value_of_another_type_is_not_the_same(given):
    assert read(BODY | {"n": 1.0, "presence_penalty": 0.0})
    with pytest.raises(RequestError, match="not supported|must be of the type bool"):
        read(BODY | given)


def test_texts_are_counted_before_they_are_read(monkeypatch):
    monkeypatch.setattr("serve.chat_request.without_placeholder", None)
    messages = [{"role": "assistant", "content": "<image>" * 200_000}, {"role": "user", "content": "x"}]
    with pytest.raises(RequestError, match="1,400,001 characters; at most"):
        read({"model": "m", "messages": messages})


def test_nested_placeholders_are_taken_out_in_one_pass():
    deep = 50_000  # again and again from the start, it would take hours
    assert without_placeholder("a<im" + "<image" * deep + ">" * deep + "age>b") == "ab"
    assert without_placeholder("<image<image>>>") == ">" and without_placeholder("x > y") == "x > y"


def test_a_long_name_of_a_field_is_shortened():
    with pytest.raises(RequestError, match="no field 'xxx") as caught:
        read(BODY | {"x" * 5000: 1})
    assert len(str(caught.value)) < 400


def test_top_p_of_nothing_takes_the_most_likely_token():
    options = read(BODY | {"top_p": 0, "temperature": 2}).options
    assert (options.temperature, options.top_p) == (0, None)


@pytest.mark.parametrize("number", [1000, 1001])
def test_many_messages_and_parts(number):
    def is_read(messages):
        try:
            return bool(read({"model": "m", "messages": messages}))
        except RequestError:
            return False

    assert is_read([{"role": "user", "content": "x"}] * number) is (number == 1000)
    parts = [{"type": "text", "text": "x"}] * (number + 16)
    parts.append({"type": "image_url", "image_url": {"url": "data:,"}})
    assert is_read([{"role": "user", "content": parts[17:]}]) and not is_read([{"role": "user", "content": parts}])
