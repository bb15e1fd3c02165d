"""ChartQA (test): questions about charts, right if the number is within 5% or the text is the same.

Sources: vis-nlp/ChartQA (file formats), google-research/pix2struct `metrics.py`, whose relaxed accuracy the paper
defines and lmms-eval and VLMEvalKit use.
"""

from collections.abc import Sequence
from pathlib import Path

from eval.benchmark import SHORT_INSTRUCTION
from eval.mean_benchmark import MeanBenchmark
from eval.reading.tables import Row, read_rows
from eval.sample import Sample, as_list
from eval.scoring.pandas_cells import cell_as_text
from llava_skip_base.errors import UserError
from llava_skip_base.files import parse_json

TOLERANCE = 0.05
SPLITS = ("human", "augmented")


class ChartQA(MeanBenchmark):
    """ChartQA as the folder of its test files (or one of them), VLMEvalKit's TSV or the Hugging Face parquet."""

    name = "chartqa"
    rules = {
        "official": "chartqa-relaxed",
        "vlmevalkit": "chartqa/vlmevalkit-2026-05",
        "lmms-eval": "chartqa/lmms-eval-0.7.3",
    }
    protocols = ("llava", "lmms-eval")
    max_new_tokens = 128
    limits = {"lmms-eval": 16}
    numbers_rows = True
    embedded = "chartqa"
    columns = ("question", "references")
    list_columns = frozenset({"references"})
    public_names = {"question": "question (or query)", "references": "answer (or label)"}
    gold = "references"

    def read(self, data: Path) -> list[Row]:
        """Read a file; of a folder the test files of both splits."""
        files = [data]
        if data.is_dir():
            files = [path for split in SPLITS for path in sorted(data.rglob(f"test_{split}.json"))]
            if len(files) != len(SPLITS):
                raise UserError(
                    f"{data}: expected one test_human.json and one test_augmented.json below it, saw {len(files)} such "
                    "files; give the folder that has them, or a benchmark file."
                )
        return [row for path in files for row in _read_split(path)]

    def normalise(self, rows: list[Row]) -> list[Row]:
        """Give question, gold answers, image and split the same names; ids for files without."""
        return [_normal(row) for row in self.identified(rows)]

    def image_folder(self, data: Path) -> Path:
        """`png` beside the test files, as in the release, or `images`."""
        found = sorted(path for path in data.rglob("png") if path.is_dir()) if data.is_dir() else [data.parent / "png"]
        return found[0] if found and found[0].is_dir() else super().image_folder(data)

    def prompts(self, samples: Sequence[Sample]) -> list[str]:
        """The question with the short-answer instruction of LLaVA, or of lmms-eval."""
        lmms_eval = self.chosen_protocol == "lmms-eval"
        instruction = "Answer the question with a single word." if lmms_eval else SHORT_INSTRUCTION
        return [f"{sample.fields['question']}\n{instruction}" for sample in samples]

    def value(self, answer: str, fields: Row) -> bool:
        """Whether an answer is right by the chosen rule, for any of the gold answers."""
        golds = [str(reference) for reference in fields["references"]]
        if self.chosen_rule == "vlmevalkit":
            answer, golds = cell_as_text(answer).strip(), _vlmevalkit_golds(golds)
        elif self.chosen_rule == "official":
            golds = [str(gold).strip() for text in golds for gold in as_list(text)]
            answer = answer.strip()
        return any(is_right(answer, gold) for gold in golds)

    def parts(self, fields: Row) -> Sequence[str]:
        """The split: questions of people or made by a model."""
        return (f"split/{fields['split']}",) if fields.get("split") else ()


def is_right(answer: str, gold: str) -> bool:
    """Relaxed accuracy: a number within 5% of a gold number that is not 0, else the same text in any case.

    A percent sign divides by 100, so `50%` is 0.5, and wrong where the gold answer reads 50.
    """
    said, right = _number(answer), _number(gold)
    if said is not None and right:
        return abs(said - right) / abs(right) <= TOLERANCE
    return answer.lower() == gold.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _vlmevalkit_golds(golds: Sequence[str]) -> list[str]:
    """The gold answers that VLMEvalKit sees: it takes a cell that reads as a list, of numbers too, for several."""
    listed = [item for text in golds for item in as_list(text)]
    if len(listed) == 1 and listed[0].startswith("["):
        try:
            return [str(item) for item in parse_json(listed[0])]
        except ValueError:
            pass  # text that only starts with a bracket
    return [cell_as_text(gold) for gold in listed]


def _read_split(path: Path) -> list[Row]:
    """The rows of one file; those of the release get their split and a number of their own."""
    rows = read_rows(path)
    split = path.stem.removeprefix("test_")
    if split not in SPLITS or "query" not in rows[0]:
        return rows
    return [{**row, "split": split, "index": f"{split}/{number}"} for number, row in enumerate(rows)]


def _normal(row: Row) -> Row:
    found = next((row[name] for name in ("references", "label", "answer") if name in row), None)
    kept = {name: cell for name, cell in row.items() if name not in ("label", "query", "references")}
    kept = {name: cell for name, cell in kept.items() if name != "answer" or found is None}
    question = {"question": row["query"]} if "query" in row else {}
    image = {"image_path": row["imgname"]} if row.get("imgname") else {}
    split = str(row.get("split") or row.get("type") or "")
    named = next((name for name in SPLITS if name in split), split)
    references = {} if found is None else {"references": found if isinstance(found, list) else [found] if found else []}
    return {**kept, **question, **image, **references, "split": named}
