"""MathVista (testmini): mathematical questions about images; an answer is extracted, normalised, and compared.

Source: lupantech/MathVista `extract_answer.py` and `calculate_score.py`, and VLMEvalKit's `mathvista.py` for its
rule; the wording of the extraction prompt is our own, with worked cases of the same five kinds.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.benchmark import Benchmark
from eval.errors import JudgeUnavailable
from eval.reading.tables import Row, read_rows
from eval.sample import Id, Sample, Score, as_list
from eval.scoring.edits import edit_distance
from eval.scoring.extraction import VERSIONS, vlmevalkit
from eval.scoring.judge import Judge, digest, read_replies, save_replies
from eval.scoring.pandas_cells import cell_as_text
from llava_skip_base.errors import UserError, first_few
from llava_skip_base.texts import shortened

HINTS = {
    "text": "answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.",
    "integer": "answer the question requiring an integer answer and provide the final value, e.g., 1, 2, 3, at the "
    "end.",
    "float1": "answer the question requiring a floating-point number with one decimal place and provide the final "
    "value, e.g., 1.2, 1.3, 1.4, at the end.",
    "float2": "answer the question requiring a floating-point number with two decimal places and provide the final "
    "value, e.g., 1.23, 1.34, 1.45, at the end.",
    "list": "answer the question requiring a Python list as an answer and provide the final list, e.g., [1, 2, 3], "
    "[1.2, 1.3, 1.4], at the end.",
}
INSTRUCTION = "Read the examples. Then take the answer out of the model's response, and write nothing but the answer."
WORKED_CASES = (
    ("integer", "How many birds sit on the wire?", "There are 6 birds on the wire.", "6"),
    ("float1", "Which share of the cups is red?", "Of the ten cups four are red, so the share is 0.4.", "0.4"),
    ("float2", "What do the two books cost together? (Unit: $)", "They cost $3.20 and $4.15, in all $7.35.", "7.35"),
    ("list", "In which two years are the lines equal?", "The lines meet in 1998 and in 2003.", "[1998, 2003]"),
    (
        "text",
        "Which part of the disc is shaded?\nChoices:\n(A) 1/4\n(B) 1/2\n(C) 3/4",
        "Two of four sectors are shaded, so the answer is (B) 1/2.",
        "B",
    ),
)
MAX_TOKENS = 128
REPORTED = ("question_type", "answer_type", "language", "source", "category", "task", "context", "grade", "skills")
_QUOTED = re.compile(r'The answer is "(.*)"\.')
_LETTER = re.compile(r"\(([a-zA-Z])\)")


class MathVista(Benchmark):
    """MathVista testmini as testmini.json (with query.json), VLMEvalKit's TSV or the Hugging Face parquet."""

    name = "mathvista"
    rules = {"official": "mathvista-official", "vlmevalkit": f"mathvista/{VERSIONS['vlmevalkit']}"}
    protocols = ("official",)
    max_new_tokens = 512
    embedded = "mathvista/testmini.json"
    columns = ("question", "question_type", "answer_type")
    optional_columns = ("answer", "choices")
    list_columns = frozenset({"choices"})
    id_columns = ("pid", "index", "question_id", "id")
    answer_columns = ("response", "prediction", "text")
    takes_judge_prompt = True

    def read(self, data: Path) -> list[Row]:
        """Read a file, or testmini.json in a folder, with the prompts of a query.json in the same folder."""
        path = data / "testmini.json" if data.is_dir() else data
        rows = read_rows(path)
        queries = path.with_name("query.json")
        if path == queries or path.suffix != ".json" or not queries.is_file():
            return rows
        worded = {str(row["id"]): row["prediction"] for row in read_rows(queries)}
        return [{**row, "query": worded.get(str(self.row_id(row)), row.get("query", ""))} for row in rows]

    def normalise(self, rows: list[Row]) -> list[Row]:
        """Turn the metadata into columns and read the choices."""
        return [_normal(row) for row in rows]

    def image_folder(self, data: Path) -> Path:
        """The folder in which the image paths start (`images/1.jpg`)."""
        return data if data.is_dir() else data.parent

    def prompts(self, samples: Sequence[Sample]) -> list[str]:
        """The released query, or one of the same form."""
        return [sample.fields.get("query") or query(sample.fields) for sample in samples]

    def score_graded(self, samples: Sequence[Sample], rows: Sequence[Row]) -> Score | None:
        """Score rows whose answers have been extracted; None if they have not."""
        column = "extraction" if self.chosen_rule == "official" else "res"
        if not any(column in row for row in rows):
            return None
        extracted = {self.row_id(row): str(row.get(column, "")) for row in rows}
        known = [sample for sample in samples if sample.id in extracted]
        if len(known) < len(samples):
            raise UserError(
                f"{len(samples) - len(known)} of {len(samples)} questions have no extracted answer; finish it."
            )
        return self._report(samples, extracted, {"unknown": len(extracted) - len(known)}, [])

    def score(self, samples: Sequence[Sample], answers: Mapping[Id, str], judge: Judge | None = None) -> Score:
        """Extract an answer from each response, by rule or by the judge, and compare it with the gold one."""
        rule = extract if self.chosen_rule == "official" else prefetch
        extracted = {s.id: rule(answers[s.id], s.fields) for s in samples}
        unread = [s for s in samples if extracted[s.id] is None]
        counts = {"empty": sum(not answers[s.id].strip() for s in samples), "not_extracted_by_rule": len(unread)}
        notes = []
        if judge and unread:
            try:
                extracted |= ask_for_answers(unread, answers, judge)
            except JudgeUnavailable as error:
                notes.append(f"extraction is incomplete: {error} Run again to go on.")
                counts["questions"] = len(samples)
                return Score("incomplete", self.rule, counts=counts, notes=notes, judge=judge.describe())
            if judge.dry_run:
                notes.append(f"dry run: {judge.sent} answers would be put to the judge; nothing was sent.")
        elif unread:
            notes.append(
                f"{len(unread)} responses need a judge to extract their answer (--judge-url); without one they count "
                "as empty, for which the official rule still picks the shortest choice, and VLMEvalKit's none."
            )
        score = self._report(samples, {id_: text or "" for id_, text in extracted.items()}, counts, notes)
        if judge and not judge.dry_run:
            score.judge = judge.describe()
        return score

    def reading(self, answer: str, fields: Row) -> str:
        """The extracted answer in the form of the gold one, else the answer's words."""
        found = extract(answer, fields) if self.chosen_rule == "official" else prefetch(answer, fields)
        form = None if found is None else normalise_extraction(found, fields)
        return super().reading(answer, fields) if form is None else form

    def _report(
        self, samples: Sequence[Sample], extracted: Mapping[Id, str], counts: dict[str, Any], notes: list[str]
    ) -> Score:
        lacking = [s.id for s in samples if not s.fields.get("answer")]
        if lacking:
            raise UserError(f"{first_few(lacking)} of {len(samples)} questions have no gold answer; give testmini.")
        official = self.chosen_rule == "official"
        judged = is_right if official else is_right_vlmevalkit
        right = {s.id: judged(extracted[s.id], s.fields) for s in samples}
        correct = sum(right.values())
        scores = official_report(samples, right) if official else vlmevalkit_report(samples, right)
        counts = {"questions": len(samples), **counts, "extractions_empty": sum(not extracted[s.id] for s in samples)}
        score = 100 * correct / len(samples)
        return Score("scored", self.rule, score, scores, counts, notes, per_sample=dict(right))


def official_report(samples: Sequence[Sample], right: Mapping[Id, bool]) -> dict[str, Any]:
    """Accuracy, overall and by each kind of metadata, in the official form."""
    correct, total = sum(right.values()), len(samples)
    average = {"accuracy": str(round(100 * correct / total, 2)), "correct": correct, "total": total}
    scores: dict[str, Any] = {"average": average}
    for name in REPORTED:
        parts = _parts(samples, right, (name,))
        shares = {value: f"{100 * sum(hits) / len(hits):.2f}" for value, hits in parts.items()}
        scores[name] = {
            value: {"accuracy": shares[value], "correct": sum(parts[value]), "total": len(parts[value])}
            for value in sorted(parts, key=lambda value: -float(shares[value]))
        }
    return scores


def vlmevalkit_report(samples: Sequence[Sample], right: Mapping[Id, bool]) -> dict[str, Any]:
    """Hits overall, by task and by skill in VLMEvalKit's form, accuracies in percent."""
    parts = {"Overall": list(right.values()), **_parts(samples, right, ("task", "skills"))}
    return {
        value: {"tot": len(hits), "hit": sum(hits), "acc": 100 * sum(hits) / len(hits)} for value, hits in parts.items()
    }


def query(fields: Row) -> str:
    """The prompt of a question, in the form of the released query file."""
    kind = "text" if fields["question_type"] == "multi_choice" else fields["answer_type"]
    kind += fields.get("precision", "") if kind == "float" else ""
    if kind not in HINTS:
        raise UserError(f"a question has the kind of answer {shortened(kind)!r}; expected one of {', '.join(HINTS)}.")
    unit = f" (Unit: {fields['unit']})" if fields.get("unit") else ""
    choices = "".join(f"\n({chr(ord('A') + n)}) {choice}" for n, choice in enumerate(fields["choices"]))
    listed = f"\nChoices:{choices}" if choices else ""
    return f"Hint: Please {HINTS[kind]}\nQuestion: {fields['question']}{unit}{listed}"


def extract(response: str, fields: Row) -> str | None:
    """The answer in a response where no judge is needed to find it; None where one is."""
    if not response or (fields["question_type"] == "multi_choice" and response in fields["choices"]):
        return response
    number = {"integer": int, "float": float}.get(fields["answer_type"])
    try:
        if number:
            return str(number(response))
    except ValueError:
        pass
    quoted = _QUOTED.search(response)
    return quoted[1] if quoted else None


def prefetch(response: str, fields: Row) -> str | None:
    """The answer in a response by VLMEvalKit's rule: a choice that it names, or the right number; else None."""
    if fields["question_type"] == "multi_choice":
        return vlmevalkit(cell_as_text(response), _lettered(fields))
    # VLMEvalKit takes the number 0 for no answer and asks the judge about it.
    found = is_right_vlmevalkit(response, fields) and float(response) != 0
    return response if found else None


def ask_for_answers(samples: Sequence[Sample], answers: Mapping[Id, str], judge: Judge) -> dict[Id, str]:
    """Let the judge extract the answers from responses, and keep its replies in a file next to the result.

    Raises:
        JudgeUnavailable: the endpoint fails; its replies so far are kept.
    """
    prompts = {s.id: extraction_prompt(s.fields, answers[s.id], judge.prompt) for s in samples}
    path = judge.file("extractions")
    replies = read_replies(path, {str(id_): prompt for id_, prompt in prompts.items()}, extraction=str)
    unasked = [s for s in samples if str(s.id) not in replies]
    for sample, reply in judge.map(lambda sample: judge.ask(prompts[sample.id], 0.0, MAX_TOKENS), unasked):
        replies[str(sample.id)] = {"asked": digest(prompts[sample.id]), "extraction": reply.strip()}
        save_replies(path, replies)
    return {s.id: replies[str(s.id)]["extraction"] for s in samples if str(s.id) in replies}


def extraction_prompt(fields: Row, response: str, text: str | None = None) -> str:
    """The question to the judge: instruction, five worked cases, and the open one; or the official `text` and form."""
    if text is not None:
        return f"{text.strip()}\n\n{fields['question']}\n\n{response}\n\nExtracted answer: "
    cases = [
        f"Hint: Please {HINTS[kind]}\nQuestion: {question}\n\nModel response: {said}\n\nExtracted answer: {answer}"
        for kind, question, said, answer in WORKED_CASES
    ]
    asked = fields.get("query") or query(fields)
    return "\n\n".join([INSTRUCTION, *cases, f"{asked}\n\nModel response: {response}\n\nExtracted answer: "])


def is_right(extraction: str, fields: Row) -> bool:
    """Compare an extracted answer with the gold one, both in the form of the answer's kind.

    An empty one still picks the most similar choice, like the official rule.
    """
    return normalise_extraction(extraction, fields) == fields["answer"]


def is_right_vlmevalkit(extraction: str, fields: Row) -> bool:
    """Compare an answer as VLMEvalKit does: the choice that it names, or an equal number, but never a list."""
    if fields["question_type"] == "multi_choice":
        choices, extraction = _lettered(fields), cell_as_text(extraction)
        gold = next((letter for letter, choice in choices.items() if choice == fields["answer"]), None)
        return vlmevalkit(extraction, choices) == fields.get("answer_option", gold)
    number = {"integer": int, "float": float}.get(fields["answer_type"])
    try:
        return number is not None and number(extraction) == number(fields["answer"])
    except ValueError:
        return False


def normalise_extraction(extraction: str, fields: Row) -> str | None:
    """An extracted answer in the form of the gold one; None if it has no such form."""
    choices = [str(choice) for choice in fields["choices"]]
    if fields["question_type"] == "multi_choice":
        if not choices:
            return None
        text = extraction.strip()
        letter = _LETTER.search(text)
        number = ord(letter[1].upper() if letter else text) - ord("A") if letter or len(text) == 1 else -1
        if 0 <= number < len(choices):
            return choices[number]
        return min(choices, key=lambda choice: edit_distance(letter[1].upper() if letter else text, choice))
    try:
        if fields["answer_type"] == "integer":
            return str(int(float(extraction)))
        if fields["answer_type"] == "float":
            return str(round(float(extraction), int(float(fields.get("precision", "")))))
    except (ValueError, OverflowError):
        return None
    return extraction


def _normal(row: Row) -> Row:
    metadata = row.get("metadata")
    described = {name: cell for name, cell in metadata.items() if name != "split"} if isinstance(metadata, dict) else {}
    image = row.get("image")
    named = isinstance(image, str) and Path(image).suffix.lower() in (".jpg", ".jpeg", ".png")
    path = {"image_path": image} if named else {}
    asked = {"question": row["query"]} if "query" in row and "question" not in row else {}  # lmms-eval's results
    kept = {name: cell for name, cell in row.items() if name not in ("metadata", "decoded_image")}
    return {**kept, **asked, **described, **path, "choices": as_list(row.get("choices", ""))}


def _lettered(fields: Row) -> dict[str, str]:
    return {chr(ord("A") + number): str(choice) for number, choice in enumerate(fields["choices"])}


def _parts(samples: Sequence[Sample], right: Mapping[Id, bool], names: Sequence[str]) -> dict[str, list[bool]]:
    """Right and wrong by the values of some columns, which may hold lists."""
    parts: dict[str, list[bool]] = {}
    for sample in samples:
        for value in (value for name in names for value in as_list(sample.fields.get(name, ""))):
            parts.setdefault(str(value), []).append(right[sample.id])
    return parts
