"""OCRBench (echo840/OCRBench, OCRBench.json): 1000 short answers, right if a reference occurs in the answer."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.benchmark import SHORT_INSTRUCTION, Benchmark
from eval.reading.tables import Row
from eval.sample import Id, Sample, Score, as_list
from eval.scoring.judge import Judge
from llava_skip_base.errors import UserError, first_few

RECOGNITION = (
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
)
OTHERS = (
    "Scene Text-centric VQA",
    "Doc-oriented VQA",
    "Key Information Extraction",
    "Handwritten Mathematical Expression Recognition",
)
# The full-width forms of "!" to "~", and the wide space.
_FULL_WIDTH = {code + 0xFEE0: code for code in range(ord("!"), ord("~") + 1)} | {0x3000: " "}


class OCRBench(Benchmark):
    """OCRBench as OCRBench.json, VLMEvalKit's TSV or the Hugging Face parquet."""

    name = "ocrbench"
    rules = {"official": "ocrbench-official", "lmms-eval": "ocrbench/lmms-eval-0.7.3"}
    protocols = ("skip-vision", "vlmevalkit")
    max_new_tokens = 1024
    embedded = "ocrbench.json"
    columns = ("question", "references", "type")
    list_columns = frozenset({"references"})
    public_names = {"references": "answers (or answer)", "type": "type (or question_type, category)"}
    answer_columns = ("prediction", "predict", "text")

    def normalise(self, rows: list[Row]) -> list[Row]:
        """Give kind, source and references the same names; repeated ids get the name of their data set."""
        return [_normal(row) for row in _identified(rows)]

    def image_folder(self, data: Path) -> Path:
        """OCRBench_Images, where the paths of OCRBench.json start."""
        folder = data.parent / "OCRBench_Images"
        return folder if folder.is_dir() else super().image_folder(data)

    def prompts(self, samples: Sequence[Sample]) -> list[str]:
        """The question, followed by the short-answer instruction in the paper's protocol."""
        instruction = f"\n{SHORT_INSTRUCTION}" if self.chosen_protocol == "skip-vision" else ""
        return [sample.fields["question"] + instruction for sample in samples]

    def predictions(self, rows: Sequence[Row], source: str, samples: Sequence[Sample]) -> dict[Id, str]:
        """Read the answers, under the ids that `normalise` gives."""
        return super().predictions(_identified(rows), source, samples)

    def score(self, samples: Sequence[Sample], answers: Mapping[Id, str], judge: Judge | None = None) -> Score:
        """Count the hits of each kind, as the official code does."""
        unknown = sorted({s.fields["type"] for s in samples} - {*RECOGNITION, *OTHERS})
        if unknown:
            raise UserError(
                f"kinds that OCRBench does not have: {first_few(unknown)}; expected {RECOGNITION[0]} and others."
            )
        folded = self.chosen_rule == "lmms-eval"
        hits = {s.id: is_hit(answers[s.id], s.fields, folded) for s in samples}
        by_kind = Counter(s.fields["type"] for s in samples if hits[s.id])
        total = sum(hits.values())
        scores: dict[str, Any] = {"Text Recognition": sum(by_kind[kind] for kind in RECOGNITION)}
        scores |= {kind: by_kind[kind] for kind in OTHERS}
        scores |= {"Final Score": total, "Final Score Norm": total / 10}
        scores["kinds"] = {kind: by_kind[kind] for kind in RECOGNITION}
        counts = {
            "questions": len(samples),
            "hits": total,
            "empty": sum(not answers[s.id].strip() for s in samples),
            "kinds": dict(Counter(s.fields["type"] for s in samples)),
        }
        notes = [] if len(samples) == 1000 else [f"OCRBench has 1000 questions, this file {len(samples)}."]
        score = 100 * total / len(samples)
        return Score("scored", self.rule, score, scores, counts, notes, per_sample=dict(hits))


def is_hit(prediction: str, fields: Row, folded: bool = False) -> bool:
    """The official test: a reference occurs in the answer; formulas are compared without spaces and with case.

    `folded` is lmms-eval's addition: full-width letters, digits and marks count as the ASCII ones, but not in formulas.
    """
    clean = _formula if _is_formula(fields) else _plain_folded if folded else _plain
    return any(clean(str(reference)) in clean(prediction) for reference in fields["references"])


def _is_formula(fields: Row) -> bool:
    return fields["dataset"] == "HME100k" or (not fields["dataset"] and fields["type"] == OTHERS[-1])


def _formula(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")


def _plain(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def _plain_folded(text: str) -> str:
    return _plain(text.translate(_FULL_WIDTH))


def _identified(rows: Sequence[Row]) -> list[Row]:
    """Give rows without an id their number, and rows whose id repeats between data sets their data set's name."""
    id_column = next((name for name in OCRBench.id_columns if name in rows[0]), None)
    if id_column is None:
        return [{**row, "id": number} for number, row in enumerate(rows)]
    ids = [row.get(id_column) for row in rows]
    if len(set(ids)) == len(ids) or not _dataset(rows[0]):
        return list(rows)
    return [{**row, id_column: f"{_dataset(row)}/{row[id_column]}"} for row in rows]


def _dataset(row: Row) -> str:
    return row.get("dataset_name") or row.get("dataset") or ""


def _normal(row: Row) -> Row:
    names = ("type", "question_type", "category")
    kind = next((row[name] for name in names if row.get(name)), None)
    references = next((row[name] for name in ("references", "answers", "answer") if name in row), None)
    named = {"type": kind, "references": None if references is None else as_list(references)}
    return {**row, "dataset": _dataset(row), **{name: cell for name, cell in named.items() if cell is not None}}
