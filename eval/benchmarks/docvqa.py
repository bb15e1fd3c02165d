"""DocVQA (task 1): answers that stand in a scanned page, compared by edit distance (ANLS).

Sources: the evaluation script of the Robust Reading Competition, lmms-eval's and VLMEvalKit's tasks.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.benchmark import SHORT_INSTRUCTION
from eval.mean_benchmark import MeanBenchmark
from eval.reading.tables import Row, as_row, read_rows
from eval.sample import Id, Sample, as_list
from eval.scoring.edits import edit_distance
from eval.scoring.pandas_cells import cell_as_text
from llava_skip_base.files import write_json

THRESHOLD = 0.5


class DocVQA(MeanBenchmark):
    """DocVQA as its annotation file, VLMEvalKit's TSV or the Hugging Face parquet."""

    name = "docvqa"
    rules = {"official": "docvqa-anls-0.5", "vlmevalkit": "docvqa/vlmevalkit-2026-05"}
    protocols = ("llava", "lmms-eval")
    max_new_tokens = 128
    limits = {"lmms-eval": 32}
    embedded = "docvqa/val_v1.0_withQT.json"
    columns = ("question",)
    optional_columns = ("references", "question_types")
    list_columns = frozenset({"references", "question_types"})
    gold = "references"
    id_columns = ("questionid", "question_id", "index", "id")
    answer_columns = ("prediction", "text", "answer")
    submission = "docvqa_answers.json"

    def read(self, data: Path) -> list[Row]:
        """Read a file; of an annotation file its list of questions."""
        rows = read_rows(data)
        listed = next((row.get("prediction") for row in rows if row.get("id") == "data"), None)
        if not isinstance(listed, list):
            return rows
        return [as_row(data, f"question {number}", row) for number, row in enumerate(listed, start=1)]

    def normalise(self, rows: list[Row]) -> list[Row]:
        """Give gold answers and image the same names."""
        return [_normal(row) for row in rows]

    def image_folder(self, data: Path) -> Path:
        """The folder of the annotation file, where its image paths start, or `images`."""
        return data.parent if (data.parent / "documents").is_dir() else super().image_folder(data)

    def prompts(self, samples: Sequence[Sample]) -> list[str]:
        """The question with the short-answer instruction, as lmms-eval and VLMEvalKit ask."""
        return [f"{sample.fields['question']}\n{SHORT_INSTRUCTION}" for sample in samples]

    def value(self, answer: str, fields: Row) -> float:
        """The similarity to the nearest gold answer."""
        golds = [str(reference) for reference in fields["references"]]
        if self.chosen_rule == "vlmevalkit":
            answer, golds = cell_as_text(answer), golds if len(golds) > 1 else [cell_as_text(gold) for gold in golds]
        return similarity(answer, golds)

    def parts(self, fields: Row) -> Sequence[str]:
        """The kinds of the question, in files that have them."""
        return [f"kind/{kind}" for kind in fields.get("question_types") or ()]

    def means(self, samples: Sequence[Sample], values: Mapping[Id, bool | float]) -> dict[str, float]:
        """The mean similarity under its usual name."""
        found = super().means(samples, values)
        return {"ANLS": found.pop("accuracy"), **found}

    def write_submission(self, samples: Sequence[Sample], answers: Mapping[Id, str], path: Path) -> list[str]:
        """Write the file that the Robust Reading Competition takes."""
        write_json(path, [{"questionId": sample.id, "answer": answers[sample.id]} for sample in samples])
        return [f"{path}: {len(samples)} answers for the DocVQA server (task 1)."]


def similarity(answer: str, golds: Sequence[str]) -> float:
    """One minus the smallest share of edits to a gold answer; 0 if that is below the threshold (ANLS).

    Edits are counted without case and with single spaces; the share is of the longer text as it was given.
    """
    result = 1 - min(_share_of_edits(answer, gold) for gold in golds)
    return result if result >= THRESHOLD else 0.0


def _share_of_edits(answer: str, gold: str) -> float:
    longest = max(len(gold.upper()), len(answer.upper()))
    edits = edit_distance(" ".join(gold.lower().split()), " ".join(answer.lower().split()))
    return edits / longest if longest else 0.0


def _normal(row: Row) -> Row:
    answers = next((row[name] for name in ("references", "answers", "answer") if name in row), None)
    kept = {name: cell for name, cell in row.items() if name not in ("answers", "references")}
    image = row.get("image")
    if isinstance(image, str) and image.endswith((".png", ".jpg")):
        kept = {**{name: cell for name, cell in kept.items() if name != "image"}, "image_path": image}
    kinds = {"question_types": as_list(row["question_types"])} if "question_types" in row else {}
    return {**kept, **kinds, **({} if answers is None else {"references": as_list(answers)})}
