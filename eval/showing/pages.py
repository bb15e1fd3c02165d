"""Static pages of results: an index, and for each benchmark every question with its picture and all models' answers."""

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image
from tqdm import tqdm

from eval.benchmark import Benchmark
from eval.benchmarks import get_benchmark
from eval.reading.images import ImageSource
from eval.reading.tables import Row, sha256
from eval.showing.results import Result
from llava_skip_base.errors import UserError
from llava_skip_base.files import write_bytes

LONGEST_SIDE = 1024
SMALL = 256 * 256  # pixels up to which a picture is kept exactly
GOLD_COLUMNS = ("answer", "answers", "gold", "label")


@dataclass
class Answer:
    """One model's answer to a question.

    Attributes:
        model: number of the model on its page.
        verdict: "right", "wrong", "partly" or "unscored".
        value: the verdict as it is shown, a grade where it is partly right.
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
        id: its id.
        prompts: what the models were asked; one for each row that asks it.
        golds: the right answers, if the file has them.
        pictures: file names below the page.
        answers: the models' answers.
    """

    id: str
    prompts: list[str] = field(default_factory=list)
    golds: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)


def write_pages(
    folder: Path,
    benchmarks: Mapping[str, Sequence[Result]],
    table: Sequence[Sequence[str]],
    facts: Sequence[Mapping[str, Any]],
    charts: Sequence[str],
) -> None:
    """Write ``index.html``, a page for each benchmark, and the pictures that they show.

    Args:
        folder: where to.
        benchmarks: the results of each benchmark.
        table: the scores as text, header first.
        facts: where each score comes from.
        charts: names of chart files in the folder.
    """
    environment = Environment(
        loader=PackageLoader("eval.showing"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name, results in benchmarks.items():
        questions, note = collect_questions(get_benchmark(name), results, folder)
        page = environment.get_template("questions.html.jinja").render(
            benchmark=name, results=results, questions=questions, note=note
        )
        write_bytes(folder / f"{name}.html", page.encode("utf-8", "replace"))
    index = environment.get_template("index.html.jinja").render(table=table, facts=facts, charts=charts)
    write_bytes(folder / "index.html", index.encode("utf-8", "replace"))


def collect_questions(benchmark: Benchmark, results: Sequence[Result], folder: Path) -> tuple[list[Question], str]:
    """Bring the answers of all models together, question by question.

    Args:
        benchmark: what was asked.
        results: one for each model.
        folder: where pictures go.

    Returns:
        The questions in the order of the file, and what the page must say about pictures.
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
                question.golds += [gold for gold in [_gold(row)] if gold]
    note = _add_pictures(benchmark, results[0], questions, folder)
    return list(questions.values()), note


def _add_pictures(benchmark: Benchmark, result: Result, questions: Mapping[str, Question], folder: Path) -> str:
    """Show the pictures of a benchmark file that is still the one that was answered; else say why there are none."""
    data = result.facts["data"]
    path, images = Path(data["path"]), data.get("images")
    if not path.exists() or sha256([path]) != data["sha256"]:
        return f"There are no pictures: {path} is gone or has changed since the evaluation."
    try:
        samples = benchmark.load(path, images and Path(images))
    except UserError as error:
        return f"There are no pictures: {error}"
    names: dict[Any, str] = {}
    for sample in tqdm(samples, desc=f"{benchmark.name}: pictures", unit="question", leave=False, disable=None):
        question = questions.get(str(benchmark.question(sample.id)))
        if question and not question.pictures:
            for picture in sample.images:
                if picture.data not in names:
                    names[picture.data] = _write_picture(picture, folder)
                question.pictures.append(names[picture.data])
    return ""


def _write_picture(picture: ImageSource, folder: Path) -> str:
    image = picture.open()
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


def _gold(row: Row) -> str:
    value = next((row[name] for name in GOLD_COLUMNS if row.get(name)), "")
    return ", ".join(dict.fromkeys(map(str, value))) if isinstance(value, list) else str(value)
