"""MMMU (MMMU/MMMU validation): multiple-choice and open questions of 30 subjects.

Source: MMMU-Benchmark/MMMU `eval_utils.py` and `main_eval_only.py`; the rules of others are in `mmmu_peers`.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from eval.benchmark import LETTER_INSTRUCTION, SHORT_INSTRUCTION, Benchmark
from eval.reading.images import ImageSource, image_data, row_images
from eval.reading.tables import Row, read_rows
from eval.sample import Id, Sample, Score, as_list, options
from eval.scoring.extraction import VERSIONS
from eval.scoring.headline import Headline, split_headline
from eval.scoring.judge import Judge
from eval.scoring.mmmu_peers import is_right_vlmevalkit, lmms_eval_letter
from llava_skip_base.errors import UserError, first_few
from llava_skip_base.files import write_json

DOMAINS = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy "
    "Public_Health",
    "Humanities and Social Science": "History Literature Sociology Psychology",
    "Tech and Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power "
    "Materials Mechanical_Engineering",
}
SEED = 42
LMMS_EVAL_SEED = 0
LMMS_EVAL_MENDED = "0.7.3"
MULTIPLE_CHOICE = "multiple-choice"
_CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


class MMMU(Benchmark):
    """MMMU as parquet files, the answer file of its evaluator, its output files, or VLMEvalKit's TSV."""

    name = "mmmu"
    rules = {
        "official": "mmmu-official",
        "vlmevalkit": f"mmmu/{VERSIONS['vlmevalkit']}",
        "lmms-eval": "mmmu/lmms-eval-0.7.3",
        "lmms-eval-0.7.2": "mmmu/lmms-eval-to-0.7.2",
    }
    protocols = ("official-llava", "lmms-eval")
    max_new_tokens = 1024
    limits = {"lmms-eval": 128}
    embedded = "mmmu.tsv"
    columns = ("question_type", "gold")
    optional_columns = ("options",)
    list_columns = frozenset({"gold", "options"})
    public_names = {"gold": "answer (or ground_truth)"}
    id_columns = ("id", "index", "question_id")
    answer_columns = ("prediction", "response", "parsed_pred", "text")
    submission = "submission.json"

    def read(self, data: Path) -> list[Row]:
        """Read a file, or the validation files of a folder with one folder for each subject."""
        if not data.is_dir():
            return read_rows(data)
        files = sorted(data.rglob("validation-*.parquet")) or sorted(data.glob("*/output.json"))
        if not files:
            raise UserError(f"{data}: holds neither validation-*.parquet nor SUBJECT/output.json.")
        return [row for path in files for row in read_rows(path)]

    def read_predictions(self, path: Path) -> list[Row]:
        """Read a file, or a folder with the output.json of each subject."""
        return self.read(path)

    def normalise(self, rows: list[Row]) -> list[Row]:
        """Give kind of question, options, gold and subject the same names."""
        return [_normal(row) for row in rows]

    def find_images(self, rows: list[Row], folder: Path) -> list[tuple[ImageSource, ...]]:
        """The first image of each row, or with lmms-eval's protocol all that question and options name."""
        first = row_images(rows, folder)
        if self.chosen_protocol != "lmms-eval":
            return [(image,) for image in first]
        shown = [named_images(row, image) for row, image in zip(rows, first, strict=True)]
        for image in (image for images in shown for image in images[1:]):
            image.check()
        return shown

    def prompts(self, samples: Sequence[Sample]) -> list[str]:
        """The prompts that MMMU's own code gives LLaVA 1.5, or lmms-eval's."""
        return [_prompt(sample.fields, self.chosen_protocol) for sample in samples]

    def score(self, samples: Sequence[Sample], answers: Mapping[Id, str], judge: Judge | None = None) -> Score:
        """Score by subject, domain and over all, each question counting the same."""
        if self.chosen_rule == "vlmevalkit":
            return self._score_vlmevalkit(samples, answers)
        notes = []
        own = [s for s in samples if s.fields.get("split") == "validation"] or list(samples)
        if len(own) < len(samples):
            notes.append(f"{len(samples) - len(own)} questions are not of the validation split and are left out.")
        if all(s.fields["gold"] == ["?"] for s in own):
            notes.append("the file has no gold answers (the test split): write the submission and send it.")
            return Score("unscored", self.rule, counts=self._counts(own, answers, {}), notes=notes)
        official = self.chosen_rule == "official"
        right, drawn = official_hits(own, answers) if official else self._lmms_eval_hits(own, answers)
        counts = self._counts(own, answers, right) | {"drawn_at_random": drawn, "left_out": len(samples) - len(own)}
        bare = [s.id for s in own if s.fields["question_type"] == MULTIPLE_CHOICE and not s.fields["options"]]
        if bare:
            notes.append(
                f"the options of {first_few(bare)} questions are not in the file: only a bare gold letter is right."
            )
        if drawn and official:
            notes.append(f"{drawn} answers named no option; like the official code, a letter was drawn (seed {SEED}).")
        elif drawn:
            notes.append(
                f"{drawn} answers named no option; a letter was drawn (seed {LMMS_EVAL_SEED}), and lmms-eval, whose "
                "draws depend on all that it drew before, can draw others."
            )
        if self.chosen_rule == "lmms-eval-0.7.2":
            notes.append(f"lmms-eval counted every open question as wrong until {LMMS_EVAL_MENDED}.")
        score = 100 * sum(right.values()) / len(right)
        scores = _by_domain(own, right, 3 if official else 5)
        return Score("scored", self.rule, score, scores, counts, notes, per_sample=dict(right))

    def headline(
        self, samples: Sequence[Sample], answers: Mapping[Id, str], values: Mapping[str, bool | float]
    ) -> Headline:
        """The accuracy of the headline's split."""
        return split_headline(values, {str(s.id): s.fields.get("split") or "none" for s in samples}, "validation")

    def reading(self, answer: str, fields: Row) -> str:
        """The option that the answer names, else its words."""
        options = fields["options"] if fields["question_type"] == MULTIPLE_CHOICE else {}
        return (choose(answer, options) if options else None) or super().reading(answer, fields)

    def _score_vlmevalkit(self, samples: Sequence[Sample], answers: Mapping[Id, str]) -> Score:
        right = {sample.id: is_right_vlmevalkit(answers[sample.id], sample.fields) for sample in samples}
        splits: dict[str, list[Sample]] = defaultdict(list)
        for sample in samples:
            splits[sample.fields.get("split") or "none"].append(sample)
        scores = {split: _shares(own, right) for split, own in splits.items()}
        headline = "validation" if "validation" in scores else next(iter(scores))
        notes = ["open questions become a choice of two, as in VLMEvalKit; not comparable with the official rule."]
        if len(scores) > 1:
            notes.append(f"the splits {', '.join(scores)} are not mixed; the score is that of {headline}.")
        bare = [s.id for s in samples if s.fields["question_type"] == MULTIPLE_CHOICE and not s.fields["options"]]
        if bare:
            notes.append(
                f"the options of {first_few(bare)} questions are not in the file, so the rule takes them for open."
            )
        counts = self._counts(samples, answers, right)
        score = 100 * scores[headline]["Overall"]
        return Score("scored", self.rule, score, scores, counts, notes, per_sample=dict(right))

    def _lmms_eval_hits(self, samples: Sequence[Sample], answers: Mapping[Id, str]) -> tuple[dict[Id, bool], int]:
        right, drawn = _hits(samples, answers, lmms_eval_letter, LMMS_EVAL_SEED)
        for sample in samples:
            if sample.fields["question_type"] != MULTIPLE_CHOICE:
                # lmms-eval does not take a written list apart: the list as a whole is the one reference.
                references = sample.fields["answer_cell"]
                references = references if isinstance(references, list) else [references]
                found = is_right_open(answers[sample.id], references)
                right[sample.id] = found and self.chosen_rule == "lmms-eval"
        return right, drawn

    def _counts(self, samples: Sequence[Sample], answers: Mapping[Id, str], right: Mapping[Id, bool]) -> dict[str, Any]:
        kinds = Counter(s.fields["question_type"] for s in samples)
        empty = sum(not answers[s.id].strip() for s in samples)
        return {"questions": len(samples), "hits": sum(right.values()), "kinds": dict(kinds), "empty": empty}

    def write_submission(self, samples: Sequence[Sample], answers: Mapping[Id, str], path: Path) -> list[str]:
        """Write the file that MMMU's evaluator and server read: a letter or the raw answer by id."""
        rng = Random(SEED)
        written = {}
        for sample in sorted(samples, key=lambda sample: sample.fields["subject"]):
            text = answers[sample.id]
            if sample.fields["question_type"] == MULTIPLE_CHOICE and sample.fields["options"]:
                text = choose(text, sample.fields["options"]) or rng.choice(list(sample.fields["options"]))
            written[str(sample.id)] = text
        write_json(path, {str(sample.id): written[str(sample.id)] for sample in samples})
        return [f"{path}: {len(samples)} answers for MMMU's evaluator."]


def official_hits(samples: Sequence[Sample], answers: Mapping[Id, str]) -> tuple[dict[Id, bool], int]:
    """Decide which answers are right, drawing a letter where a multiple-choice answer names no option.

    Returns:
        Right or wrong by id, and the number of letters that were drawn.
    """
    # Subjects in alphabetical order, as in the official run, because unreadable answers draw from one generator.
    ordered = sorted(samples, key=lambda sample: sample.fields["subject"])
    return _hits(ordered, answers, choose, SEED)


def _hits(
    samples: Sequence[Sample],
    answers: Mapping[Id, str],
    read: Callable[[str, Mapping[str, str]], str | None],
    seed: int,
) -> tuple[dict[Id, bool], int]:
    rng, drawn = Random(seed), 0
    right: dict[Id, bool] = {}
    for sample in samples:
        gold = sample.fields["gold"]
        if sample.fields["question_type"] != MULTIPLE_CHOICE:
            right[sample.id] = is_right_open(answers[sample.id], gold)
            continue
        letter = read(answers[sample.id], sample.fields["options"])
        if letter is None:
            drawn += 1
            letter = rng.choice(list(sample.fields["options"]))
        right[sample.id] = letter in gold
    return right, drawn


def choose(response: str, choices: Mapping[str, str]) -> str | None:
    """The last option that a response names: by `(A)`, by a letter alone, or in a longer answer by its text.

    Args:
        response: what the model wrote.
        choices: text by letter; empty where the file has no options, and then the response has to be the letter.

    Returns:
        A letter, or None if no option is named.
    """
    if not choices:
        return response
    for mark in ",.!?;:'":
        response = response.strip(mark)
    padded = f" {response} "
    for form in ("({})", " {} "):
        positions = {letter: padded.rfind(form.format(letter)) for letter in choices}
        if max(positions.values()) >= 0:
            return max(positions, key=lambda letter: positions[letter])
    if len(padded.split()) > 5:
        positions = {letter: padded.lower().rfind(text.lower()) for letter, text in choices.items()}
        if max(positions.values()) >= 0:
            return max(positions, key=lambda letter: positions[letter])
    return None


def is_right_open(response: str, gold: Sequence[object]) -> bool:
    """The official test of open questions: a reference occurs in what the response states, or a number is equal."""
    accepted = [form for reference in gold for form in _forms(str(reference))]
    stated = key_statements(response)
    numbers = [found for text in stated for pattern in _NUMBERS for found in pattern.findall(text)]
    for said in (form for text in (*stated, *numbers) for form in _forms(text)):
        if isinstance(said, str) and any(isinstance(form, str) and form in said for form in accepted):
            return True
        if isinstance(said, float) and said in accepted:
            return True
    return False


def key_statements(response: str) -> list[str]:
    """Take from each line of a response the shortest tail after a cue such as "is ", or the whole if there is none."""
    whole = response.strip().strip(".").lower()
    lines = whole.split("\n")
    found = []
    for number, line in enumerate(lines, start=1):
        cues = (*_CUES, "=") if number == len(lines) else _CUES
        shortest = ""
        for tail in (line.split(cue)[-1].strip() for cue in cues if cue in line):
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in tuple(":,.!?;'"):
            found.append(shortest)
    return found or [whole]


def _forms(text: str) -> list[str | float]:
    """A text as a number of two decimals, or in lower case; a letter alone gets a space, to match only words."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        pass
    text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _by_domain(samples: Sequence[Sample], right: Mapping[Id, bool], digits: int) -> dict[str, Any]:
    subjects: dict[str, list[bool]] = defaultdict(list)
    for sample in samples:
        subjects[sample.fields["subject"]].append(right[sample.id])

    def share(names: Sequence[str]) -> dict[str, Any]:
        hits = [hit for name in names for hit in subjects[name]]
        return {"num": len(hits), "acc": round(sum(hits) / len(hits), digits)}

    scores: dict[str, Any] = {}
    for domain, listed in DOMAINS.items():
        present = [name for name in listed.split() if name in subjects]
        if present:
            scores[f"Overall-{domain}"] = share(present)
            scores |= {name: share([name]) for name in present}
    scores |= {name: share([name]) for name in subjects if name not in scores}
    return {**scores, "Overall": share(list(subjects))}


def _shares(samples: Sequence[Sample], right: Mapping[Id, bool]) -> dict[str, Any]:
    def share(own: Sequence[Sample]) -> float:
        return sum(right[s.id] for s in own) / len(own)

    scores: dict[str, Any] = {"Overall": share(samples)}
    for column in ("l2_category", "category"):
        values = sorted({s.fields[column] for s in samples if s.fields.get(column)})
        scores |= {value: share([s for s in samples if s.fields.get(column) == value]) for value in values}
    return scores


def named_images(row: Row, first: ImageSource) -> tuple[ImageSource, ...]:
    """The images that `<image n>` in a normalised row's question or options means; the first where none is named."""
    text = "\n".join([row.get("question", ""), *row["options"].values()])
    images = []
    for number in sorted({int(found) for found in re.findall(r"<image (\d+)>", text)} or {1}):
        data = image_data(row.get(f"image_{number}"))
        images.append(ImageSource(first.sample, data) if data else replace(first, number=number - 1))
    return tuple(images)


def _prompt(fields: Row, protocol: str) -> str:
    if "question" not in fields:
        raise UserError(
            "the file holds no questions, only gold answers; give MMMU's parquet files or VLMEvalKit's TSV."
        )
    form, gap = ("{}. {}\n", "\n") if protocol == "lmms-eval" else ("({}) {}\n", "")
    if fields["question_type"] != MULTIPLE_CHOICE:
        return f"{fields['question']}\n{gap}{SHORT_INSTRUCTION}"
    listed = "".join(form.format(letter, text) for letter, text in fields["options"].items())
    return f"{fields['question']}\n{listed}\n{LETTER_INSTRUCTION}"


def _normal(row: Row) -> Row:
    gold = next((row[name] for name in ("ground_truth", "answer") if name in row), None)
    choices = _choices(row)
    kind = row.get("question_type") or (MULTIPLE_CHOICE if choices else "open")
    id_ = str(row.get("id", ""))
    subject = "_".join(id_.split("_")[1:-1]) or row.get("category", "").replace(" ", "_")
    image = {"image": row["image_1"]} if row.get("image_1") else {}
    kept = {name: cell for name, cell in row.items() if name not in ("ground_truth", "answer", "index2ans")}
    found = {} if gold is None or gold == "" else {"gold": as_list(gold), "answer_cell": gold}
    return {**kept, **image, **found, "options": choices, "question_type": kind, "subject": subject or "none"}


def _choices(row: Row) -> dict[str, str]:
    if isinstance(row.get("index2ans"), dict):
        return {letter: str(text) for letter, text in row["index2ans"].items()}
    if isinstance(row.get("options"), dict):
        return {str(letter): str(text) for letter, text in row["options"].items()}
    listed = as_list(row.get("options", ""))
    if listed:
        return {chr(ord("A") + number): str(text) for number, text in enumerate(listed)}
    return options(row)
