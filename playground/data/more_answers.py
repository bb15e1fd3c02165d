"""The public file formats of the benchmarks that work on token reduction reports.

ScienceQA's problems.json and pid_splits.json, SEED-Bench.json, VLMEvalKit's TSV of AI2D, the question and annotation
files of VQAv2, VizWiz's and DocVQA's annotation files, ChartQA's test files, HallusionBench.json.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from llava_skip_base.files import write_bytes

from .formats import base64_png, draw_choices, draw_questions, write_indented, write_tsv
from .questions import Question, pick, scene_questions
from .scenes import CELLS, Pool, Scene, random_scene
from .short_answers import ANNOTATORS, write_jpeg

SCIENCEQA_COUNTS = {"which": 50, "count": 25, "larger": 25}
SEED_COUNTS = {"which": 60, "count": 40}  # four options each, as every question of SEED-Bench has
AI2D_COUNTS = {"which": 50, "count": 25, "larger": 25}
VQAV2_IMAGES = 50
VQAV2_KINDS = ("which", "presence", "larger")
VIZWIZ_COUNTS = {"which": 30, "presence": 20, "larger": 20}
CHARTQA_COUNTS = {"human": {"presence": 20, "larger": 30}, "augmented": {"which": 50}}
DOCVQA_COUNTS = {"which": 50, "list": 50}
HALLUSION_SETS = 30

SEED_TYPES = {"which": ("Text Understanding", 9), "count": ("Instances Counting", 5)}
ANSWER_TYPES = {"which": "number", "presence": "yes/no", "larger": "other"}
DOCVQA_TYPES = {"which": ["handwritten"], "list": ["handwritten", "table/list"]}
AI2D_COLUMNS = "index question A B C D answer category image".split()
VQA_SPLIT = "val2014"


def write_scienceqa(folder: Path, pool: Pool, rng: Random) -> int:
    """Write problems.json, pid_splits.json and the images; return the number of questions."""
    problems = {}
    for number, (scene, choice) in enumerate(draw_choices(SCIENCEQA_COUNTS, pool, rng), start=1):
        write_bytes(folder / "images" / "test" / str(number) / "image.png", scene.png())
        problems[str(number)] = {
            "question": choice.question.text,
            "choices": list(choice.options),
            "answer": choice.options.index(choice.question.answer),
            "hint": "",
            "image": "image.png",
            "task": "closed choice",
            "grade": "grade1",
            "subject": "natural science",
            "topic": "digits",
            "category": choice.question.kind,
            "skill": choice.question.kind,
            "lecture": "",
            "solution": "",
            "split": "test",
        }
    write_indented(folder / "problems.json", problems)
    write_indented(folder / "pid_splits.json", {"test": list(problems)})
    return len(problems)


def write_seed(path: Path, pool: Pool, rng: Random) -> int:
    """Write SEED-Bench.json and its images in SEED-Bench-image; return the number of questions."""
    questions = []
    for number, (scene, choice) in enumerate(draw_choices(SEED_COUNTS, pool, rng)):
        image = f"{number}.png"
        write_bytes(path.parent / "SEED-Bench-image" / image, scene.png())
        options = dict(zip(("choice_a", "choice_b", "choice_c", "choice_d"), choice.options, strict=True))
        row = {"answer": choice.letter, **options, "data_id": image, "data_type": "image"}
        row |= {"question": choice.question.text, "question_id": str(100_000 + number)}
        questions.append(row | {"question_type_id": SEED_TYPES[choice.question.kind][1]})
    write_indented(path, {"question_type": dict(SEED_TYPES.values()), "questions": questions})
    return len(questions)


def write_ai2d(path: Path, pool: Pool, rng: Random) -> int:
    """Write VLMEvalKit's TSV of AI2D; return the number of questions."""
    rows: list[dict[str, object]] = []
    for number, (scene, choice) in enumerate(draw_choices(AI2D_COUNTS, pool, rng)):
        row = {"index": number, "question": choice.question.text, "answer": choice.letter}
        row |= {"category": choice.question.kind, "image": base64_png(scene)}
        rows.append(row | dict(zip("ABCD", choice.options, strict=False)))
    write_tsv(path, AI2D_COLUMNS, rows)
    return len(rows)


def write_vqav2(folder: Path, pool: Pool, rng: Random) -> int:
    """Write the question and annotation files of a split, with two questions for an image; return how many."""
    questions, annotations = [], []
    for image in range(1, VQAV2_IMAGES + 1):
        scene = random_scene(pool, rng)
        write_jpeg(folder / VQA_SPLIT / f"COCO_{VQA_SPLIT}_{image:012d}.jpg", scene)
        left = [question for question in scene_questions(scene) if question.kind in VQAV2_KINDS]
        for number in range(2):
            question = pick(left, rng)
            left = [other for other in left if other != question]
            place = {"image_id": image, "question_id": 1000 * image + number}
            questions.append({**place, "question": question.text})
            annotations.append({**place, **_annotated(question)})
    head = {"data_type": "mscoco", "data_subtype": VQA_SPLIT}
    questions_file = {**head, "task_type": "Open-Ended", "questions": questions}
    write_indented(folder / f"v2_OpenEnded_mscoco_{VQA_SPLIT}_questions.json", questions_file)
    write_indented(folder / f"v2_mscoco_{VQA_SPLIT}_annotations.json", {**head, "annotations": annotations})
    return len(questions)


def write_vizwiz(folder: Path, pool: Pool, rng: Random) -> int:
    """Write VizWiz's val.json and its images in `val`, all answerable; return the number of questions."""
    rows = []
    for number, (scene, question) in enumerate(draw_questions(VIZWIZ_COUNTS, pool, rng)):
        image = f"VizWiz_val_{number:08d}.jpg"
        write_jpeg(folder / "val" / image, scene)
        answers = [{"answer_confidence": "yes", "answer": question.answer}] * ANNOTATORS
        row = {"image": image, "question": question.text, "answers": answers}
        rows.append(row | {"answer_type": ANSWER_TYPES[question.kind], "answerable": 1})
    write_indented(folder / "val.json", rows)
    return len(rows)


def write_chartqa(folder: Path, pool: Pool, rng: Random) -> int:
    """Write ChartQA's two test files and the images in `png`; return the number of questions.

    The chart is a table of handwritten values.
    """
    total = 0
    for split, counts in CHARTQA_COUNTS.items():
        rows = []
        for number, (scene, question) in enumerate(draw_questions(counts, pool, rng)):
            image = f"{split}_{number}.png"
            write_bytes(folder / "png" / image, scene.png())
            rows.append({"imgname": image, "query": question.text, "label": question.answer})
        write_indented(folder / f"test_{split}.json", rows)
        total += len(rows)
    return total


def write_docvqa(folder: Path, pool: Pool, rng: Random) -> int:
    """Write DocVQA's annotation file and the pages in `documents`; return the number of questions."""
    data: list[dict[str, Any]] = []
    for number, (scene, question) in enumerate(draw_questions(DOCVQA_COUNTS, pool, rng), start=1):
        image = f"documents/digits{number:04d}_1.png"
        write_bytes(folder / image, scene.png())
        row: dict[str, Any] = {"questionId": number, "question": question.text}
        row |= {"question_types": DOCVQA_TYPES[question.kind], "image": image, "docId": number}
        data.append(row | {"answers": [question.answer], "data_split": "val"})
    head = {"dataset_name": "DocVQA", "dataset_version": "1.0", "dataset_split": "val"}
    write_indented(folder / "val_v1.0_withQT.json", {**head, "data": data})
    return len(data)


def write_hallusionbench(folder: Path, pool: Pool, rng: Random) -> int:
    """Write HallusionBench.json and its figures, each scene also without one of its digits; return how many questions.

    Both figures of a set are asked about the digit that is gone from the second one, and about another place.
    """
    rows = []
    for number in range(HALLUSION_SETS):
        scene = random_scene(pool, rng)
        while len(scene.digits) == 1:
            scene = random_scene(pool, rng)
        gone = rng.choice(list(scene.digits))
        other = rng.choice([cell for cell in CELLS if cell != gone])
        for figure, shown in enumerate((scene, _without(scene, gone))):
            name = f"VD/figure/{number}_{figure}.png"
            write_bytes(folder / "hallusion_bench" / name, shown.png())
            for question, cell in enumerate((gone, other)):
                row = {"category": "VD", "subcategory": "figure", "visual_input": str(figure + 1)}
                row |= {"set_id": str(number), "figure_id": str(figure), "sample_note": "digits"}
                row |= {"question_id": str(question), "question": f"Is there a digit {cell}?"}
                row["gt_answer_details"] = f"There is {'a' if cell in shown.digits else 'no'} digit {cell}."
                row["gt_answer"] = str(int(cell in shown.digits))
                rows.append(row | {"filename": f"./hallusion_bench/{name}"})
    write_indented(folder / "HallusionBench.json", rows)
    return len(rows)


def _without(scene: Scene, cell: str) -> Scene:
    samples = (sample if place != cell else None for place, sample in zip(CELLS, scene.samples, strict=True))
    return replace(scene, samples=tuple(samples))


def _annotated(question: Question) -> dict[str, Any]:
    return {
        "question_type": " ".join(question.text.split()[:2]).lower(),
        "multiple_choice_answer": question.answer,
        "answers": [
            {"answer": question.answer, "answer_confidence": "yes", "answer_id": number}
            for number in range(1, ANNOTATORS + 1)
        ],
        "answer_type": ANSWER_TYPES[question.kind],
    }
