"""GQA (testdev_balanced): one-word answers, right if they are the gold answer."""

import string
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.benchmark import SHORT_INSTRUCTION, Benchmark
from eval.reading.tables import Row, read_rows
from eval.sample import Id, Sample, Score
from eval.scoring.judge import Judge
from eval.scoring.pandas_cells import cell_as_text
from llava_skip_base.errors import UserError, first_few
from llava_skip_base.files import parse_json, write_json

QUESTIONS = "testdev_balanced_questions.json"
_NO_MARKS = str.maketrans("", "", string.punctuation)


class GQA(Benchmark):
    """GQA as its question file (or LLaVA's folder around it), VLMEvalKit's TSV or the Hugging Face parquet."""

    name = "gqa"
    rules = {
        "official": "gqa-official",
        "vlmevalkit": "gqa/vlmevalkit-2026-08",
        "lmms-eval": "gqa/lmms-eval-2026-08",
    }
    max_new_tokens = 128
    embedded = "gqa.json"
    columns = ("question", "answer")
    id_columns = ("index", "question_id", "questionid", "id")
    submission = "testdev_balanced_predictions.json"

    def read(self, data: Path) -> list[Row]:
        """Read a file, or the question file in a folder."""
        if not data.is_dir():
            return read_rows(data)
        found = sorted(data.rglob(QUESTIONS))
        if not found:
            raise UserError(f"{data}: holds no {QUESTIONS}; give the folder that has it, or a question file.")
        return read_rows(found[0])

    def normalise(self, rows: list[Row]) -> list[Row]:
        """Add the image file of each question."""
        return [{"image_path": f"{row['imageid']}.jpg", **row} if row.get("imageid") else row for row in rows]

    def prompts(self, samples: Sequence[Sample]) -> list[str]:
        """LLaVA's prompts."""
        return [f"{sample.fields['question']}\n{SHORT_INSTRUCTION}" for sample in samples]

    def score(self, samples: Sequence[Sample], answers: Mapping[Id, str], judge: Judge | None = None) -> Score:
        """Score the balanced questions by exact match, overall and by the kinds that the file names."""
        lacking = [s.id for s in samples if not s.fields["answer"].strip()]  # "none" is an answer
        if lacking:
            raise UserError(
                f"{first_few(lacking)} of {len(samples)} questions have no gold answer; give a split that has."
            )
        balanced = [s for s in samples if s.fields.get("isbalanced", "True") in ("True", "")]
        if not balanced:
            raise UserError(f"none of the {len(samples)} questions is of the balanced set; give testdev_balanced.")
        hit = {s.id: self._is_right(answers[s.id], s.fields["answer"]) for s in balanced}
        right: dict[str, list[bool]] = defaultdict(list)
        for sample in balanced:
            for part in ("accuracy", *_parts(sample.fields)):
                right[part].append(hit[sample.id])
        scores = {
            part: 100 * sum(hits) / len(hits) for part, hits in sorted(right.items(), key=lambda item: "/" in item[0])
        }
        counts = {
            "questions": len(samples),
            "hits": sum(right["accuracy"]),
            "not_balanced": len(samples) - len(balanced),
            "empty": sum(not answers[s.id].strip() for s in samples),
        }
        notes = []
        if counts["not_balanced"]:
            notes.append(f"{counts['not_balanced']} questions are not of the balanced set and are left out.")
        return Score("scored", self.rule, scores["accuracy"], scores, counts, notes, per_sample=dict(hit))

    def write_submission(self, samples: Sequence[Sample], answers: Mapping[Id, str], path: Path) -> list[str]:
        """Write the file that GQA's own evaluator reads (LLaVA's `convert_gqa_for_eval.py`)."""
        ids = [next(str(s.fields[name]) for name in self.id_columns if name in s.fields) for s in samples]
        texts = [official_form(answers[s.id]) for s in samples]
        write_json(path, [{"questionId": id_, "prediction": text} for id_, text in zip(ids, texts, strict=True)])
        return [f"{path}: {len(samples)} answers for GQA's evaluator."]

    def _is_right(self, prediction: str, gold: str) -> bool:
        if self.chosen_rule == "vlmevalkit":
            return cell_as_text(prediction).strip().lower() == cell_as_text(gold).strip().lower()
        if self.chosen_rule == "lmms-eval":
            return prediction.strip().lower().translate(_NO_MARKS) == gold.lower().translate(_NO_MARKS)
        return official_form(prediction) == gold


def official_form(text: str) -> str:
    """An answer as LLaVA gives it to GQA's evaluator: no trailing periods, lower case."""
    return text.rstrip(".").lower()


def _parts(fields: Row) -> list[str]:
    kinds: Any = fields.get("types", {})
    if isinstance(kinds, str):
        try:
            kinds = parse_json(kinds.replace("'", '"'))
        except ValueError:
            kinds = {}
    if not isinstance(kinds, dict) or not kinds.get("structural"):
        return []
    answer = "open" if kinds["structural"] == "query" else "binary"
    return [answer, *(f"{name}/{kinds[name]}" for name in ("structural", "semantic") if kinds.get(name))]
