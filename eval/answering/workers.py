"""Answer batches in this process or in several, each with the model on a device of its own.

Workers only compute. They return their answers to the one process that writes, so if one is killed, only the batches
that are being answered are lost, and no two processes write the same file.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
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
    """Answers jobs one by one and keeps the model loaded between them."""

    def __init__(self, numerics: "Numerics", rank: int = 0) -> None:
        self.numerics = numerics
        self.rank = rank
        self._model: SavedModel | None = None
        self._generator: Any = None

    def __call__(self, job: Job) -> Answered:
        """The answers to a job; its model is loaded if another one was, and takes the job's reduction."""
        import eval.answering.generate as generate  # torch and transformers: slow to import, and only needed here

        if self._model is None or job.model.folder != self._model.folder:
            self._generator = None  # frees the memory before the next one takes it
            self._generator = generate.Generator(job.model, self.numerics, self.rank)
        elif job.model.reduction != self._model.reduction:
            self._generator.answer_as(job.model)
        self._model = job.model
        texts = self._generator.answer(job.prompts, job.images, job.max_new_tokens)
        return Answered(texts, self._generator.cost)


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
    if processes <= 1:
        answerer = Answerer(numerics)
        for job in jobs:
            yield job, answerer(job)
        return
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    ranks = context.SimpleQueue()
    for rank in range(processes):
        ranks.put(rank)
    pool = ProcessPoolExecutor(processes, context, _start, (ranks, processes, numerics))
    try:
        open_jobs = {pool.submit(_answer, job): job for job in jobs}
        for done in as_completed(list(open_jobs)):
            yield open_jobs.pop(done), done.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died (killed, or out of memory?); all finished batches are saved, run the same command "
            "again to continue."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_answerer: Answerer


def _start(ranks: Any, processes: int, numerics: "Numerics") -> None:
    global _answerer
    import torch

    threading.Thread(target=_exit_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    _answerer = Answerer(numerics, ranks.get())


def _answer(job: Job) -> Answered:
    return _answerer(job)


def _exit_with_parent() -> None:
    """Exit when the parent process has ended, even if it was killed; else this one would wait for jobs for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
