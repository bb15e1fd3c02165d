"""VizWiz-VQA: questions of blind people about their photographs, some of which cannot be answered.

Sources: the evaluator of VizWiz, which is that of VQAv2 with unchanged annotators' answers; haotian-liu/LLaVA
`convert_vizwiz_for_submission.py`; the tasks of lmms-eval and VLMEvalKit.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.benchmark import SHORT_INSTRUCTION
from eval.benchmarks.vqav2 import annotators_answers, short_question
from eval.mean_benchmark import MeanBenchmark
from eval.reading.tables import Row
from eval.sample import Id, Sample, Score
from eval.scoring.judge import Judge
from eval.scoring.pandas_cells import cell_as_text
from eval.scoring.vqa import evaluator_form, normalise_answer, share_of_annotators, soft_accuracy, vlmevalkit_form
from llava_skip_base.files import write_json

UNANSWERABLE = "unanswerable"
INSTRUCTION = f"When the provided information is insufficient, respond with 'Unanswerable'.\n{SHORT_INSTRUCTION}"


class VizWiz(MeanBenchmark):
    """VizWiz as its annotation file, LLaVA's question file (without answers), a parquet or VLMEvalKit's TSV."""

    name = "vizwiz"
    rules = {
        "official": "vizwiz-official",
        "llava": "vizwiz-official/llava-upload",
        "vlmevalkit": "vizwiz/vlmevalkit-2026-05",
        "lmms-eval": "vizwiz/lmms-eval-0.7.3",
    }
    protocols = ("llava", "llava-answerable", "lmms-eval")
    max_new_tokens = 128
    embedded = "vizwiz/val.json"
    columns = ("question",)
    optional_columns = ("references", "answer_type")
    list_columns = frozenset({"references"})
    gold = "references"
    id_columns = ("question_id", "index", "id")
    answer_columns = ("prediction", "text", "answer")
    submission = "vizwiz_answers.json"

    def normalise(self, rows: list[Row]) -> list[Row]:
        """Give question, image and the annotators' answers the same names; questions without an id get the image's."""
        rows = [_normal(row) for row in rows]
        if all(row.get("answerable") == "1" for row in rows):
            return [{**row, "all_answerable": "yes"} for row in rows]
        return rows

    def image_folder(self, data: Path) -> Path:
        """The folder of the split, as VizWiz names it, or `images`."""
        folder = data.parent / ("test" if "test" in data.stem else data.stem)
        return folder if folder.is_dir() else super().image_folder(data)

    def protocol(self, samples: Sequence[Sample]) -> str:
        """The protocol; a file whose questions can all be answered is asked without the sentence about the others."""
        if self.chosen_protocol == "llava" and all(sample.fields.get("all_answerable") for sample in samples):
            return "llava-answerable"
        return self.chosen_protocol

    def prompts(self, samples: Sequence[Sample]) -> list[str]:
        """LLaVA's prompts; lmms-eval's have the question in lower case but for its first letter."""
        protocol = self.protocol(samples)
        instruction = SHORT_INSTRUCTION if protocol == "llava-answerable" else INSTRUCTION
        questions = [sample.fields["question"] for sample in samples]
        return [f"{text.capitalize() if protocol == 'lmms-eval' else text}\n{instruction}" for text in questions]

    def predictions(self, rows: Sequence[Row], source: str, samples: Sequence[Sample]) -> dict[Id, str]:
        """Read the answers by id, or by image, as the server's own file names them."""
        found = super().predictions([_with_id(_with_path(row)) for row in rows], source, samples)
        known = {sample.id for sample in samples}
        if known & found.keys():
            return found
        images = {_stem(sample.fields.get("image_path", "")): sample.id for sample in samples}
        return {images.get(_stem(str(id_)), id_): text for id_, text in found.items()}

    def value(self, answer: str, fields: Row) -> float:
        """The soft accuracy of an answer by the chosen rule."""
        golds = [str(reference) for reference in fields["references"]]
        if self.chosen_rule == "lmms-eval":
            return soft_accuracy(answer, golds)
        if self.chosen_rule == "vlmevalkit":
            return soft_accuracy(cell_as_text(answer), golds, vlmevalkit_form)
        sent = normalise_answer(answer) if self.chosen_rule == "llava" else answer
        return share_of_annotators(evaluator_form(sent), golds)

    def parts(self, fields: Row) -> Sequence[str]:
        """The kind of answer: yes/no, number, other or unanswerable."""
        kind = fields.get("answer_type") or fields.get("category", "")
        return (f"answer type/{kind}",) if kind else ()

    def score(self, samples: Sequence[Sample], answers: Mapping[Id, str], judge: Judge | None = None) -> Score:
        """Average the soft accuracies; how many answers say "unanswerable" is counted."""
        score = super().score(samples, answers, judge)
        score.counts["said_unanswerable"] = sum(normalise_answer(answers[s.id]) == UNANSWERABLE for s in samples)
        return score

    def write_submission(self, samples: Sequence[Sample], answers: Mapping[Id, str], path: Path) -> list[str]:
        """Write the answers as LLaVA uploads them, by image and normalised."""
        names = [sample.fields.get("image_path") or f"{sample.id}.jpg" for sample in samples]
        texts = [normalise_answer(answers[sample.id]) for sample in samples]
        write_json(path, [{"image": Path(name).name, "answer": text} for name, text in zip(names, texts, strict=True)])
        return [f"{path}: {len(samples)} answers for the VizWiz server."]


def _stem(name: str) -> str:
    return name.removesuffix(".jpg")


def _normal(row: Row) -> Row:
    if isinstance(row.get("text"), str):
        row = {**row, "text": row["text"].removesuffix(INSTRUCTION)}
    row = _with_id(_with_path(short_question(row)))
    answers = row.get("references", row.get("answers"))
    kept = {name: cell for name, cell in row.items() if name not in ("answers", "references")}
    return kept if answers is None else {**kept, "references": annotators_answers(answers)}


def _with_path(row: Row) -> Row:
    """A row whose image is a file's name, with it as `image_path`."""
    image = row.get("image")
    if "image_path" in row or not isinstance(image, str) or not image.endswith(".jpg"):
        return row
    return {**{name: cell for name, cell in row.items() if name != "image"}, "image_path": image}


def _with_id(row: Row) -> Row:
    """A row with an id: the name of its image where it has none."""
    if not row.get("image_path") or any(row.get(name) for name in VizWiz.id_columns):
        return row
    return {**row, "question_id": _stem(row["image_path"])}
