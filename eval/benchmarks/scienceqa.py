"""ScienceQA (test): school questions with two to five options; the headline is over those that have an image.

Sources: haotian-liu/LLaVA `model_vqa_science.py` and `eval_science_qa.py`, and the tasks of lmms-eval and VLMEvalKit.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.benchmark import LETTER_INSTRUCTION, is_image
from eval.benchmarks.mmbench import vlmevalkit_prompt
from eval.mean_benchmark import (
    LetterBenchmark,
    given_options,
    lettered_question,
    numbered_letter,
    option_columns,
    vlmevalkit_letter,
)
from eval.reading.images import PLACEHOLDER, ImageSource, row_images
from eval.reading.tables import Row, read_rows
from eval.sample import Id, Sample, Score, as_list, is_missing
from eval.scoring.judge import Judge
from llava_skip_base.errors import UserError, first_few
from llava_skip_base.files import read_json

PROBLEMS = "problems.json"
SPLITS = "pid_splits.json"
QUESTION_FILE = "llava_test_CQM-A.json"
SPLIT = "test"
_LETTERS = "ABCDE"
_STATED = re.compile("The answer is ([A-Z]).")


class ScienceQA(LetterBenchmark):
    """ScienceQA as LLaVA's folder (or its problems.json), VLMEvalKit's TSV or the Hugging Face parquet."""

    name = "scienceqa"
    rules = {
        "official": "scienceqa-llava",
        "vlmevalkit": "scienceqa/vlmevalkit-2026-08",
        "lmms-eval": "scienceqa/lmms-eval-0.7.3",
    }
    protocols = ("llava", "vlmevalkit", "lmms-eval")
    max_new_tokens = 1024
    limits = {"lmms-eval": 16}
    numbers_rows = True
    embedded = "scienceqa"
    columns = ("question", "A", "answer")
    public_names = {"A": "choices (or A, B, ...)"}

    def read(self, data: Path) -> list[Row]:
        """Read a file; of problems.json, or of the folder that has it, the test split with LLaVA's prompts."""
        if not data.is_dir():
            return _read_problems(data) if data.name == PROBLEMS else read_rows(data)
        found = sorted(data.rglob(PROBLEMS))
        if not found:
            raise UserError(f"{data}: holds no {PROBLEMS}; give the folder that has it, or a benchmark file.")
        return _read_problems(found[0])

    def normalise(self, rows: list[Row]) -> list[Row]:
        """Options as columns, the gold answer as a letter, and whether there is an image; ids for files without."""
        shown = any(name in row for row in rows for name in ("image", "image_path", "multimodal"))
        return [_normal(row, shown) for row in self.identified(rows)]

    def find_images(self, rows: list[Row], folder: Path) -> list[tuple[ImageSource, ...]]:
        """The image of each question that has one."""
        found = iter(row_images([row for row in rows if row["multimodal"] == "yes"], folder))
        return [(next(found),) if row["multimodal"] == "yes" else () for row in rows]

    def prompts(self, samples: Sequence[Sample]) -> list[str]:
        """LLaVA's prompts, taken from its question file where the data has it; or VLMEvalKit's."""
        if self.chosen_protocol == "vlmevalkit":
            return [vlmevalkit_prompt(sample.fields) for sample in samples]
        return [llava_prompt(sample.fields, self.chosen_protocol == "llava") for sample in samples]

    def letter(self, answer: str, fields: Row) -> str | None:
        """The letter of an answer by the chosen rule."""
        if self.chosen_rule == "vlmevalkit":
            return vlmevalkit_letter(answer, fields)
        letter = official_letter(answer) if self.chosen_rule == "official" else lmms_eval_letter(answer)
        return letter if letter in given_options(fields) else None

    def parts(self, fields: Row) -> Sequence[str]:
        """The subject."""
        subject = fields.get("subject") or fields.get("category", "")
        return (f"subject/{subject}",) if subject else ()

    def means(self, samples: Sequence[Sample], values: Mapping[Id, bool | float]) -> dict[str, float]:
        """The two numbers that LLaVA prints, then the subjects of the questions with an image."""
        shown = [s for s in samples if s.fields["multimodal"] == "yes"]
        if not shown:
            raise UserError(f"none of the {len(samples)} questions has an image; give the whole file.")
        parts = super().means(shown, values)
        every = super().means(samples, values)
        return {"IMG-Accuracy": parts.pop("accuracy"), "Accuracy": every["accuracy"], **parts}

    def score(self, samples: Sequence[Sample], answers: Mapping[Id, str], judge: Judge | None = None) -> Score:
        """Score all questions; those without an image count in `Accuracy` alone."""
        score = super().score(samples, answers, judge)
        shown = {s.id for s in samples if s.fields["multimodal"] == "yes"}
        score.per_sample = {id_: value for id_, value in score.per_sample.items() if id_ in shown}
        score.counts["with_image"] = len(shown)
        if len(shown) < len(samples):
            score.notes.append(f"the score is over the {len(shown)} questions with an image, as IMG-Accuracy.")
        return score


def official_letter(answer: str) -> str | None:
    """LLaVA's reading: a bare letter, a letter with a period and a space, or one "The answer is X" with a character."""
    if len(answer) == 1 and answer in _LETTERS:
        return answer
    if answer[:1] in tuple(_LETTERS) and answer[1:3] == ". ":
        return answer[0]
    stated = _STATED.findall(answer)
    return stated[0] if len(stated) == 1 else None


def lmms_eval_letter(answer: str) -> str | None:
    """lmms-eval's reading: a bare letter in any case, or a capital letter with a period at the start."""
    answer = answer.strip()
    if len(answer) == 1:
        return answer.upper()
    return answer[0] if answer[:1].isupper() and answer[1] == "." else None


def llava_prompt(fields: Row, from_file: bool = True) -> str:
    """LLaVA's prompt: the context if there is one, the question, the options and the letter instruction."""
    if from_file and fields.get("asked"):
        return f"{fields['asked']}\n{LETTER_INSTRUCTION}"
    hint = fields.get("hint", "")
    return ("" if is_missing(hint) else f"Context: {hint}\n") + lettered_question(fields)


def _read_problems(path: Path) -> list[Row]:
    """The rows of the test split of problems.json, with the texts of LLaVA's question file beside it."""
    rows = {str(row["id"]): row for row in read_rows(path)}
    splits = path.parent / SPLITS
    if splits.is_file():
        named = read_json(splits)
        chosen = named.get(SPLIT) if isinstance(named, dict) else None
        if not isinstance(chosen, list):
            raise UserError(f"{splits}: expected a list of ids under '{SPLIT}'.")
        lacking = [id_ for id_ in map(str, chosen) if id_ not in rows]
        if lacking:
            raise UserError(f"{path}: lacks {first_few(lacking)} of {len(chosen)} questions that {splits.name} names.")
        rows = {id_: rows[id_] for id_ in map(str, chosen)}
    else:
        rows = {id_: row for id_, row in rows.items() if row.get("split", SPLIT) == SPLIT}
    if not rows:
        raise UserError(f"{path}: holds no question of the split '{SPLIT}'.")
    asked = _asked(path.parent / QUESTION_FILE)
    return [{**_with_path(row), "asked": asked.get(id_, "")} for id_, row in rows.items()]


def _with_path(row: Row) -> Row:
    """A row of problems.json, whose image is a file name, with the path below the folder of images."""
    name = row.get("image", "")
    if not isinstance(name, str):
        raise UserError(f"question {row['id']}: its image is no file name.")
    kept = {key: cell for key, cell in row.items() if key != "image"}
    return {**kept, "image_path": f"{row.get('split') or SPLIT}/{row['id']}/{name}" if name else ""}


def _asked(path: Path) -> dict[str, str]:
    """The texts that LLaVA asks, by id, from its question file; none without that file."""
    if not path.is_file():
        return {}
    texts = {}
    for row in read_rows(path):
        turns: Any = row.get("conversations")
        first = turns[0].get("value") if isinstance(turns, list) and turns and isinstance(turns[0], dict) else None
        if not isinstance(first, str):
            raise UserError(f"{path}: question {row.get('id', '?')} has no conversation; give LLaVA's file as it is.")
        texts[str(row.get("id"))] = first.replace(PLACEHOLDER, "").strip()
    return texts


def _normal(row: Row, shown: bool) -> Row:
    listed = option_columns(as_list(row["choices"])) if "choices" in row else {}
    kept = {name: cell for name, cell in row.items() if name != "choices"}
    answer = {"answer": numbered_letter(str(row["answer"]))} if "answer" in row else {}
    has_image = not shown or is_image(row.get("image")) or bool(row.get("image") or row.get("image_path"))
    return {**kept, **listed, **answer, "multimodal": row.get("multimodal") or ("yes" if has_image else "no")}
