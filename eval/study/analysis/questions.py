"""The samples of an analysis: questions of benchmarks, or records of a training file in LLaVA's form.

Shapes: T tokens of a sample.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.answering.generate import conversation
from eval.answering.plan import assign, chosen_benchmarks, embedded_file
from eval.benchmarks import get_benchmark
from eval.reading.images import PLACEHOLDER, ImageSource
from eval.reading.tables import sha256
from eval.showing.pages import gold_of
from llava_skip.configuration import IGNORE_INDEX
from llava_skip.processing import image_first
from llava_skip_base.errors import MissingFileError, UserError, first_few
from llava_skip_base.files import image_path, read_json
from llava_skip_base.texts import shortened

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Question:
    """One sample of an analysis.

    Attributes:
        id: its id, with the benchmark's name in front.
        prompt: the (first) question, with `<image>` for each image, or none.
        images: its images.
        gold: the right answer as the data has it, for a reader; "" if it has none.
        turns: the whole conversation with its answers, where the data is a training file; None for a benchmark.
    """

    id: str
    prompt: str
    images: tuple[ImageSource, ...]
    gold: str
    turns: tuple[dict[str, str], ...] | None = None


@dataclass(frozen=True)
class Encoded:
    """A question as the model takes it.

    Attributes:
        id: of the question.
        input_ids: [T].
        supervised: [T] bool, the tokens of the answers.
        prompt_length: tokens up to the (first) answer.
        pixel_values: [crops, 3, side, side] of its images; None without.
        crop_counts: crops of each image, where images have several.
    """

    id: str
    input_ids: Tensor
    supervised: Tensor
    prompt_length: int
    pixel_values: Tensor | None
    crop_counts: Tensor | None


@dataclass(frozen=True)
class Data:
    """The questions of an analysis and where they come from, for the result."""

    questions: list[Question]
    facts: list[dict[str, Any]]


def read_questions(benchmark: str | None, data: Path | None, images: Path | None, samples: int) -> Data:
    """The questions that the options name, spread evenly over each file.

    Args:
        benchmark: names separated by commas, or "all"; None with `data` takes it for a training file.
        data: a file of the benchmark, or a training file in LLaVA's JSON; None for the embedded benchmarks.
        images: the folder of its image files.
        samples: how many, over all files.

    Raises:
        UserError: on the first thing that is wrong.
    """
    if images is not None and data is None:
        raise UserError("--images goes with --data: the embedded benchmarks have their own images.")
    if images is not None and not images.is_dir():
        raise MissingFileError(f"{images}: no such image folder; check --images.")
    if data is not None and benchmark is None:
        questions = read_records(data, images or data.parent)
        return Data(_spread(questions, samples), [{"name": data.name, "path": str(data), "sha256": sha256([data])}])
    given = [] if data is None else [str(data)]
    names = chosen_benchmarks(benchmark or "all", [])
    files = {name: Path(path) for name, path in assign("--data", given, names).items()}
    groups, facts = [], []
    for name in names:
        kind = get_benchmark(name)
        path = files.get(name) or embedded_file(kind)
        own = kind.load(path, images)
        prompts = kind.prompts(own)
        groups.append(
            [
                Question(f"{name}/{sample.id}", prompt, sample.images, gold_of(sample.fields))
                for sample, prompt in zip(own, prompts, strict=True)
            ]
        )
        facts.append({"name": name, "path": str(path), "sha256": sha256([path])})
    each = [samples // len(groups) + (number < samples % len(groups)) for number in range(len(groups))]
    return Data([q for group, count in zip(groups, each, strict=True) for q in _spread(group, count)], facts)


def _spread(questions: Sequence[Question], count: int) -> list[Question]:
    """`count` questions at equal distances, all if there are no more."""
    if count >= len(questions):
        return list(questions)
    return [questions[number * len(questions) // count] for number in range(count)]


def read_records(path: Path, images: Path) -> list[Question]:
    """The records of a training file in LLaVA's JSON: `image` and `conversations` of `from` and `value`.

    Args:
        path: the file.
        images: the folder that its image names start from.

    Raises:
        UserError: it holds something else; all other forms of training data can be converted to this one.
    """
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file; give a benchmark file with --benchmark, or a training file.")
    rows = read_json(path)
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: expected a list of records; name the benchmark with --benchmark if it is one's file.")
    found = [_record(row, number, images) for number, row in enumerate(rows)]
    if faulty := [number for number, question in enumerate(found) if question is None]:
        raise UserError(
            f"{path}: {first_few(faulty)} of {len(rows)} records (counted from 0) do not have LLaVA's form: "
            "`conversations` with `from` human or gpt and `value`, a question before its answer, and one `image` name "
            "for each <image>. llava-skip validate-data says what is wrong with a training file."
        )
    return [question for question in found if question is not None]


def _record(row: Any, number: int, folder: Path) -> Question | None:
    turns = row.get("conversations") if isinstance(row, dict) else None
    if not isinstance(turns, list) or not turns:
        return None
    said = []
    for turn in turns:
        role = ROLES.get(str(turn.get("from"))) if isinstance(turn, dict) else None
        if role is None or not isinstance(turn.get("value"), str):
            return None
        said.append({"role": role, "content": image_first(turn["value"])})
    asked = [turn["content"] for turn in said if turn["role"] == "user"]
    answered = [turn["content"] for turn in said if turn["role"] == "assistant"]
    names = row.get("image") or []
    names = names if isinstance(names, list) else [names]
    marks = sum(turn["content"].count(PLACEHOLDER) for turn in said)
    if not asked or not answered or marks != len(names) or not all(isinstance(name, str) for name in names):
        return None
    sources = tuple(ImageSource(f"record {number}", image_path(folder, name)) for name in names)
    if not all(os.path.isfile(source.data) for source in sources if isinstance(source.data, Path)):
        raise MissingFileError(
            f"record {number}: {shortened(names)} does not exist in {folder}; give the folder of the images with "
            "--images."
        )
    first = sources[: asked[0].count(PLACEHOLDER)]
    return Question(str(row.get("id", number)), asked[0], first, answered[0], tuple(said)) if first == sources else None


def encode(questions: Sequence[Question], processor: Any, answers: Sequence[str] | None = None) -> Iterator[Encoded]:
    """Each question as the model takes it: a benchmark's up to the answer, a record with its answers.

    Args:
        questions: the questions.
        processor: of the model.
        answers: a model's answer to each, which then follows a benchmark's question as if it were the data's.
    """
    for question, answer in zip(questions, answers or [""] * len(questions), strict=True):
        if question.turns:
            sources, turns = question.images, [dict(turn) for turn in question.turns]
        elif answer:
            sources = question.images
            turns = [*conversation(question.prompt, sources), {"role": "assistant", "content": answer}]
        else:
            yield _encode_question(question, processor)
            continue
        yield _encode_turns(question.id, turns, sources, processor)


def _encode_question(question: Question, processor: Any) -> Encoded:
    inputs = processor.apply_chat_template(
        [conversation(question.prompt, question.images)],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids = inputs["input_ids"][0]
    return Encoded(
        question.id,
        ids,
        torch.zeros_like(ids, dtype=torch.bool),
        len(ids),
        inputs.get("pixel_values"),
        inputs.get("crop_counts"),
    )


def _encode_turns(id_: str, turns: list[dict[str, Any]], sources: Sequence[ImageSource], processor: Any) -> Encoded:
    sample = processor.encode_conversation(turns, [source.open() for source in sources])
    ids, labels = torch.as_tensor(sample["input_ids"]), torch.as_tensor(sample["labels"])
    supervised = labels != IGNORE_INDEX
    if not supervised[1:].any():
        raise UserError(f"{id_}: the chat template marks no answer in it; name one with --template.")
    pixels = sample.get("pixel_values")
    counts = sample.get("crop_counts")
    return Encoded(
        id_,
        ids,
        supervised,
        int(supervised[1:].nonzero()[0]) + 1,
        None if pixels is None else torch.stack([torch.as_tensor(crop) for crop in pixels]),
        None if counts is None else torch.as_tensor(counts),
    )
