"""SEED-Bench, its image part: four options about one image, in nine kinds of questions.

Sources: AILab-CVC/SEED-Bench (SEED-Bench.json), haotian-liu/LLaVA `convert_seed_for_submission.py`, and the tasks of
lmms-eval and VLMEvalKit.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.benchmarks.mmbench import vlmevalkit_prompt
from eval.mean_benchmark import LetterBenchmark, lettered_question, vlmevalkit_letter
from eval.reading.tables import Row, as_row, read_rows
from eval.sample import Id, Sample
from llava_skip_base.errors import UserError
from llava_skip_base.files import write_json_lines

ANNOTATIONS = "SEED-Bench.json"
IMAGES = "SEED-Bench-image"


class SEEDImage(LetterBenchmark):
    """SEED-Bench's image questions as SEED-Bench.json, VLMEvalKit's TSV or the Hugging Face parquet."""

    name = "seedimage"
    rules = {
        "lmms-eval": "seedimage/lmms-eval-0.7.3",
        "llava": "seedimage-llava",
        "vlmevalkit": "seedimage/vlmevalkit-2026-08",
    }
    protocols = ("llava", "vlmevalkit")
    max_new_tokens = 128
    embedded = "seed_bench/SEED-Bench.json"
    columns = ("question", "A", "answer")
    public_names = {"A": "choice_a (or A)"}
    id_columns = ("question_id", "index", "id")
    submission = "seed_predictions.jsonl"

    def read(self, data: Path) -> list[Row]:
        """Read a file, or SEED-Bench.json in a folder; of both parts only the questions about images."""
        if data.is_dir():
            found = sorted(data.rglob(ANNOTATIONS))
            if not found:
                raise UserError(f"{data}: holds no {ANNOTATIONS}; give the folder that has it, or a benchmark file.")
            data = found[0]
        rows = _read_annotations(data)
        shown = [row for row in rows if row.get("data_type", "image") == "image"]
        if not shown:
            raise UserError(f"{data}: has {len(rows)} questions, and none of them is about an image.")
        return shown

    def normalise(self, rows: list[Row]) -> list[Row]:
        """Options as columns, kinds as `category`."""
        return [_normal(row) for row in rows]

    def image_folder(self, data: Path) -> Path:
        """SEED-Bench-image, as the official instructions name it, or `images`."""
        folder = (data if data.is_dir() else data.parent) / IMAGES
        return folder if folder.is_dir() else super().image_folder(data)

    def prompts(self, samples: Sequence[Sample]) -> list[str]:
        """LLaVA's prompts, which are lmms-eval's too; or VLMEvalKit's."""
        prompt = vlmevalkit_prompt if self.chosen_protocol == "vlmevalkit" else lettered_question
        return [prompt(sample.fields) for sample in samples]

    def letter(self, answer: str, fields: Row) -> str | None:
        """The letter of an answer: its first character, or by LLaVA's rule the whole of it."""
        if self.chosen_rule == "vlmevalkit":
            return vlmevalkit_letter(answer, fields)
        letter = answer if self.chosen_rule == "llava" else answer.strip()[:1].upper()
        return letter if len(letter) == 1 and letter in "ABCD" else None

    def parts(self, fields: Row) -> Sequence[str]:
        """The kind of question."""
        return (f"kind/{fields['category']}",) if fields.get("category") else ()

    def write_submission(self, samples: Sequence[Sample], answers: Mapping[Id, str], path: Path) -> list[str]:
        """Write the lines that LLaVA uploads to the leaderboard, here of the image questions."""
        ids = [next(s.fields[name] for name in self.id_columns if s.fields.get(name)) for s in samples]
        write_json_lines(
            path, ({"question_id": id_, "prediction": answers[s.id]} for id_, s in zip(ids, samples, strict=True))
        )
        return [f"{path}: {len(samples)} answers to image questions; the leaderboard's file has those to videos too."]


def _read_annotations(path: Path) -> list[Row]:
    """The questions of SEED-Bench.json, with the names of their kinds; the rows of any other file."""
    rows = read_rows(path)
    kept = {str(row.get("id")): row for row in rows}
    listed = kept.get("questions", {}).get("prediction")
    if not isinstance(listed, list):
        return rows
    names = {str(number): name for name, number in kept.get("question_type", {}).items() if name != "id"}
    found = [as_row(path, f"question {number}", row) for number, row in enumerate(listed, start=1)]
    return [{**row, "category": names.get(row.get("question_type_id", ""), "").title()} for row in found]


def _normal(row: Row) -> Row:
    options = {letter.upper(): row[f"choice_{letter}"] for letter in "abcd" if f"choice_{letter}" in row}
    kept = {name: cell for name, cell in row.items() if not name.startswith("choice_")}
    if isinstance(kept.get("image"), list):  # a parquet keeps the frames of a video in the same column
        kept["image"] = kept["image"][0] if kept["image"] else ""
    kind = row.get("category") or (f"type {row['question_type_id']}" if row.get("question_type_id") else "")
    path = {"image_path": row["data_id"]} if row.get("data_id") and not row.get("image") else {}
    return {**path, **kept, **options, "category": kind}
