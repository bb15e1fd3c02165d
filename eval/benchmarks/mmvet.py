"""MM-Vet (mm-vet.json): open questions, graded 0 to 1 by a language model and averaged by capability.

Structure, scale, worked cases, retries and averages follow the official grader; the wording of its prompt is our own.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.benchmarks.base import Benchmark, Id, Sample, Score
from eval.errors import EvalError, JudgeUnavailable, some
from eval.judge import Judge
from eval.report import write_json
from eval.tables import Row

INSTRUCTION = (
    "Below are questions, each with its ground truth and the prediction of a model. Compare the prediction with the "
    "ground truth and say how correct it is. Where the ground truth holds <AND>, the prediction is totally right only "
    "if it has all of the parts; where it holds <OR>, one part is enough to be totally right. The correctness is "
    "one of 0.0 (totally wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9 or 1.0 (totally right). Only fill in the "
    "last blank."
)
HEADER = ("Question", "Ground truth", "Prediction", "Correctness")
_EQUATION = ("What is x in the equation?", "-1 <AND> -5")
_MEME = (
    "Can you explain this meme?",
    "The meme is about two countries whose names mislead: Iceland, whose name promises ice, is mild and green, while "
    "Greenland, whose name promises green, lies almost wholly under ice. The two countries are shown side by side, and "
    "the caption says that this mix-up is where its author's trust issues began. It is funny because an ordinary fact "
    "of geography is blamed for a lasting personal distrust.",
)
WORKED_CASES = (
    (*_EQUATION, "x = 3", "0.0"),
    (*_EQUATION, "x = -1", "0.5"),
    (*_EQUATION, "x = -5", "0.5"),
    (*_EQUATION, "x = -5 or 5", "0.5"),
    (*_EQUATION, "x = -1 or x = -5", "1.0"),
    (
        *_MEME,
        "The meme plays on the names of Iceland and Greenland: Iceland is in fact green, and Greenland is in fact icy.",
        "0.4",
    ),
    (
        *_MEME,
        "The meme jokes that the names of Iceland and Greenland are the wrong way round: Iceland is lush and Greenland "
        "is a sheet of ice. Its author claims that finding this out gave them trust issues, and the humour lies in "
        "blaming a deep suspicion of everything on two badly chosen names.",
        "1.0",
    ),
)
REASK = "\nPredict the correctness of the answer (digit): "
# The official grader asks once more after these, but never reads that reply.
TEMPERATURES = (0.0, 0.0, 0.5, 1.0, 1.5)
MAX_TOKENS = 3
CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")

Grades = dict[str, dict[str, Any]]


class MMVet(Benchmark):
    """MM-Vet v1: ids v1_0 to v1_217, or any file of its form."""

    name = "mmvet"
    rule = "mmvet-official-grader"
    max_new_tokens = 1024
    embedded = "mm-vet/mm-vet.json"
    columns = ("question", "answer", "capability")

    def row_id(self, row: Row) -> Id:
        """Return the id as ``v1_n``, also where a file says only n (LLaVA's question_id)."""
        id_ = super().row_id(row)
        return f"v1_{id_}" if isinstance(id_, int) else id_

    def protocol(self, samples: Sequence[Sample]) -> str:
        """Name LLaVA's prompt: the bare question."""
        return "llava"

    def prompts(self, samples: Sequence[Sample]) -> list[str]:
        """Return the questions as they are."""
        return [sample.fields["question"] for sample in samples]

    def score(self, samples: Sequence[Sample], answers: Mapping[Id, str], judge: Judge | None = None) -> Score:
        """Let the judge grade every answer, then average; without a judge there is no score."""
        if judge is None:
            note = (
                "no score was computed: MM-Vet answers are graded by a language model; give --judge-url (or "
                "OPENAI_BASE_URL) and --judge-model."
            )
            return Score("unscored", self.rule, counts={"questions": len(samples)}, notes=[note])
        path = grade_file(judge)
        grades = read_grades(path, samples, answers)
        try:
            grade(samples, answers, judge, grades, path)
        except JudgeUnavailable as error:
            done = sum(len(grades.get(str(s.id), {}).get("score", [])) for s in samples)
            counts = {"questions": len(samples), "grades": done, "grades_wanted": len(samples) * judge.runs}
            note = f"grading is incomplete, {done} of {counts['grades_wanted']} grades: {error} Run again to go on."
            return Score("incomplete", self.rule, counts=counts, notes=[note], judge=judge.describe())
        score = self.score_grades(samples, grades)
        score.judge = judge.describe()
        return score

    def score_graded(self, samples: Sequence[Sample], rows: Sequence[Row]) -> Score | None:
        """Average the rows of a grade file; None if they are predictions."""
        if not isinstance(rows[0].get("score"), list):
            return None
        return self.score_grades(samples, {str(self.row_id(row)): row for row in rows})

    def score_grades(self, samples: Sequence[Sample], grades: Mapping[str, Any]) -> Score:
        """Average grades as the official report does.

        Args:
            samples: the questions.
            grades: a grade file: id -> ``{"score": [one for each run], "content": [the judge's replies]}``.

        Raises:
            EvalError: if a question has fewer grades than another, or a grade is not in [0, 1].
        """
        runs = max((len(entry.get("score", [])) for entry in grades.values()), default=0)
        short = [s.id for s in samples if len(grades.get(str(s.id), {}).get("score", [])) != runs]
        if short or not runs:
            raise EvalError(f"{some(short)} of {len(samples)} questions lack grades of {runs} runs; finish grading.")
        table = np.array([grades[str(s.id)]["score"] for s in samples], dtype=float)
        bad = [s.id for s, row in zip(samples, table, strict=True) if not ((row >= 0) & (row <= 1)).all()]
        if bad:
            raise EvalError(f"{some(bad)} questions have grades outside [0, 1]; is this a grade file?")
        capabilities = [capability_set(s.fields) for s in samples]
        single = Counter(name for names in capabilities for name in names)
        combined = Counter("_".join(names) for names in capabilities)
        totals = _percent(table, [True] * len(samples))
        summary = {"total": _round(totals.mean()), "std": _round(totals.std()), "runs": np.round(totals, 1).tolist()}
        scores: dict[str, Any] = {
            name: _round(_percent(table, [name in names for names in capabilities]).mean())
            for name, _ in single.most_common()
        }
        combinations = {
            name: _round(_percent(table, ["_".join(names) == name for names in capabilities]).mean())
            for name, _ in combined.most_common()
        }
        counts = {
            "questions": len(samples),
            "runs": runs,
            "unknown": len(grades.keys() - {str(s.id) for s in samples}),
            "replies_without_grade": sum(_unreadable(grades[str(s.id)]) for s in samples),
            "capabilities": dict(single.most_common()),
            "combinations": dict(combined.most_common()),
        }
        scores |= {**summary, "combinations": combinations}
        return Score("scored", self.rule, summary["total"], scores, counts, _notes(counts))


def capability_set(fields: Row) -> tuple[str, ...]:
    """Read the capabilities of a record, a list or comma-joined text, in one fixed order."""
    value = fields["capability"]
    names = value.split(",") if isinstance(value, str) else value
    names = {str(name).strip() for name in names}
    known = [name for name in CAPABILITIES if name in names]
    return (*known, *sorted(names - set(known)))


def grading_prompt(sample: Sample, prediction: str) -> str:
    """Word the question to the judge: instruction, table with worked cases, and the open row.

    Args:
        sample: the question with its ground truth.
        prediction: the answer to grade, put in as it is.
    """
    rows = [HEADER, ("---",) * len(HEADER), *WORKED_CASES]
    table = "\n".join(" | ".join(row) for row in rows)
    truth = sample.fields["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return f"{INSTRUCTION}\n\n{table}\n\n" + " | ".join([sample.fields["question"], truth, prediction, ""])


def parse_grade(reply: str) -> float | None:
    """Read a grade: the text before the first space as a number in [0, 1], or None."""
    try:
        grade = float(reply.split(" ")[0].strip())
    except ValueError:
        return None
    return grade if 0.0 <= grade <= 1.0 else None


def grade_once(sample: Sample, prediction: str, judge: Judge) -> tuple[float, str]:
    """Ask for one grade, again with more temperature while the reply is none, and give 0.0 in the end.

    Args:
        sample: the question.
        prediction: the answer.
        judge: whom to ask.

    Returns:
        The grade and the reply it was read from.

    Raises:
        JudgeUnavailable: if the endpoint fails; that is no grade.
    """
    prompt, reply = grading_prompt(sample, prediction), ""
    for number, temperature in enumerate(TEMPERATURES):
        reply = judge.ask(prompt + (REASK if number else ""), temperature, MAX_TOKENS)
        value = parse_grade(reply)
        if value is not None:
            return value, reply
    return 0.0, reply


def grade(samples: Sequence[Sample], answers: Mapping[Id, str], judge: Judge, grades: Grades, path: Path) -> None:
    """Fill in the grades that are not there yet, saving after each.

    Args:
        samples: the questions.
        answers: text by id.
        judge: whom to ask.
        grades: what has been graded; extended in place.
        path: the grade file.
    """
    for sample in samples:
        new = {"asked": _asked(sample, answers[sample.id]), "model": [], "content": [], "score": []}
        entry = grades.setdefault(str(sample.id), new)
        while len(entry["score"]) < judge.runs:
            value, reply = grade_once(sample, answers[sample.id], judge)
            entry["model"].append(judge.model)
            entry["content"].append(reply)
            entry["score"].append(value)
            write_json(path, grades)


def grade_file(judge: Judge) -> Path:
    """Name the grade file as the official grader does."""
    judge_name = re.sub(r"[^\w.-]+", "-", judge.model)
    return judge.folder / f"{judge.label}_{judge_name}-grade-{judge.runs}runs.json"


def read_grades(path: Path, samples: Sequence[Sample], answers: Mapping[Id, str]) -> Grades:
    """Read what an earlier grading left, after checking that it graded these questions and answers.

    Args:
        path: the grade file, which need not exist.
        samples: the questions.
        answers: text by id.

    Raises:
        EvalError: if it holds grades of other answers.
    """
    grades: Grades = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    graded = [sample for sample in samples if str(sample.id) in grades]
    stale = [s.id for s in graded if grades[str(s.id)].get("asked") != _asked(s, answers[s.id])]
    if stale:
        raise EvalError(f"{path}: its grades of {some(stale)} questions are of other answers; move it away.")
    return grades


def _asked(sample: Sample, prediction: str) -> str:
    return hashlib.sha256(grading_prompt(sample, prediction).encode()).hexdigest()


def _percent(table: np.ndarray, members: Sequence[bool]) -> np.ndarray:
    # Summed in file order, like the official script, so that the last bit before rounding is the same.
    chosen = table[np.array(members)]
    return np.cumsum(chosen, axis=0)[-1] / len(chosen) * 100


def _round(value: float) -> float:
    return float(np.round(value, 1))  # not round(): the official values are NumPy's, which differ on halves


def _unreadable(entry: Mapping[str, Any]) -> int:
    return sum(parse_grade(str(reply)) is None for reply in entry.get("content", []))


def _notes(counts: Mapping[str, Any]) -> list[str]:
    notes = []
    if counts["replies_without_grade"]:
        notes.append(f"{counts['replies_without_grade']} replies of the judge held no grade and count as 0.0.")
    if counts["unknown"]:
        notes.append(f"{counts['unknown']} graded ids are not in the benchmark file and were left out.")
    return notes
