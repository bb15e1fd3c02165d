"""A batch is prepared while the one before it is answered: nothing but the time changes."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

import eval.answering.generate
import eval.answering.workers
from eval.answering.generate import Generator, numerics
from eval.answering.models import SavedModel, check_model
from eval.answering.workers import Answered, Job, answer_jobs
from eval.reading.images import ImageSource
from llava_skip_base.errors import UserError
from tests.eval.test_generate import noise

BATCHES = 4


def jobs_of(model: SavedModel, images: list[ImageSource]) -> list[Job]:
    prompts = ["Which?", "How many of them are there?", "Where?", "What colour has it?"]
    return [Job(0, (n,), (prompts[n],), ((image,),), model, 3) for n, image in enumerate(images)]


@pytest.fixture
def paced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """A model that generates as long as the next image takes to be opened; what happens, in order."""
    events: list[tuple[str, int]] = []
    opened = [threading.Event() for _ in range(BATCHES)]
    open_image = ImageSource.open

    def recorded(self: ImageSource) -> Any:
        number = int(self.sample.split()[-1])
        events.append(("open", number))
        opened[number].set()
        return open_image(self)

    class Paced(Generator):
        def __init__(self, *words: Any) -> None:
            super().__init__(*words)
            self.model.generate, self.answered = self._wait, 0

        def _wait(self, input_ids: torch.Tensor, logits_processor: Any, **_: Any) -> torch.Tensor:
            number, self.answered = self.answered, self.answered + 1
            events.append(("begin", number))
            logits_processor(input_ids, torch.zeros(len(input_ids), 5))
            if number + 1 < BATCHES:
                assert opened[number + 1].wait(20), "the next batch is prepared only after this one"
            events.append(("end", number))
            return torch.cat([input_ids, torch.full((len(input_ids), 1), 5 + number)], dim=1)

    monkeypatch.setattr(ImageSource, "open", recorded)
    monkeypatch.setattr(eval.answering.generate, "Generator", Paced)
    return events


def test_each_batch_is_prepared_while_the_one_before_is_answered(saved: Path, paced: list[tuple[str, int]]) -> None:
    jobs = jobs_of(check_model(saved), [noise(n) for n in range(BATCHES)])
    done = list(answer_jobs(jobs, 1, numerics()))
    assert [job for job, _ in done] == jobs and len({answered.texts[0] for _, answered in done}) == BATCHES
    assert sorted(number for what, number in paced if what == "open") == list(range(BATCHES))  # once each
    for number in range(1, BATCHES):  # its own thread may open it before or after the answer begins
        assert paced.index(("open", number)) < paced.index(("end", number - 1))
    for number in range(2, BATCHES):  # and no more than one batch waits
        assert paced.index(("end", number - 2)) < paced.index(("open", number))


def test_a_broken_image_ends_the_run_after_the_answer_before_it(saved: Path, paced: list[tuple[str, int]]) -> None:
    images = [noise(0), noise(1), ImageSource("sample 2", b"no image"), noise(3)]
    answers = answer_jobs(jobs_of(check_model(saved), images), 1, numerics())
    assert [next(answers)[0].ids, next(answers)[0].ids] == [(0,), (1,)]
    with pytest.raises(UserError, match="sample 2: its image cannot be decoded"):
        next(answers)
    assert ("open", 3) not in paced


def test_the_inputs_are_those_of_a_batch_alone(saved: Path) -> None:
    model = check_model(saved)
    generator = Generator(model, numerics())
    jobs = jobs_of(model, [noise(n) for n in range(BATCHES)])
    ahead = [generator.prepare(job.prompts, job.images) for job in jobs]  # all at once, in the helper's thread
    for job, ready in zip(jobs, ahead, strict=True):
        alone = generator.processor.apply_chat_template(
            [eval.answering.generate.opened(turns) for turns in generator.ask(job.prompts, job.images)],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )  # fmt: skip
        inputs = ready()
        assert inputs["pixel_values"].dtype == torch.uint8 and inputs.keys() == alone.keys()
        for name, value in inputs.items():
            assert torch.equal(generator._to_device(value), alone[name]), name
    expected = [generator.answer(job.prompts, job.images, 3) for job in jobs]
    assert [answered.texts for _, answered in answer_jobs(jobs, 1, numerics())] == expected


class Pool:
    """A stand-in for the pool of one process, which answers when it is asked for the result."""

    made: list["Pool"] = []

    def __init__(self, processes: int, context: Any, start: Any, words: tuple[Any, ...]) -> None:
        assert processes == 1 and words[0] == len(Pool.made)
        self.calls: list[tuple[Job, Job | None]] = []
        Pool.made.append(self)

    def submit(self, function: Any, job: Job, following: Job | None) -> Future:
        self.calls.append((job, following))
        future: Future = Future()
        future.set_result(Answered([str(job.ids[0])], None))
        return future

    def shutdown(self, **_: Any) -> None:
        pass


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Pool]]:
    monkeypatch.setattr(eval.answering.workers, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(Pool, "made", [])
    yield Pool.made


@pytest.mark.parametrize(("count", "processes"), [(2, 2), (3, 2), (11, 3), (5, 8)])
def test_each_process_knows_its_next_job(pools: list[Pool], count: int, processes: int) -> None:
    model = SavedModel(Path("m"), {}, ())
    jobs = [Job(0, (n,), ("?",), ((),), model, 1) for n in range(count)]
    done = list(answer_jobs(jobs, processes, None))
    assert sorted(job.ids for job, _ in done) == [job.ids for job in jobs]
    assert all(answered.texts == [str(job.ids[0])] for job, answered in done)
    made = list(Pool.made)
    assert len(made) == min(processes, count) and sum(len(pool.calls) for pool in made) == count
    for pool in made:
        promised = [following for _, following in pool.calls]
        assert all(next_job is None or next_job is pool.calls[n + 1][0] for n, next_job in enumerate(promised))
    if count > 2 * processes:
        assert all(pool.calls[0][1] is not None for pool in made)
