"""TextVQA (v0.5.1 val): short answers about text in images, compared with ten annotators' answers."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.benchmark import SHORT_INSTRUCTION, Benchmark
from eval.reading.tables import Row, as_row, read_rows
from eval.sample import Id, Sample, Score, as_list
from eval.scoring.judge import Judge
from eval.scoring.pandas_cells import cell_as_text
from eval.scoring.vqa import normalise_answer, soft_accuracy, vlmevalkit_form
from llava_skip_base.errors import UserError, first_few

ANNOTATIONS = "TextVQA_0.5.1_val.json"
QUESTION_FILE = "llava_textvqa_val_v051_ocr.jsonl"
OCR_LEAD = "Reference OCR token: "
_OLD_PROMPT = re.compile(r"^OCR tokens: .*?Question: (.*?) Short answer:", re.DOTALL)


class TextVQA(Benchmark):
    """TextVQA as its annotation file (or LLaVA's folder around it), VLMEvalKit's TSV or the Hugging Face parquet."""

    name = "textvqa"
    rules = {"official": "textvqa-vqa-accuracy", "vlmevalkit": "textvqa/vlmevalkit-2026-08"}
    protocols = ("llava", "llava-without-ocr")
    max_new_tokens = 128
    embedded = "textvqa.json"
    columns = ("question", "references")
    list_columns = frozenset({"references"})
    public_names = {"references": "answers (or answer)"}
    answer_columns = ("prediction", "text", "answer")

    def read(self, data: Path) -> list[Row]:
        """Read a file; from a folder the annotations, with the OCR lines of LLaVA's question file if it is there."""
        if not data.is_dir():
            return _read_annotations(data)
        found = sorted(data.rglob(ANNOTATIONS))
        if not found:
            raise UserError(f"{data}: holds no {ANNOTATIONS}; give the folder that has it, or an annotation file.")
        rows = _read_annotations(found[0])
        questions = found[0].parent / QUESTION_FILE
        if not questions.is_file():
            return rows
        lines = {_key(row["question_id"], row["text"]): _ocr_line(row["text"]) for row in read_rows(questions)}
        return [{**row, "ocr": lines.get(_key(row.get("image_id", ""), row["question"]), "")} for row in rows]

    def normalise(self, rows: list[Row]) -> list[Row]:
        """Give references, image and OCR line the same names."""
        return [_normal(row) for row in rows]

    def image_folder(self, data: Path) -> Path:
        """train_images, which has the val images of TextVQA."""
        folder = (data if data.is_dir() else data.parent) / "train_images"
        return folder if folder.is_dir() else super().image_folder(data)

    def protocol(self, samples: Sequence[Sample]) -> str:
        """The protocol; without any OCR line in the file it can only be the one without."""
        has_lines = any(sample.fields["ocr"] for sample in samples)
        return self.chosen_protocol if has_lines else "llava-without-ocr"

    def prompts(self, samples: Sequence[Sample]) -> list[str]:
        """LLaVA's prompts: question, OCR line, short-answer instruction."""
        with_lines = self.protocol(samples) == "llava"
        lines = [f"\n{sample.fields['ocr']}" if with_lines and sample.fields["ocr"] else "" for sample in samples]
        questions = [sample.fields["question"] for sample in samples]
        return [f"{question}{line}\n{SHORT_INSTRUCTION}" for question, line in zip(questions, lines, strict=True)]

    def predictions(self, rows: Sequence[Row], source: str, samples: Sequence[Sample]) -> dict[Id, str]:
        """Read the answers: LLaVA's rows by image and first line of the prompt, others by id."""
        if "prompt" not in rows[0] or {s.id for s in samples} & {self.row_id(row) for row in rows}:
            return super().predictions(rows, source, samples)
        column = self.answer_column(rows, source)
        ids: dict[str, list[Id]] = defaultdict(list)
        for sample in samples:
            ids[_key(sample.fields.get("image_id", ""), sample.fields["question"])].append(sample.id)
        keys = [_key(row.get("question_id", ""), row.get("prompt", "")) for row in rows]
        doubled = [key for key, count in Counter(keys).items() if count > max(1, len(ids.get(key, [])))]
        if doubled:
            raise UserError(
                f"{source}: questions are answered more than once: {first_few(doubled)}; remove the repeated rows."
            )
        paired = (ids[key].pop(0) if ids.get(key) else key for key in keys)
        return {id_: str(row.get(column, "")) for id_, row in zip(paired, rows, strict=True)}

    def score(self, samples: Sequence[Sample], answers: Mapping[Id, str], judge: Judge | None = None) -> Score:
        """Average the questions' soft accuracies, in percent."""
        lacking = [s.id for s in samples if not s.fields["references"]]
        if lacking:
            raise UserError(f"{first_few(lacking)} of {len(samples)} questions have no answers; give a split that has.")
        official = self.chosen_rule == "official"
        form = normalise_answer if official else vlmevalkit_form
        said = {s.id: answers[s.id] if official else cell_as_text(answers[s.id]) for s in samples}
        parts: dict[Id, bool | float] = {s.id: soft_accuracy(said[s.id], s.fields["references"], form) for s in samples}
        accuracy = 100 * sum(parts.values()) / len(samples)
        counts = {"questions": len(samples), "empty": sum(not answers[s.id].strip() for s in samples)}
        counts["with_ocr_line"] = sum(bool(s.fields["ocr"]) for s in samples)
        return Score("scored", self.rule, accuracy, {"accuracy": accuracy}, counts, per_sample=parts)


def _read_annotations(path: Path) -> list[Row]:
    rows = read_rows(path)
    # The official file is an object whose "data" holds the questions.
    lists = [row["prediction"] for row in rows if row.get("id") == "data" and isinstance(row.get("prediction"), list)]
    return [as_row(path, f"question {n}", row) for n, row in enumerate(lists[0], start=1)] if lists else rows


def _key(image: object, prompt: str) -> str:
    return f"{image}: {asked_question(prompt).lower()}"


def asked_question(prompt: str) -> str:
    """The question of one of LLaVA's prompts, with an OCR line after the question, before it, or without."""
    old = _OLD_PROMPT.match(prompt)
    if old:
        return old[1]
    lines = prompt.split("\n")
    return lines[1] if prompt.startswith(OCR_LEAD.strip()) and len(lines) > 1 else lines[0]


def _ocr_line(prompt: str) -> str:
    return next((line for line in prompt.split("\n") if line.startswith(OCR_LEAD.strip())), "")


def _normal(row: Row) -> Row:
    answers = next((row[name] for name in ("references", "answers", "answer") if name in row), None)
    references = {} if answers is None else {"references": as_list(answers)}
    tokens = as_list(row.get("ocr_tokens", ""))
    line = row.get("ocr") or (OCR_LEAD + ", ".join(map(str, tokens)) if tokens else "")
    image = {"image_path": f"{row['image_id']}.jpg"} if row.get("image_id") and not row.get("image_path") else {}
    return {**row, **image, **references, "ocr": line}
