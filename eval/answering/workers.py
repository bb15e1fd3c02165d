"""Answer batches in this process or in several, each with the model on a device of its own.

Workers only compute. They return their answers to the one process that writes, so if one is killed, only the batches
that are being answered are lost, and no two processes write the same file.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from eval.answering.costs import BatchCost
from eval.answering.models import SavedModel
from eval.reading.images import ImageSource
from llava_skip_base.errors import UserError

if TYPE_CHECKING:
    from eval.answering.generate import Numerics


@dataclass(frozen=True)
class Job:
    """A batch of questions, with everything that is needed to answer them.

    Attributes:
        run: number of the evaluation that it belongs to.
        ids: the questions' ids.
        prompts: what is asked.
        images: the images of each question.
        model: which model answers.
        max_new_tokens: limit of an answer's length.
    """

    run: int
    ids: tuple[int | str, ...]
    prompts: tuple[str, ...]
    images: tuple[tuple[ImageSource, ...], ...]
    model: SavedModel
    max_new_tokens: int


@dataclass(frozen=True)
class Answered:
    """The answers to a job, and what they cost, if that was measured."""

    texts: list[str]
    cost: BatchCost | None


class Answerer:
    """Answers jobs one by one, keeps the model loaded between them, and prepares the next while it answers one."""

    def __init__(self, numerics: "Numerics", rank: int = 0) -> None:
        self.numerics = numerics
        self.rank = rank
        self._model: SavedModel | None = None
        self._generator: Any = None
        self._ahead: tuple[Any, Callable[[], Any]] | None = None
        """Which job is being prepared, and what waits for its inputs."""

    def __call__(self, job: Job, following: Job | None = None) -> Answered:
        """The answers to a job; its model is loaded if another one was, and takes the job's reduction.

        Args:
            job: what is answered.
            following: the job after it: if the same model answers it, its images and texts are prepared meanwhile.
        """
        ahead, self._ahead = self._ahead, None
        if self._model is None or job.model.folder != self._model.folder:
            self._generator = None  # frees the memory before the next one takes it
            self._generator = self.numerics.load(job.model, self.rank)
        elif job.model.reduction != self._model.reduction:
            self._generator.answer_as(job.model)
        self._model = job.model
        is_ready = ahead is not None and ahead[0] == _key(job)
        ready = ahead[1] if ahead is not None and is_ready else self._generator.prepare(job.prompts, job.images)
        inputs = ready()
        if following is not None and _key(following)[0] == _key(job)[0]:
            self._ahead = _key(following), self._generator.prepare(following.prompts, following.images)
        texts = self._generator.generate(inputs, job.max_new_tokens)
        return Answered(texts, self._generator.cost)


def _key(job: Job) -> Any:
    """Which model answers a job, and which job it is; also of a copy in another process."""
    return (job.model.folder, job.model.reduction), job.run, job.ids


def answer_jobs(jobs: Sequence[Job], processes: int, numerics: "Numerics") -> Iterator[tuple[Job, Answered]]:
    """Answer jobs, each as soon as a process is free.

    Args:
        jobs: the batches; started in this order, finished in any.
        processes: number of processes; with 1 it is this one.
        numerics: how the models compute.

    Yields:
        Each job with its answers.

    Raises:
        UserError: a worker died, or raised it.
    """
    processes = min(processes, len(jobs))
    if processes > 1:
        yield from _answer_in_processes(deque(jobs), processes, numerics)
        return
    answerer = Answerer(numerics)
    for job, following in zip_longest(jobs, jobs[1:]):
        yield job, answerer(job, following)


def _answer_in_processes(
    waiting: deque[Job], processes: int, numerics: "Numerics"
) -> Iterator[tuple[Job, Answered]]:  # fmt: skip
    """`answer_jobs` with several processes; each has the job after its present one, but for the last jobs."""
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    pools = [ProcessPoolExecutor(1, context, _start, (rank, processes, numerics)) for rank in range(processes)]
    running: dict[Future, tuple[ProcessPoolExecutor, Job, Job | None]] = {}

    def give(pool: ProcessPoolExecutor, job: Job) -> None:
        following = waiting.popleft() if len(waiting) >= processes else None  # at the end each takes what is left
        running[pool.submit(_answer, job, following)] = pool, job, following

    try:
        for pool in pools:
            give(pool, waiting.popleft())
        while running:
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                pool, job, following = running.pop(done)
                answered = done.result()
                if following is not None or waiting:
                    give(pool, following or waiting.popleft())
                yield job, answered
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died (killed, or out of memory?); all finished batches are saved, run the same command "
            "again to continue."
        ) from error
    finally:
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in pools:
            pool.shutdown()


_answerer: Answerer


def _start(rank: int, processes: int, numerics: "Numerics") -> None:
    global _answerer
    import torch

    threading.Thread(target=_exit_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    _answerer = Answerer(numerics, rank)


def _answer(job: Job, following: Job | None) -> Answered:
    return _answerer(job, following)


def _exit_with_parent() -> None:
    """Exit when the parent process has ended, even if it was killed; else this one would wait for jobs for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
