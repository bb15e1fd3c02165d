"""MM-Vet (mm-vet.json): open questions, graded 0 to 1 by a language model and averaged by capability."""

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval.benchmark import Benchmark
from eval.errors import JudgeUnavailable
from eval.reading.tables import Row
from eval.sample import Id, Sample, Score
from eval.scoring.grading import Grades, grade, parse_grade
from eval.scoring.judge import Judge, file_part, read_replies
from llava_skip_base.errors import UserError, first_few
from llava_skip_base.texts import shortened

CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")


class MMVet(Benchmark):
    """MM-Vet v1: ids v1_0 to v1_217, or any file of its form."""

    name = "mmvet"
    rules = {"official": "mmvet-official-grader", "vlmevalkit": "mmvet-official-grader/vlmevalkit-averages"}
    max_new_tokens = 1024
    embedded = "mm-vet/mm-vet.json"
    columns = ("question", "answer", "capability")
    list_columns = frozenset({"capability"})
    takes_judge_prompt = True

    def normalise(self, rows: list[Row]) -> list[Row]:
        """Take VLMEvalKit's `category` for the capabilities."""
        return [row if "capability" in row or "category" not in row else _renamed(row) for row in rows]

    def row_id(self, row: Row) -> Id:
        """The id as `v1_n`, also where a file has only n (LLaVA's question_id, VLMEvalKit's index)."""
        id_ = super().row_id(row)
        return f"v1_{id_}" if isinstance(id_, int) else id_

    def prompts(self, samples: Sequence[Sample]) -> list[str]:
        """The questions as they are."""
        return [sample.fields["question"] for sample in samples]

    def score(self, samples: Sequence[Sample], answers: Mapping[Id, str], judge: Judge | None = None) -> Score:
        """Let the judge grade every answer, then average; without a judge there is no score."""
        counts: dict[str, Any] = {
            "questions": len(samples),
            "empty": sum(not answers[sample.id].strip() for sample in samples),
        }
        if judge is None:
            note = (
                "no score was computed: MM-Vet answers are graded by a language model; give --judge-url (or "
                "OPENAI_BASE_URL) and --judge-model."
            )
            return Score("unscored", self.rule, counts=counts, notes=[note])
        path = judge.file(f"grade-{judge.runs}runs")
        try:
            grades = grade(samples, answers, judge, path)
        except JudgeUnavailable as error:
            counts |= _progress(samples, read_replies(path, {}), judge)
            note = f"grading is incomplete, {counts['grades']} of {counts['grades_wanted']} grades: {error}"
            notes = [f"{note} Run again to go on."]
            return Score("incomplete", self.rule, counts=counts, notes=notes, judge=judge.describe())
        if judge.dry_run:
            note = f"dry run: {judge.sent} answers would be put to the judge, and nothing was sent."
            return Score("unscored", self.rule, counts=counts, notes=[note])
        score = self.score_grades(samples, grades)
        score.counts |= counts
        score.judge = judge.describe()
        return score

    def score_graded(self, samples: Sequence[Sample], rows: Sequence[Row]) -> Score | None:
        """Average the rows of a grade file, or of VLMEvalKit's graded table; None if they are predictions."""
        if "score" not in rows[0]:
            return None
        grades = {}
        for row in rows:
            scores = row.get("score", [])
            grades[str(self.row_id(row))] = {**row, "score": scores if isinstance(scores, list) else [scores]}
        if len(grades) < len(rows):
            raise UserError(f"{len(rows) - len(grades)} graded ids occur more than once; remove the repeated rows.")
        return self.score_grades(samples, grades)

    def score_grades(self, samples: Sequence[Sample], grades: Mapping[str, Any]) -> Score:
        """Average grades as the official script does, or unrounded by the rule "vlmevalkit".

        Args:
            samples: the questions.
            grades: a grade file: id -> `{"score": [one for each run], "content": [the judge's replies]}`.

        Raises:
            UserError: a question has fewer grades than another, or a grade is not in [0, 1].
        """
        by_id = {str(sample.id): sample for sample in samples}
        runs = max((len(entry.get("score", [])) for entry in grades.values()), default=0)
        short = [id_ for id_ in by_id if len(grades.get(id_, {}).get("score", [])) != runs]
        if short or not runs:
            raise UserError(
                f"{first_few(short)} of {len(samples)} questions lack grades of {runs} runs; finish grading."
            )
        # In the order of the grade file, like the official script, so that the last bit before rounding is the same.
        order = [id_ for id_ in grades if id_ in by_id]
        table = np.array([[_grade(id_, value) for value in grades[id_]["score"]] for id_ in order])
        sets = [capability_set(by_id[id_].fields) for id_ in order]
        in_order = [capability_set(sample.fields) for sample in samples]
        single = Counter(name for names in in_order for name in names)
        combined = Counter("_".join(names) for names in in_order)
        totals = _percent(table, [1] * len(order))
        scores: dict[str, Any] = {
            name: self._mean(_percent(table, [self._times(name, names) for names in sets]))
            for name, _ in single.most_common()
        }
        if self.chosen_rule == "official":
            scores |= {"total": self._mean(totals), "std": _round(totals.std()), "runs": np.round(totals, 1).tolist()}
        else:
            scores["Overall"] = self._mean(totals)
        scores["combinations"] = {
            name: self._mean(_percent(table, ["_".join(names) == name for names in sets]))
            for name, _ in combined.most_common()
        }
        if self.chosen_rule == "vlmevalkit":
            scores["combinations"] |= {name: scores[name] for name in combined if name in single}
        counts = {
            "questions": len(samples),
            "runs": runs,
            "unknown": len(grades.keys() - by_id.keys()),
            "replies_without_grade": sum(_unreadable(grades[id_]) for id_ in order),
            "capabilities": dict(single.most_common()),
            "combinations": dict(combined.most_common()),
        }
        per_sample = dict(zip((by_id[id_].id for id_ in order), table.mean(axis=1).tolist(), strict=True))
        return Score("scored", self.rule, self._mean(totals), scores, counts, _notes(counts), per_sample=per_sample)

    def reports(self, score: Score, name: str) -> dict[str, str]:
        """The two CSV reports of the official script, named as it names them."""
        if score.status != "scored" or self.chosen_rule != "official":
            return {}
        runs, values = score.counts["runs"], score.scores
        judged = f"_{file_part(score.judge['model'])}" if score.judge else ""
        model, graded, rest = name.partition("-grade-")  # a grade file's name has the judge and the runs
        tail = rest if graded else f"{runs}runs"
        common = {"total": values["total"], "std": values["std"], "runs": str(values["runs"])}
        parts = {
            "cap-score": {capability: values[capability] for capability in score.counts["capabilities"]},
            "cap-int-score": values["combinations"],
        }
        return {f"{model}{judged}-{kind}-{tail}.csv": _csv(model, {**own, **common}) for kind, own in parts.items()}

    def _times(self, name: str, names: tuple[str, ...]) -> int:
        """How often a question with these capabilities counts for one of them.

        VLMEvalKit sums capabilities and combinations under their names, so a question with a single capability counts
        for it twice.
        """
        return (name in names) + (names == (name,) and self.chosen_rule == "vlmevalkit")

    def _mean(self, values: np.ndarray) -> float:
        return _round(values.mean()) if self.chosen_rule == "official" else float(values.mean())


def capability_set(fields: Row) -> tuple[str, ...]:
    """The capabilities of a question, a list or comma-joined text, in one fixed order."""
    value = fields["capability"]
    names = value.split(",") if isinstance(value, str) else value
    names = {str(name).strip() for name in names}
    known = [name for name in CAPABILITIES if name in names]
    return (*known, *sorted(names - set(known)))


def _csv(model: str, values: Mapping[str, Any]) -> str:
    """One row under a header, the model's name first, as pandas writes it."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([["", *values], [model, *values.values()]])
    return text.getvalue()


def _renamed(row: Row) -> Row:
    return {"capability" if name == "category" else name: cell for name, cell in row.items()}


def _grade(id_: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = -1.0
    if not 0 <= number <= 1:
        raise UserError(
            f"question {shortened(id_)} has the grade {shortened(repr(value))}; expected a number from 0 to 1. "
            "Is this a grade file?"
        )
    return number


def _progress(samples: Sequence[Sample], grades: Grades, judge: Judge) -> dict[str, int]:
    done = sum(len(grades.get(str(s.id), {}).get("score", [])) for s in samples)
    return {"grades": done, "grades_wanted": len(samples) * judge.runs}


def _percent(table: np.ndarray, times: Sequence[int]) -> np.ndarray:
    chosen = np.repeat(table, times, axis=0)
    return np.cumsum(chosen, axis=0)[-1] / len(chosen) * 100


def _round(value: float) -> float:
    return float(np.round(value, 1))  # not round(): the official values are NumPy's, which differ on halves


def _unreadable(entry: Mapping[str, Any]) -> int:
    replies = entry.get("content", [])
    return sum(parse_grade(str(reply)) is None for reply in replies) if isinstance(replies, list) else 0


def _notes(counts: Mapping[str, Any]) -> list[str]:
    notes = []
    if counts["replies_without_grade"]:
        notes.append(f"{counts['replies_without_grade']} replies of the judge held no grade and count as 0.0.")
    if counts["unknown"]:
        notes.append(f"{counts['unknown']} graded ids are not in the benchmark file and were left out.")
    return notes
