"""HallusionBench: yes/no questions about figures, asked again about edited figures and without any.

Sources: tianyi-lab/HallusionBench (`HallusionBench.json`, `utils.py`), lmms-eval's task, and VLMEvalKit
`image_yorn.py` and `yorn.py`; the wording of the question to the judge is our own.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.benchmark import Benchmark
from eval.errors import JudgeUnavailable
from eval.reading.images import ImageSource, row_images
from eval.reading.tables import Row
from eval.sample import Id, Sample, Score
from eval.scoring.judge import Judge, digest, read_replies, save_replies
from eval.scoring.vqa import yes_or_no

PLACE = ("category", "l2_category", "set_id", "figure_id", "question_id")
"""The columns that name a question; its id has them in this order."""
MAX_TOKENS = 16
INSTRUCTION = (
    "You check an answer to a question against a reference. Write 'correct' if the answer agrees with the reference, "
    "'incorrect' if it contradicts the reference, or 'unclear' if it does not say."
)
Verdicts = Mapping[Id, bool]


class HallusionBench(Benchmark):
    """HallusionBench as its own json, VLMEvalKit's TSV or the Hugging Face parquet."""

    name = "hallusionbench"
    rules = {
        "vlmevalkit": "hallusionbench/vlmevalkit-2026-05",
        "contains-yes": "hallusionbench/contains-yes",
        "official": "hallusionbench-official",
    }
    protocols = ("official",)
    max_new_tokens = 128
    embedded = "hallusionbench/HallusionBench.json"
    columns = ("question", "answer", *PLACE)
    public_names = {"answer": "gt_answer (or answer)", "l2_category": "subcategory (or l2-category)"}
    id_columns = ("index",)
    answer_columns = ("prediction", "model_prediction", "text")

    def normalise(self, rows: list[Row]) -> list[Row]:
        """One set of columns, and ids of category, kind, set, figure and question; by the official rule all questions.

        The other rules leave the questions without a figure out, as VLMEvalKit's file and lmms-eval's split do.
        """
        rows = [_normal(row) for row in rows]
        shown = [row for row in rows if row.get("visual_input") != "0"]
        return rows if self.chosen_rule == "official" or not shown else shown

    def find_images(self, rows: list[Row], folder: Path) -> list[tuple[ImageSource, ...]]:
        """The figure of each question that has one."""
        found = iter(row_images([row for row in rows if row.get("visual_input") != "0"], folder))
        return [() if row.get("visual_input") == "0" else (next(found),) for row in rows]

    def image_folder(self, data: Path) -> Path:
        """hallusion_bench, as the release names it, or `images`."""
        folder = data.parent / "hallusion_bench"
        return folder if folder.is_dir() else super().image_folder(data)

    def prompts(self, samples: Sequence[Sample]) -> list[str]:
        """The bare question."""
        return [sample.fields["question"] for sample in samples]

    def predictions(self, rows: Sequence[Row], source: str, samples: Sequence[Sample]) -> dict[Id, str]:
        """Read the answers by the id that `normalise` makes, or that VLMEvalKit writes before it."""
        named = [_normal({"index": row.get("id", ""), **row}) for row in rows]
        return super().predictions(named, source, samples)

    def score(self, samples: Sequence[Sample], answers: Mapping[Id, str], judge: Judge | None = None) -> Score:
        """Accuracy over questions (aAcc), figures (fAcc) and questions over all their figures (qAcc)."""
        counts: dict[str, Any] = {
            "questions": len(samples),
            "without_figure": sum(s.fields.get("visual_input") == "0" for s in samples),
            "empty": sum(not answers[s.id].strip() for s in samples),
        }
        if self.chosen_rule == "official":
            return self._judged(samples, answers, judge, counts)
        said = {s.id: self._read(answers[s.id]) for s in samples}
        right = {s.id: said[s.id] == s.fields["answer"].lower() for s in samples}
        counts["unreadable"] = sum(answer is None for answer in said.values())
        notes = ["questions without a figure are left out, as VLMEvalKit and lmms-eval do."]
        if counts["unreadable"]:
            notes.append(f"{counts['unreadable']} answers are neither yes nor no by the rule and count as wrong.")
        return self._scored(samples, right, counts, notes)

    def reading(self, answer: str, fields: Row) -> str:
        """Yes or no, else the answer's words."""
        return self._read(answer) or super().reading(answer, fields)

    def _read(self, answer: str) -> str | None:
        if self.chosen_rule == "contains-yes":
            return "yes" if "yes" in answer.lower() else "no"
        return yes_or_no(answer)

    def _scored(self, samples: Sequence[Sample], right: Verdicts, counts: dict[str, Any], notes: list[str]) -> Score:
        # VLMEvalKit leaves the category out of its keys, so the sets of equal number and kind of both count as one.
        lead = PLACE[1:3] if self.chosen_rule == "vlmevalkit" else PLACE[:3]
        scores: dict[str, Any] = _accuracies(samples, right, lead)
        scores["average"] = (scores["aAcc"] + scores["fAcc"] + scores["qAcc"]) / 3
        parts: dict[str, list[Sample]] = defaultdict(list)
        for sample in samples:
            for name in PLACE[:2]:
                parts[sample.fields[name]].append(sample)
        scores["parts"] = {name: _accuracies(own, right, lead) for name, own in sorted(parts.items())}
        return Score("scored", self.rule, scores["aAcc"], scores, counts, notes, per_sample=dict(right))

    def _judged(
        self, samples: Sequence[Sample], answers: Mapping[Id, str], judge: Judge | None, counts: dict[str, Any]
    ) -> Score:
        if judge is None:
            note = "the official rule needs a judge (--judge-url); the rule vlmevalkit reads yes and no without one."
            return Score("unscored", self.rule, counts=counts, notes=[note])
        try:
            verdicts = _verdicts(samples, answers, judge)
        except JudgeUnavailable as error:
            notes = [f"judging is incomplete: {error} Run again to go on."]
            return Score("incomplete", self.rule, counts=counts, notes=notes, judge=judge.describe())
        if judge.dry_run:
            note = f"dry run: {judge.sent} answers would be put to the judge, and nothing was sent."
            return Score("unscored", self.rule, counts=counts, notes=[note])
        counts["unclear"] = sum(verdict == "unclear" for verdict in verdicts.values())
        # Without a figure that would be needed, not to know is right.
        fair = {s.id for s in samples if s.fields["category"] == "VS" and s.fields["figure_id"] == "0"}
        right = {
            id_: verdict == "correct" or (verdict == "unclear" and id_ in fair) for id_, verdict in verdicts.items()
        }
        score = self._scored(samples, right, counts, [])
        score.judge = judge.describe()
        return score


def judge_prompt(fields: Row, answer: str) -> str:
    """The question to the judge about one answer."""
    reference = fields.get("gt_answer_details") or fields["answer"]
    return f"{INSTRUCTION}\n\nQuestion: {fields['question']}\nReference: {reference}\nAnswer: {answer}\nVerdict: "


def verdict(reply: str) -> str:
    """What the judge said, as the official script reads it."""
    text = reply.lower()
    return next((word for word in ("incorrect", "correct") if word in text), "unclear")


def _verdicts(samples: Sequence[Sample], answers: Mapping[Id, str], judge: Judge) -> dict[Id, str]:
    """The verdict on each answer; replies are saved one by one and not asked for again."""
    prompts = {s.id: judge_prompt(s.fields, answers[s.id]) for s in samples}
    path = judge.file("verdicts")
    replies = read_replies(path, {str(id_): prompt for id_, prompt in prompts.items()}, reply=str)
    left = [s.id for s in samples if str(s.id) not in replies]
    for id_, reply in judge.map(lambda id_: judge.ask(prompts[id_], 0.0, MAX_TOKENS), left):
        replies[str(id_)] = {"asked": digest(prompts[id_]), "reply": reply}
        save_replies(path, replies)
    return {s.id: verdict(replies[str(s.id)]["reply"]) for s in samples if str(s.id) in replies}


def _accuracies(samples: Sequence[Sample], right: Verdicts, lead: Sequence[str]) -> dict[str, float]:
    """The three accuracies in percent; sets are told apart by the columns `lead`."""
    figures: dict[tuple[str, ...], list[bool]] = defaultdict(list)
    questions: dict[tuple[str, ...], list[bool]] = defaultdict(list)
    for sample in samples:
        group = tuple(sample.fields[name] for name in lead)
        if sample.fields.get("visual_input") != "0":
            figures[(*group, sample.fields["figure_id"])].append(right[sample.id])
        questions[(*group, sample.fields["question_id"])].append(right[sample.id])
    return {
        "aAcc": _percent([right[s.id] for s in samples]),
        "fAcc": _percent([all(own) for own in figures.values()]),
        "qAcc": _percent([all(own) for own in questions.values()]),
    }


def _percent(right: Sequence[bool]) -> float:
    return 100 * sum(right) / len(right) if right else 0.0


def _normal(row: Row) -> Row:
    named = {"l2_category": row["subcategory"]} if "subcategory" in row else {}
    if "gt_answer" in row:
        named["answer"] = {"1": "Yes", "0": "No"}.get(str(row["gt_answer"]), str(row["gt_answer"]))
    # VLMEvalKit's ids are those of `PLACE` with a word before.
    parts = str(row.get("index", "")).split("_")[-len(PLACE) :]
    from_id = dict(zip(PLACE, parts, strict=True)) if len(parts) == len(PLACE) else {}
    kept = {name: cell for name, cell in row.items() if name not in ("subcategory", "gt_answer", "filename")}
    found = {**from_id, **kept, **named}
    if all(isinstance(found.get(name), str) and found[name] for name in PLACE):
        found["index"] = "_".join(found[name] for name in PLACE)
    filename = str(row.get("filename") or "")
    path = filename.removeprefix("./").removeprefix("hallusion_bench/")
    return {**found, "image_path": path} if path and "image" not in row else found
