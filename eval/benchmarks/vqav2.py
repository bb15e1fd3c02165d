"""VQAv2: short answers about COCO images, compared with ten annotators' answers.

Sources: GT-Vision-Lab/VQA (file formats and `vqaEval.py`), haotian-liu/LLaVA (question files and
`convert_vqav2_for_submission.py`), lmms-eval's task.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.benchmark import SHORT_INSTRUCTION
from eval.mean_benchmark import MeanBenchmark
from eval.reading.tables import Row, as_row, read_rows
from eval.sample import Id, Sample, as_list
from eval.scoring.vqa import evaluator_form, evaluator_golds, normalise_answer, plain_form, share_of_annotators
from llava_skip_base.errors import UserError, first_few
from llava_skip_base.files import write_json

QUESTIONS = "_questions.json"
WHOLE_TEST = "llava_vqav2_mscoco_test2015.jsonl"
"""LLaVA's list of all test questions, which the server wants in a file of test-dev answers too."""


class VQAv2(MeanBenchmark):
    """VQAv2 as the official files, LLaVA's question files (without answers) or the Hugging Face parquet."""

    name = "vqav2"
    rules = {"official": "vqav2-official", "llava": "vqav2-official/llava-upload", "lmms-eval": "vqav2/lmms-eval-0.7.3"}
    protocols = ("llava", "lmms-eval")
    max_new_tokens = 128
    limits = {"lmms-eval": 16}
    embedded = "vqav2"
    columns = ("question",)
    optional_columns = ("references", "answer_type")
    list_columns = frozenset({"references"})
    gold = "references"
    id_columns = ("question_id", "index", "id")
    answer_columns = ("prediction", "text", "answer")
    submission = "vqav2_answers.json"

    def __init__(self, rule: str | None = None, protocol: str | None = None) -> None:
        """As for every benchmark."""
        super().__init__(rule, protocol)
        self.whole: list[Any] = []
        """Ids of all questions that the server's file lists, where they are more than the benchmark file's."""

    def read(self, data: Path) -> list[Row]:
        """Read a file; an official question file with its annotations beside it, also from a folder."""
        if data.is_dir():
            found = sorted(data.rglob(f"v2_*{QUESTIONS}"))
            if len(found) != 1:
                raise UserError(
                    f"{data}: holds {first_few([path.name for path in found])} files v2_*{QUESTIONS}; give one file."
                )
            data = found[0]
        whole = data.parent / WHOLE_TEST
        if data.name != WHOLE_TEST and "test-dev" in data.name and whole.is_file():
            self.whole = [self.row_id(row) for row in read_rows(whole)]
        return _read_official(data) if data.name.endswith(QUESTIONS) else read_rows(data)

    def normalise(self, rows: list[Row]) -> list[Row]:
        """Give question, image and the annotators' answers the same names."""
        return [_normal(row) for row in rows]

    def image_folder(self, data: Path) -> Path:
        """The folder of the split as COCO and LLaVA name it, or `images`."""
        folder = data if data.is_dir() else data.parent
        named = [folder / name for name in ("val2014", "test2015", "train2014")]
        named = [path for path in named if path.is_dir()]
        return named[0] if len(named) == 1 else super().image_folder(data)

    def prompts(self, samples: Sequence[Sample]) -> list[str]:
        """The question and the short-answer instruction; lmms-eval's text is the same."""
        return [f"{sample.fields['question']}\n{SHORT_INSTRUCTION}" for sample in samples]

    def value(self, answer: str, fields: Row) -> float:
        """The soft accuracy of an answer by the chosen rule."""
        golds = [str(reference) for reference in fields["references"]]
        if self.chosen_rule == "lmms-eval":
            return share_of_annotators(plain_form(answer), [plain_form(gold) for gold in golds])
        sent = normalise_answer(answer) if self.chosen_rule == "llava" else answer
        return share_of_annotators(evaluator_form(sent), evaluator_golds(golds))

    def parts(self, fields: Row) -> Sequence[str]:
        """The kind of answer: yes/no, number or other."""
        return (f"answer type/{fields['answer_type']}",) if fields.get("answer_type") else ()

    def write_submission(self, samples: Sequence[Sample], answers: Mapping[Id, str], path: Path) -> list[str]:
        """Write the answers as LLaVA uploads them: normalised, and empty for test questions outside the file."""
        ids: list[Id] = [*self.whole] or [sample.id for sample in samples]
        listed = set(ids)
        lacking = [sample.id for sample in samples if sample.id not in listed]
        if lacking:
            raise UserError(f"{WHOLE_TEST} lacks {first_few(lacking)} of {len(samples)} questions; give LLaVA's files.")
        sent = {id_: normalise_answer(text) for id_, text in answers.items()}
        write_json(path, [{"question_id": id_, "answer": sent.get(id_, "")} for id_ in ids])
        others = f", and {len(ids) - len(samples)} empty ones for the rest of the test set" if self.whole else ""
        return [f"{path}: {len(samples)} answers{others}, for the VQA server."]


def _read_official(path: Path) -> list[Row]:
    """The rows of an official question file, joined with the annotations beside it if they are there."""
    kept = {str(row["id"]): row.get("prediction") for row in read_rows(path)}
    questions = kept.get("questions")
    if not isinstance(questions, list):
        return read_rows(path)
    rows = [as_row(path, f"question {number}", row) for number, row in enumerate(questions, start=1)]
    # The images of test-dev questions are those of the whole test set.
    split = str(kept.get("data_subtype") or "").replace("test-dev2015", "test2015")
    rows = [{**row, "image_path": _image_name(split, row)} if split else row for row in rows]
    annotations = path.with_name(path.name.replace("OpenEnded_", "").replace(QUESTIONS, "_annotations.json"))
    if annotations == path or not annotations.is_file():
        return rows
    listed = {str(row["id"]): row.get("prediction") for row in read_rows(annotations)}.get("annotations")
    if not isinstance(listed, list):
        raise UserError(f"{annotations}: expected a list under 'annotations'.")
    golds = [as_row(annotations, f"annotation {number}", row) for number, row in enumerate(listed, start=1)]
    by_id = {gold.get("question_id"): gold for gold in golds}
    lacking = [row.get("question_id") for row in rows if row.get("question_id") not in by_id]
    if lacking:
        raise UserError(f"{annotations}: lacks {first_few(lacking)} of the {len(rows)} questions of {path.name}.")
    return [{**by_id[row["question_id"]], **row} for row in rows]


def _image_name(split: str, row: Row) -> str:
    number = str(row.get("image_id", ""))
    return f"COCO_{split}_{number.zfill(12)}.jpg"


def _normal(row: Row) -> Row:
    row = short_question(row)
    answers = row.get("references", row.get("answers"))
    kept = {name: cell for name, cell in row.items() if name not in ("answers", "references")}
    return kept if answers is None else {**kept, "references": annotators_answers(answers)}


def short_question(row: Row) -> Row:
    """A row of LLaVA's question file, which has image and prompt, with the names of other files."""
    image = row.get("image")
    if "text" not in row or "prompt" in row or not isinstance(image, str):
        return row
    question = row["text"].removesuffix(SHORT_INSTRUCTION).strip()
    kept = {name: cell for name, cell in row.items() if name not in ("image", "text")}
    return {"question": question, "image_path": image, **kept}


def annotators_answers(cell: Any) -> list[str]:
    """The annotators' answers of a cell: texts, or objects that hold them; none for a file without."""
    return [str(item.get("answer", "")) if isinstance(item, dict) else str(item) for item in as_list(cell)]
