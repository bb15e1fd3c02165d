"""AI2D (test): diagrams of school books with a question and options each.

Sources: the tasks of lmms-eval and VLMEvalKit; AI2D has no evaluation code of its own for language models.
"""

import re
import string
from collections.abc import Sequence

from eval.benchmarks.mmbench import vlmevalkit_prompt
from eval.mean_benchmark import (
    LetterBenchmark,
    lettered_question,
    numbered_letter,
    option_columns,
    vlmevalkit_letter,
)
from eval.reading.tables import Row
from eval.sample import Sample, as_list

_NO_MARKS = str.maketrans("", "", string.punctuation)
_STARTS_WITH_LETTER = re.compile(r"\s*([A-Z])\.")


class AI2D(LetterBenchmark):
    """AI2D as the Hugging Face parquet or VLMEvalKit's TSV."""

    name = "ai2d"
    rules = {"lmms-eval": "ai2d/lmms-eval-0.7.3", "vlmevalkit": "ai2d/vlmevalkit-2026-08"}
    protocols = ("lmms-eval", "vlmevalkit")
    max_new_tokens = 16
    limits = {"vlmevalkit": 1024}
    numbers_rows = True
    embedded = "ai2d.tsv"
    columns = ("question", "A", "answer")
    public_names = {"A": "options (or A, B, ...)"}

    def normalise(self, rows: list[Row]) -> list[Row]:
        """Options as columns, the gold answer as a letter; ids for files without."""
        return [_normal(row) for row in self.identified(rows)]

    def prompts(self, samples: Sequence[Sample]) -> list[str]:
        """lmms-eval's prompts, which are LLaVA's for multiple choice; or VLMEvalKit's."""
        prompt = vlmevalkit_prompt if self.chosen_protocol == "vlmevalkit" else lettered_question
        return [prompt(sample.fields) for sample in samples]

    def letter(self, answer: str, fields: Row) -> str | None:
        """The letter of an answer by the chosen rule."""
        return vlmevalkit_letter(answer, fields) if self.chosen_rule == "vlmevalkit" else lmms_eval_letter(answer)

    def parts(self, fields: Row) -> Sequence[str]:
        """The category, in files that have one."""
        return (f"category/{fields['category']}",) if fields.get("category") else ()


def lmms_eval_letter(answer: str) -> str | None:
    """lmms-eval's reading: a capital letter with a period at the start, or nothing but a letter and punctuation."""
    found = _STARTS_WITH_LETTER.match(answer)
    text = found[1] if found else answer.translate(_NO_MARKS)
    return text.upper() if len(text) == 1 and text.isascii() and text.isalpha() else None


def _normal(row: Row) -> Row:
    listed = option_columns(as_list(row["options"])) if "options" in row else {}
    kept = {name: cell for name, cell in row.items() if name != "options"}
    answer = {"answer": numbered_letter(str(row["answer"]))} if "answer" in row else {}
    return {**kept, **listed, **answer}
