"""Answers in transformers' thread: their time, what goes wrong in them, and what stays of them."""

import asyncio
import json

import httpx
import pytest
import torch

from serve.chat_request import Limits, RequestError, read_request
from serve.loading import load
from tests.support.openai_messages import image_part, user

pytest.importorskip("fastapi", reason="needs the extra [serve]")
pytest.importorskip("openai", reason="needs the extra [serve]")
from serve.transformers_app import Answers, Job, ServedModel, build_app

ASKED = {"model": "m", "messages": [user("What?")], "max_tokens": 20}
WITH_IMAGE = {"model": "m", "messages": [user(image_part(30, 20), "What?")], "max_tokens": 5}


@pytest.fixture
def model(saved):
    return load(str(saved), torch.device("cpu"), torch.float32)


def answered(loaded, limits: Limits, *bodies: dict) -> tuple[list[Job], Answers]:
    """The jobs of some requests, one after the other."""
    jobs = []

    async def run() -> Answers:
        answers = Answers(loaded, limits)
        for number, body in enumerate(bodies):
            job = await answers.begin(read_request(body, "m", limits), str(number))
            await job.ended.wait()
            answers.end(str(number))
            jobs.append(job)
        answers.close()
        return answers

    return jobs, asyncio.run(run())


def test_an_answer_is_cut_when_its_time_is_over(model):
    [job], _ = answered(model, Limits(seconds=1e-9), ASKED)
    assert job.total_tokens == 1 and job.config.max_new_tokens == 1  # for transformers' responses: it was cut


def test_nothing_of_an_answer_of_a_model_that_forgets_stays(model):
    [job], answers = answered(model, Limits(), WITH_IMAGE)
    assert job.error is None and not answers._pictures and not answers._jobs and not answers._answerer.goes_on


def test_a_next_turn_of_a_dense_model_goes_on_and_reads_its_images_once(saved_dense):
    dense = load(str(saved_dense), torch.device("cpu"), torch.float32)
    turns = [*WITH_IMAGE["messages"], {"role": "assistant", "content": "It."}, user("And", image_part(20, 20), "?")]
    other = [user(image_part(20, 30), "What?")]
    bodies = [WITH_IMAGE, WITH_IMAGE | {"messages": turns}, WITH_IMAGE | {"messages": other}]
    jobs, answers = answered(dense, Limits(), *bodies)
    assert [job.cost.reused > dense.processor.image_seq_length for job in jobs] == [False, True, False]
    assert len(answers._pictures) == 1
    [fresh], _ = answered(dense, Limits(), bodies[1])
    assert fresh.text == jobs[1].text and fresh.cost.reused == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_a_fault_of_the_program_is_told_without_what_it_was(model, monkeypatch, caplog, stream, late):
    def broken(self, conversation, show, is_stopped, options):
        if late:
            show("It is ")
        raise ZeroDivisionError('a "secret" path')

    monkeypatch.setattr("serve.answering.Answerer.answer", broken)

    async def run() -> httpx.Response:
        app, answers = build_app(model, "m", Limits())
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            response = await client.post("/v1/chat/completions", json=ASKED | {"stream": stream})
        answers.close()
        return response

    response = asyncio.run(run())
    assert "secret" not in response.text
    if stream and late:
        *_, last = (json.loads(line[6:]) for line in response.text.splitlines() if line)
        assert last == {"error": "the server failed; its log says why"} and "secret" in caplog.text
    else:
        assert response.status_code == 500 and response.json()["error"]["type"] == "server_error"


def test_the_manager_of_models_loads_none(model):
    async def run() -> None:
        manager = ServedModel(Answers(model, Limits()), "m")
        with pytest.raises(RequestError, match="loads no other"):
            manager.load_model_and_processor("gpt2@main")
        events = [event async for event in manager.load_model_streaming("gpt2@main")]
        assert "loads no other" in events[-1]
        assert [entry["id"] for entry in manager.get_gen_models()] == ["m"]

    asyncio.run(run())
