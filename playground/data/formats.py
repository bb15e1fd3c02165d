"""The public file formats: LLaVA's conversation JSON, MMBench's and MMStar's TSV, MM-Vet's JSON.

Sources: haotian-liu/LLaVA (docs/Finetune_Custom_Data.md), open-compass/MMBench (mmbench_dev_20230712.tsv),
MMStar-Benchmark/MMStar (mmstar.tsv), yuweihao/MM-Vet (mm-vet.json).
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from llava_skip_base.files import write_bytes, write_text

from .questions import SHORT_INSTRUCTION, Choice, Question, make_choice, number_questions, pick, scene_questions
from .scenes import Pool, Scene, random_scene, varied

TEXT_ONLY_SHARE = 0.05
CIRCULAR_STEP = 1_000_000

READING_SHARE = 0.5

# The text of a question in a training record; the two multiple-choice layouts are those of the benchmarks.
LAYOUTS: dict[str, Callable[[Question, Random], tuple[str, str]]] = {
    "open": lambda question, rng: (question.text, question.answer),
    "short": lambda question, rng: (question.text + SHORT_INSTRUCTION, question.answer),
    "mmbench": lambda question, rng: _mmbench_turn(make_choice(question, rng)),
    "mmstar": lambda question, rng: _mmstar_turn(make_choice(question, rng)),
}
MIXED_LAYOUTS = ("open", "mmbench", "mmstar")
READING_LAYOUTS = ("open", "open", "short", "mmbench", "mmstar")

# Kind -> number of questions, and its categories in the benchmark.
MMBENCH_COUNTS = {"which": 60, "presence": 25, "count": 35, "larger": 30}
MMBENCH_CATEGORIES = {
    "which": ("ocr", "finegrained_perception (instance-level)"),
    "presence": ("image_topic", "coarse_perception"),
    "count": ("object_localization", "finegrained_perception (instance-level)"),
    "larger": ("attribute_comparison", "finegrained_perception (cross-instance)"),
}
# Questions with two or three options are few enough to keep the chance level below 30%.
MMSTAR_COUNTS = {"which": 190, "presence": 40, "count": 110, "larger": 60}
MMSTAR_CATEGORIES = {
    "which": ("fine-grained perception", "recognition"),
    "presence": ("coarse perception", "image scene and topic"),
    "count": ("fine-grained perception", "object counting"),
    "larger": ("instance reasoning", "cross-instance attribute reasoning"),
}
MMVET_COUNTS = {"which": 18, "presence": 11, "count": 11, "larger": 11, "list": 9}
MMVET_CAPABILITIES = {
    "which": ["ocr", "spat"],
    "presence": ["rec", "spat"],
    "count": ["rec"],
    "larger": ["ocr", "spat", "math"],
    "list": ["ocr"],
}

MMBENCH_COLUMNS = "index question hint A B C D answer category image source l2-category comment split".split()
MMSTAR_COLUMNS = "index question image answer category l2_category bench".split()


def training_records(
    pool: Pool, images: int, rng: Random, poses: float = 1.0
) -> Iterator[tuple[dict[str, Any], Scene | None]]:
    """LLaVA conversation records with the scene of each; about 5% are text-only and have none."""
    text_only = round(images * TEXT_ONLY_SHARE / (1 - TEXT_ONLY_SHARE))
    have_image = [True] * images + [False] * text_only
    rng.shuffle(have_image)
    image_number = 0
    for number, with_image in enumerate(have_image, start=1):
        record: dict[str, Any] = {"id": f"digits-{number:06d}"}
        scene = varied(random_scene(pool, rng), rng, poses) if with_image else None
        turns = _turns(scene_questions(scene) if scene else number_questions(), rng)
        if scene:
            image_number += 1
            record["image"] = f"train/{image_number:06d}.png"
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
        record["conversations"] = turns
        yield record, scene


def caption_record(record: dict[str, Any], scene: Scene) -> dict[str, Any]:
    """The record of the same image for stage 1: one turn, and a caption that lists its digits."""
    listed = next(question for question in scene_questions(scene) if question.kind == "list")
    turns = [{"from": "human", "value": "<image>\nDescribe the picture."}, {"from": "gpt", "value": listed.answer}]
    return {"id": record["id"], "image": record["image"], "conversations": turns}


def write_mmbench(path: Path, pool: Pool, rng: Random) -> int:
    """Write an MMBench TSV in the legacy column order, every circular pass as a row; return the number of rows."""
    groups = draw_choices(MMBENCH_COUNTS, pool, rng)
    rows = []
    for circular_pass in range(4):
        for index, (scene, choice) in enumerate(groups):
            if circular_pass < len(choice.options):
                rows.append(_mmbench_row(index, scene, choice, circular_pass))
    write_tsv(path, MMBENCH_COLUMNS, rows)
    return len(rows)


def write_mmstar(path: Path, pool: Pool, rng: Random) -> int:
    """Write an MMStar TSV, whose options are part of the question; return the number of rows."""
    rows = []
    for index, (scene, choice) in enumerate(draw_choices(MMSTAR_COUNTS, pool, rng)):
        category, l2_category = MMSTAR_CATEGORIES[choice.question.kind]
        row = {
            "index": index,
            "question": choice.mmstar_question(),
            "image": base64_png(scene),
            "answer": choice.letter,
        }
        rows.append(row | {"category": category, "l2_category": l2_category, "bench": "digits"})
    write_tsv(path, MMSTAR_COLUMNS, rows)
    return len(rows)


def write_mmvet(folder: Path, pool: Pool, rng: Random) -> int:
    """Write mm-vet.json and its images; return the number of questions."""
    samples = {}
    for number, (scene, question) in enumerate(draw_questions(MMVET_COUNTS, pool, rng)):
        name = f"v1_{number}"
        write_bytes(folder / "images" / f"{name}.png", scene.png())
        samples[name] = {
            "imagename": f"{name}.png",
            "question": question.text,
            "answer": _mmvet_answer(question),
            "capability": MMVET_CAPABILITIES[question.kind],
            "imagesource": "scikit-learn digits",
        }
    write_indented(folder / "mm-vet.json", samples)
    return len(samples)


def write_indented(path: Path, value: object) -> None:
    """Write JSON, indented by one space."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def _mmbench_turn(choice: Choice) -> tuple[str, str]:
    return choice.mmbench_prompt(), choice.mmbench_answer


def _mmstar_turn(choice: Choice) -> tuple[str, str]:
    return choice.mmstar_prompt(), choice.mmstar_answer


def _turns(questions: list[Question], rng: Random) -> list[dict[str, str]]:
    """The turns of a record: questions that read single digits, or questions of all kinds, none twice.

    The record of an image ends with the list of its digits, which teaches most about reading them.
    """
    listing = [question for question in questions if question.kind == "list"]
    reading = [question for question in questions if question.kind == "which"]
    if reading and rng.random() < READING_SHARE:
        plan = [(rng.choice(READING_LAYOUTS), question) for question in rng.sample(reading, len(reading))]
    else:
        plan = []
        left = [question for question in questions if question.kind != "list"]
        for layout in rng.sample([*MIXED_LAYOUTS, rng.choice(MIXED_LAYOUTS[1:])], len(MIXED_LAYOUTS) + 1):
            plan.append((layout, pick(left, rng)))
            left = [question for question in left if question.text != plan[-1][1].text]
    turns = []
    for layout, question in [*plan, *(("open", question) for question in listing)]:
        prompt, answer = LAYOUTS[layout](question, rng)
        turns += [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]
    return turns


def draw_questions(counts: dict[str, int], pool: Pool, rng: Random) -> Iterator[tuple[Scene, Question]]:
    """As many questions of each kind as `counts` says, in random order, each about another scene."""
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    rng.shuffle(kinds)
    for kind in kinds:
        candidates: list[Question] = []
        while not candidates:
            scene = random_scene(pool, rng)
            candidates = [q for q in scene_questions(scene) if q.kind == kind]
        yield scene, pick(candidates, rng)


def draw_choices(counts: dict[str, int], pool: Pool, rng: Random) -> list[tuple[Scene, Choice]]:
    """Multiple choices whose right letters come in turn within each kind, so that no letter is more frequent."""
    drawn: Counter[str] = Counter()
    choices = []
    for scene, question in draw_questions(counts, pool, rng):
        choices.append((scene, make_choice(question, rng, position=drawn[question.kind] % question.size)))
        drawn[question.kind] += 1
    return choices


def _mmbench_row(index: int, scene: Scene, choice: Choice, circular_pass: int) -> dict[str, object]:
    turned = choice.rotated(circular_pass)
    category, l2_category = MMBENCH_CATEGORIES[choice.question.kind]
    row = {
        "index": circular_pass * CIRCULAR_STEP + index,
        "question": choice.question.text,
        "answer": turned.letter,
        "category": category,
        "image": base64_png(scene),
        "source": "digits",
        "l2-category": l2_category,
        "split": "dev",
    }
    return row | dict(zip("ABCD", turned.options, strict=False))


def _mmvet_answer(question: Question) -> str:
    if question.kind == "count":
        return f"{question.answer}<OR>{['one', 'two', 'three', 'four'][int(question.answer) - 1]}"
    return question.answer.replace(", ", "<AND>")


def base64_png(scene: Scene) -> str:
    """The image as it is in a cell of a TSV."""
    return base64.b64encode(scene.png()).decode("ascii")


def write_tsv(path: Path, columns: list[str], rows: Iterable[dict[str, object]]) -> None:
    """Write a TSV; cells that a row lacks stay empty."""
    writer = csv.DictWriter(text := io.StringIO(), columns, delimiter="\t", lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
