"""Static pages of results: an index, and for each benchmark every question with its image and all models' answers."""

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from PIL import Image
from tqdm import tqdm

from eval.benchmark import Benchmark
from eval.benchmarks import get_benchmark
from eval.reading.images import ImageSource
from eval.reading.tables import Row
from eval.showing.results import Result
from llava_skip_base.errors import UserError
from llava_skip_base.files import write_bytes

LONGEST_SIDE = 1024
SMALL = 256 * 256  # pixels up to which an image is kept exactly
GOLD_COLUMNS = ("answer", "answers", "gold", "label", "references")


@dataclass
class Answer:
    """One model's answer to a question.

    Attributes:
        model: number of the model on its page.
        verdict: "right", "wrong", "partly" or "unscored".
        value: the verdict as it is shown, a grade if it is partly right.
        texts: the answer, or one for each row that asks the question.
    """

    model: int
    verdict: str
    value: str
    texts: list[str] = field(default_factory=list)


@dataclass
class Question:
    """A question as a page shows it.

    Attributes:
        prompts: what the models were asked; one for each row that asks it.
        golds: the right answers, if the file has them.
        images: file names relative to the page.
    """

    id: str
    prompts: list[str] = field(default_factory=list)
    golds: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)


@cache
def template(name: str) -> Template:
    """A page's template, which escapes every text."""
    return Environment(
        loader=PackageLoader("eval.showing"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template(name)


def write_pages(
    folder: Path,
    benchmarks: Mapping[str, Sequence[Result]],
    table: Sequence[Sequence[str]],
    facts: Sequence[Mapping[str, Any]],
    charts: Sequence[str],
) -> None:
    """Write ``index.html``, a page for each benchmark, and the images that they show.

    `table` is the scores as text, header first, `facts` the origin of each, `charts` names of files in the folder.
    """
    for name, results in benchmarks.items():
        questions, note = collect_questions(get_benchmark(name), results, folder)
        page = template("questions.html.jinja").render(benchmark=name, results=results, questions=questions, note=note)
        write_bytes(folder / f"{name}.html", page.encode("utf-8", "replace"))
    index = template("index.html.jinja").render(table=table, facts=facts, charts=charts)
    write_bytes(folder / "index.html", index.encode("utf-8", "replace"))


def collect_questions(benchmark: Benchmark, results: Sequence[Result], folder: Path) -> tuple[list[Question], str]:
    """Bring the answers of all models together, question by question; write their images to `folder`.

    Returns:
        The questions in the order of the file, and a note if there are no images.
    """
    questions: dict[str, Question] = {}
    for number, result in enumerate(results):
        for row in result.answers():
            id_ = str(benchmark.question(row["index"]))
            question = questions.setdefault(id_, Question(id_))
            if not question.answers or question.answers[-1].model != number:
                question.answers.append(Answer(number, *_verdict(result.values.get(id_))))
            question.answers[-1].texts.append(str(row["prediction"]))
            if number == question.answers[0].model:
                question.prompts.append(str(row["prompt"]))
                question.golds += [gold for gold in [gold_of(row)] if gold]
    note = _add_images(benchmark, results[0], questions, folder)
    return list(questions.values()), note


def _add_images(benchmark: Benchmark, result: Result, questions: Mapping[str, Question], folder: Path) -> str:
    """Show the images if the benchmark file is still the one that was answered; else say why there are none."""
    try:
        samples = result.load_samples(benchmark)
    except UserError as error:
        return f"There are no images: {error}"
    names: dict[Any, str] = {}
    for sample in tqdm(samples, desc=f"{benchmark.name}: images", unit="question", leave=False, disable=None):
        question = questions.get(str(benchmark.question(sample.id)))
        if question and not question.images:
            for source in sample.images:
                try:
                    if (key := (source.data, source.number)) not in names:
                        names[key] = _write_image(source, folder)
                except UserError as error:
                    return f"Images are missing from here on: {error}"
                question.images.append(names[key])
    return ""


def _write_image(source: ImageSource, folder: Path) -> str:
    image = source.open()
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=90, lossless=image.width * image.height <= SMALL)
    name = f"pictures/{hashlib.sha256(buffer.getvalue()).hexdigest()[:20]}.webp"
    if not (folder / name).exists():
        write_bytes(folder / name, buffer.getvalue())
    return name


def _verdict(value: bool | float | None) -> tuple[str, str]:
    if value is None:
        return "unscored", ""
    verdict = {0.0: "wrong", 1.0: "right"}.get(float(value), "partly")
    return verdict, f"{value:.2f}" if verdict == "partly" else verdict


def gold_of(row: Row) -> str:
    """The right answer of a benchmark's row, for a reader; "" if there is none."""
    value = next((row[name] for name in GOLD_COLUMNS if row.get(name)), "")
    return ", ".join(dict.fromkeys(map(str, value))) if isinstance(value, list) else str(value)
