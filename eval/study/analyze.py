"""Measure on any checkpoint why skipping works and what it costs: `llava-skip analyze CHECKPOINT`.

docs/analyze.md has the definitions and says how to read the page.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from eval.answering.generate import Numerics, numerics
from eval.answering.models import check_model
from eval.study.analysis import error, layers, updates
from eval.study.analysis.batches import make_batches
from eval.study.analysis.loading import Analysed, check_layers, load_analysed
from eval.study.analysis.page import Section, write_page, write_tables
from eval.study.analysis.questions import Data, Encoded, Question, encode, read_questions
from eval.study.analysis.samples import Seen, answers_of, chosen, draw_seen, flipped, seen_by
from eval.versions import versions
from llava_skip.checkpoints import find_folder
from llava_skip_base.console import make_table, output_console, print_next, print_text, program
from llava_skip_base.errors import UserError, first_few
from llava_skip_base.files import write_json, writing
from llava_skip_base.paths import results, shown

PARTS: dict[str, Any] = {"updates": updates, "error": error, "layers": layers}
"""Name of a part -> its module, with TITLE, DEFINITIONS, `measure`, `draw`, `table` and `notes`."""
SAMPLES = "samples"
"""The part that shows answers and pictures."""


class Models(NamedTuple):
    """How the models of an analysis are loaded."""

    numerics: Numerics
    preset: str | None
    vision_tower: str | None
    template: str | None

    def load(self, source: str, other: bool = False) -> Analysed:
        """Load a checkpoint; the preset is not for the `other` one, which is compared with."""
        preset = None if other else self.preset
        return load_analysed(source, self.numerics, preset, self.vision_tower, self.template)


class Choices(NamedTuple):
    """What is done with the questions.

    Attributes:
        parts: names of `PARTS` and `SAMPLES`.
        batch_size: samples at once.
        pictures: questions that are shown.
        would_be: see `updates.measure`.
    """

    parts: Sequence[str]
    batch_size: int
    pictures: int
    would_be: bool


class View(NamedTuple):
    """What one model answers and sees, question by question."""

    name: str
    answers: list[str]
    seen: list[Seen]
    image_processor: Any


def chosen_parts(text: str) -> list[str]:
    """The parts that `--parts` names.

    Raises:
        UserError: an unknown name, or none.
    """
    known = [*PARTS, SAMPLES]
    names = known if text == "all" else [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise UserError(f"--parts is {text!r}; expected some of {', '.join(known)}, or all.{_of(unknown)}")
    return [name for name in known if name in names]


def _of(unknown: Sequence[str]) -> str:
    return f" Unknown: {first_few(unknown)}." if unknown else ""


def check_numbers(numbers: dict[str, int]) -> None:
    """Refuse options below 1."""
    for name, value in numbers.items():
        if value < 1:
            raise UserError(f"{name} is {value}; expected 1 or more.")


def view_of(analysed: Analysed, answers: list[str], samples: Sequence[Encoded]) -> View:
    """Answers and pictures of one model."""
    return View(analysed.saved.name, answers, seen_by(analysed, samples), analysed.processor.image_processor)


def measure_parts(analysed: Analysed, samples: Sequence[Encoded], choices: Choices) -> dict[str, dict[str, Any]]:
    """The results of the parts by name, each with the seconds that it took."""
    batches = make_batches(samples, analysed.model.config, choices.batch_size)
    options: dict[str, dict[str, Any]] = {"updates": {"would_be": choices.would_be}}
    found = {}
    for name in (name for name in choices.parts if name in PARTS):
        start = time.perf_counter()
        found[name] = PARTS[name].measure(analysed.model, batches, **options.get(name, {}))
        found[name]["seconds"] = round(time.perf_counter() - start, 1)
    return found


def show_samples(
    views: Sequence[View], questions: Sequence[Question], count: int, folder: Path
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Draw the samples to be shown, those whose answers differ first.

    Returns:
        The samples, and with two models how many answers are the same.
    """
    samples = []
    for number in chosen([view.answers for view in views], count):
        question = questions[number]
        texts = [view.answers[number] for view in views]
        shown_by = [
            {
                "model": view.name,
                "answer": text,
                "pictures": draw_seen(view.seen[number], view.image_processor, folder, f"{number}-{place}"),
            }
            for place, (view, text) in enumerate(zip(views, texts, strict=True))
        ]
        facts = {"id": question.id, "prompt": question.prompt, "gold": question.gold}
        samples.append({**facts, "flipped": flipped(texts), "shown": shown_by})
    if len(views) < 2:
        return samples, {}
    pairs = list(zip(*(view.answers for view in views), strict=True))
    same = sum(not flipped(pair) for pair in pairs)
    return samples, {"models": [view.name for view in views], "questions": len(pairs), "same": same}


def agreement_text(agreement: dict[str, Any]) -> str:
    """How many answers of two models are the same, as a sentence; "" for one model."""
    if not agreement:
        return ""
    one, other = agreement["models"]
    return f"{one} and {other} give the same answer to {agreement['same']} of {agreement['questions']} questions."


def facts_of(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What was analysed, for the page."""
    model = result["model"]
    rows = [
        ("model", f"{model['path']} ({model['layout']}, {model['language_model']}, {model['layers']} layers)"),
        ("weights and files", f"sha256 {model['sha256'][:16]}"),
        ("front end", f"{model['front_end']}{'' if model['preset'] is None else ', preset ' + str(model['preset'])}"),
        ("reduction", model["reduction"] or "none"),
        ("skip", "dense" if model["skip"] is None else ", ".join(f"{k} {v}" for k, v in model["skip"].items())),
        ("data", "; ".join(f"{entry['name']} (sha256 {entry['sha256'][:12]})" for entry in result["data"])),
        ("samples", str(result["samples"])),
        ("computed in", f"{result['numerics']['dtype']} on {result['numerics']['device']}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in result["versions"].items())),
    ]
    return [(name, str(value)) for name, value in rows]


def write_outputs(result: dict[str, Any], samples: Sequence[dict[str, Any]], folder: Path) -> list[Section]:
    """Draw the charts and write results.json, tables.md and index.html; the sections of the page."""
    sections = []
    for name, own in result["parts"].items():
        part = PARTS[name]
        shows = part.draw(own, folder), part.table(own), part.notes(own)
        sections.append(Section(name, part.TITLE, part.DEFINITIONS, *shows))
    write_json(folder / "results.json", {**result, "shown": samples})
    facts, title = facts_of(result), result["model"]["name"]
    write_tables(folder, title, facts, sections)
    write_page(folder, title, facts, sections, samples, agreement_text(result["agreement"]))
    return sections


def analyse(
    sources: Sequence[str], models: Models, data: Data, choices: Choices, folder: Path
) -> tuple[dict[str, Any], list[Section]]:
    """Measure the first model, compare it with the second if there are two, and write everything.

    One model is in memory at a time.
    """
    views = []
    for source in sources[1:]:
        other = models.load(source, other=True)
        answers = answers_of(other, data.questions, choices.batch_size)
        views.append(view_of(other, answers, list(encode(data.questions, other.processor))))
        del other
    analysed = models.load(sources[0])
    answers = answers_of(analysed, data.questions, choices.batch_size)
    samples = list(encode(data.questions, analysed.processor, answers))
    result = {
        "model": analysed.describe(),
        "data": data.facts,
        "samples": len(data.questions),
        "ids": [question.id for question in data.questions],
        "numerics": models.numerics.__dict__,
        "batch_size": choices.batch_size,
        "versions": versions("torch", "transformers", "llava_skip"),
        "parts": measure_parts(analysed, samples, choices),
    }
    shown_samples: list[dict[str, Any]] = []
    agreement: dict[str, Any] = {}
    if SAMPLES in choices.parts:
        own = view_of(analysed, answers, samples)
        with writing(folder):
            shown_samples, agreement = show_samples([own, *views], data.questions, choices.pictures, folder)
    with writing(folder):
        result["agreement"] = agreement
        return result, write_outputs(result, shown_samples, folder)


def run(
    checkpoint: Annotated[str, typer.Argument(help="Folder or hub name of a model, of any layout.")],
    data: Annotated[Path | None, typer.Option(help="Benchmark file, or a training file in LLaVA's JSON.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of its image files.")] = None,
    benchmark: Annotated[
        str | None, typer.Option(help="Benchmark(s) that the questions are from; all embedded ones by default.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Questions, spread evenly over the data.")] = 48,
    batch_size: Annotated[int, typer.Option(help="Samples at once.")] = 8,
    compare: Annotated[str | None, typer.Option(help="Another model, whose answers are shown beside.")] = None,
    parts: Annotated[str, typer.Option(help=f"What to do: {', '.join([*PARTS, SAMPLES])}, or all.")] = "all",
    pictures: Annotated[int, typer.Option(help="Questions that are shown with pictures.")] = 12,
    would_be: Annotated[
        bool, typer.Option("--would-be/--no-would-be", help="What the FFN would add to tokens that skip it.")
    ] = True,
    output: Annotated[Path | None, typer.Option(help="Folder of the page; results/analysis/NAME by default.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="Preset of CHECKPOINT; what it says by default. A dense one can be made to skip.")
    ] = None,
    vision_tower: Annotated[str | None, typer.Option(help="CLIP tower, if the checkpoint does not hold it.")] = None,
    template: Annotated[str | None, typer.Option(help="Conversation template, if it has none.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Number format; bfloat16 on GPUs, else float32.")] = None,
) -> None:
    """Measure by layer what FFN and attention change, what skipping costs, and draw what the model makes of images."""
    names = chosen_parts(parts)
    check_numbers({"--samples": samples, "--batch-size": batch_size, "--pictures": pictures})
    sources = [checkpoint] if compare is None else [checkpoint, compare]
    saved = [check_model(find_folder(source)) for source in sources]
    check_layers(saved[0])
    if compare is not None and SAMPLES not in names:
        raise UserError(f"--compare shows answers side by side: add {SAMPLES} to --parts.")
    folder = output or Path(shown(results() / "analysis" / saved[0].name))
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; give a folder with --output.")
    found = read_questions(benchmark, data, images, samples)
    if not any(question.images for question in found.questions):
        raise UserError("None of the questions has an image: give other data, or more --samples.")
    models = Models(numerics(dtype), preset, vision_tower, template)
    choices = Choices(names, batch_size, pictures, would_be)
    result, sections = analyse(sources, models, found, choices, folder)
    console = output_console()
    for section in sections:
        headings, rows = section.table
        console.print(make_table(section.title, headings, rows, right=len(headings) - 1))
        for note in section.notes:
            print_text(note)
    if result["agreement"]:
        print_text(agreement_text(result["agreement"]))
    print_next(f"open {folder / 'index.html'}; the figures are in results.json and tables.md beside it")


def main() -> None:
    """Run the command line."""
    program(run)


if __name__ == "__main__":
    main()
