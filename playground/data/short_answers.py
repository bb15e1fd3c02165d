"""The public file formats of benchmarks with short answers: POPE, MME, GQA, TextVQA, OCRBench, MathVista and MMMU.

Sources: VLMEvalKit's TSV files of POPE, MME and MMMU, GQA's testdev_balanced_questions.json, TextVQA_0.5.1_val.json,
echo840's OCRBench.json, lupantech/MathVista's testmini.json with the prompts of its query.json.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any

from llava_skip_base.files import write_bytes

from .formats import base64_png, draw_questions, write_indented, write_tsv
from .questions import SHORT_INSTRUCTION, Question, pick, scene_questions
from .scenes import Pool, Scene, random_scene

POPE_SPLITS = ("adversarial", "popular", "random")
POPE_QUESTIONS = 40
"""In each split, half of them answered with yes."""
MME_IMAGES = 30
MME_INSTRUCTION = " Please answer yes or no."
GQA_COUNTS = {"which": 40, "presence": 30, "larger": 30}
GQA_TYPES = {
    "which": {"structural": "query", "semantic": "attr"},
    "presence": {"structural": "verify", "semantic": "obj"},
    "larger": {"structural": "compare", "semantic": "attr"},
}
TEXTVQA_COUNTS = {"which": 60}
ANNOTATORS = 10
OCRBENCH_COUNTS = {"which": 60}
MATHVISTA_COUNTS = {"count": 30, "which": 30}
MMMU_COUNTS = {"count": 30, "which": 30}

POPE_COLUMNS = "index question answer category image_source image".split()
MME_COLUMNS = "index question answer category image_path image".split()
MMMU_COLUMNS = "index id question answer category l2-category question_type split image".split()


def write_pope(path: Path, pool: Pool, rng: Random) -> int:
    """Write POPE's TSV, presence questions in three splits; return the number of questions."""
    rows = []
    for number in range(POPE_QUESTIONS * len(POPE_SPLITS)):
        answer, split = ("yes", "no")[number % 2], POPE_SPLITS[number // POPE_QUESTIONS]
        scene, (question,) = _draw_presence(pool, rng, (answer,))
        row = {"index": number, "question": question.text, "answer": answer, "category": split}
        rows.append(row | {"image_source": f"{number:012d}", "image": base64_png(scene)})
    write_tsv(path, POPE_COLUMNS, rows)
    return len(rows)


def write_mme(path: Path, pool: Pool, rng: Random) -> int:
    """Write MME's TSV, for each image a question answered with Yes and one with No; return the number of questions."""
    rows: list[dict[str, object]] = []
    for number in range(MME_IMAGES):
        scene, questions = _draw_presence(pool, rng, ("yes", "no"))
        place = {"category": "existence", "image_path": f"existence/{number:06d}.png", "image": base64_png(scene)}
        for question in questions:
            asked = {"question": question.text + MME_INSTRUCTION, "answer": question.answer.capitalize()}
            rows.append({"index": len(rows), **asked, **place})
    write_tsv(path, MME_COLUMNS, rows)
    return len(rows)


def write_gqa(path: Path, pool: Pool, rng: Random) -> int:
    """Write GQA's question file and its images in `images`; return the number of questions."""
    questions = {}
    for number, (scene, question) in enumerate(draw_questions(GQA_COUNTS, pool, rng)):
        image = f"n{number:06d}"
        write_jpeg(path.parent / "images" / f"{image}.jpg", scene)
        questions[f"{number:09d}"] = {
            "imageId": image,
            "question": question.text,
            "answer": question.answer,
            "fullAnswer": question.answer,
            "isBalanced": True,
            "types": GQA_TYPES[question.kind],
        }
    write_indented(path, questions)
    return len(questions)


def write_textvqa(path: Path, pool: Pool, rng: Random) -> int:
    """Write TextVQA's annotation file and its images in `images`; return the number of questions."""
    data: list[dict[str, Any]] = []
    for number, (scene, question) in enumerate(draw_questions(TEXTVQA_COUNTS, pool, rng)):
        image = f"{rng.getrandbits(64):016x}"
        write_jpeg(path.parent / "images" / f"{image}.jpg", scene)
        side = scene.draw().width
        data.append(
            {
                "question": question.text,
                "image_id": image,
                "image_classes": ["digit"],
                "image_width": side,
                "image_height": side,
                "question_id": number,
                "answers": [question.answer] * ANNOTATORS,
                "set_name": "val",
            }
        )
    write_indented(path, {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": data})
    return len(data)


def write_ocrbench(path: Path, pool: Pool, rng: Random) -> int:
    """Write OCRBench.json and its images in `OCRBench_Images`; return the number of questions."""
    kinds = cycle(("Digit String Recognition", "Handwriting Recognition"))
    items = []
    for number, (scene, question) in enumerate(draw_questions(OCRBENCH_COUNTS, pool, rng)):
        name = f"digits/{number}.png"
        write_bytes(path.parent / "OCRBench_Images" / name, scene.png())
        asked = {"question": question.text, "answers": [question.answer], "type": next(kinds)}
        items.append({"dataset_name": "digits", "id": number, "image_path": name, **asked})
    write_indented(path, items)
    return len(items)


def write_mathvista(folder: Path, pool: Pool, rng: Random) -> int:
    """Write testmini.json, query.json with the prompts, and the images; return the number of questions."""
    problems, queries = {}, {}
    for number, (scene, question) in enumerate(draw_questions(MATHVISTA_COUNTS, pool, rng), start=1):
        write_bytes(folder / "images" / f"{number}.png", scene.png())
        problems[str(number)] = _mathvista_problem(number, question)
        queries[str(number)] = question.text + SHORT_INSTRUCTION
    write_indented(folder / "testmini.json", problems)
    write_indented(folder / "query.json", queries)
    return len(problems)


def write_mmmu(path: Path, pool: Pool, rng: Random) -> int:
    """Write MMMU's TSV, only open questions (its layout of options is not trained); return how many."""
    rows: list[dict[str, object]] = []
    for number, (scene, question) in enumerate(draw_questions(MMMU_COUNTS, pool, rng)):
        row = {"index": number, "id": f"validation_Math_{number + 1}", "category": "Math", "l2-category": "Science"}
        row |= {"question": question.text, "answer": question.answer, "question_type": "open", "split": "validation"}
        rows.append(row | {"image": base64_png(scene)})
    write_tsv(path, MMMU_COLUMNS, rows)
    return len(rows)


def _mathvista_problem(number: int, question: Question) -> dict[str, Any]:
    skill = "numeric commonsense" if question.kind == "count" else "visual recognition"
    return {
        "question": question.text,
        "image": f"images/{number}.png",
        "choices": None,
        "unit": None,
        "precision": None,
        "answer": question.answer,
        "question_type": "free_form",
        "answer_type": "integer",
        "pid": str(number),
        "metadata": {
            "split": "testmini",
            "language": "english",
            "source": "digits",
            "category": "general-vqa",
            "task": "visual question answering",
            "context": "synthetic scene",
            "grade": "elementary school",
            "skills": [skill],
        },
    }


def _draw_presence(pool: Pool, rng: Random, answers: tuple[str, ...]) -> tuple[Scene, list[Question]]:
    """Draw a scene that has a presence question with each of the answers, and those questions."""
    for scene in _scenes(pool, rng):
        asked = [question for question in scene_questions(scene) if question.kind == "presence"]
        if {question.answer for question in asked} >= set(answers):
            return scene, [pick([q for q in asked if q.answer == answer], rng) for answer in answers]
    raise AssertionError("scenes never end")


def _scenes(pool: Pool, rng: Random) -> Iterator[Scene]:
    while True:
        yield random_scene(pool, rng)


def write_jpeg(path: Path, scene: Scene) -> None:
    """Write a JPEG, as the images of the format are, with almost no loss."""
    buffer = io.BytesIO()
    scene.draw().save(buffer, "JPEG", quality=98)
    write_bytes(path, buffer.getvalue())
