"""POPE (AoiDragon/POPE on COCO): is an object in the image, yes or no, asked in three splits.

LLaVA's scorer pairs answers and labels by line number, which is silently wrong when the label file is another
release than the question file. Here they are paired by split, image and question.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.benchmark import SHORT_INSTRUCTION, Benchmark, refuse_doubles
from eval.reading.tables import Row, read_rows
from eval.sample import Id, Sample, Score
from eval.scoring.headline import Headline, f1_headline
from eval.scoring.judge import Judge
from eval.scoring.vqa import yes_or_no
from llava_skip_base.errors import UserError, first_few

SPLITS = ("adversarial", "popular", "random")
LABEL_FILE = "coco_pope_"
QUESTION_FILE = "llava_pope_test.jsonl"
# What the number of questions of the random split tells; the other splits have 3000 in every release.
RELEASES = {2910: "the release that LLaVA's questions belong to", 3000: "a later release than LLaVA's questions"}


class POPE(Benchmark):
    """POPE as label files, LLaVA's question file with them, VLMEvalKit's TSV or the Hugging Face parquet."""

    name = "pope"
    rules = {
        "official": "pope-llava",
        "vlmevalkit": "pope/vlmevalkit-2026-08",
        "lmms-eval": "pope/lmms-eval-2026-08",
    }
    max_new_tokens = 128
    embedded = "pope.tsv"
    columns = ("question", "label", "category")
    public_names = {"label": "label (or answer)"}
    answer_columns = ("prediction", "text", "answer")

    def read(self, data: Path) -> list[Row]:
        """Read a file with labels, or LLaVA's question file and the label files of its folder."""
        if data.is_dir():
            return _read_folder(data)
        if data.name == QUESTION_FILE:
            return _read_folder(data.parent)
        return _labelled(read_rows(data), data)

    def normalise(self, rows: list[Row]) -> list[Row]:
        """Give image, question, label and split the same names, and each question an id."""
        rows = [_normal(row) for row in rows]
        ids = [row.get("index") or row.get("question_id") for row in rows]
        if all(ids) and len(set(ids)) == len(ids):
            return [{**row, "index": id_} for row, id_ in zip(rows, ids, strict=True)]
        return [{**row, "index": _key(row)} for row in rows]

    def image_folder(self, data: Path) -> Path:
        """val2014, LLaVA's folder of images."""
        folder = (data if data.is_dir() else data.parent) / "val2014"
        return folder if folder.is_dir() else super().image_folder(data)

    def prompts(self, samples: Sequence[Sample]) -> list[str]:
        """LLaVA's prompts."""
        return [f"{sample.fields['question']}\n{SHORT_INSTRUCTION}" for sample in samples]

    def predictions(self, rows: Sequence[Row], source: str, samples: Sequence[Sample]) -> dict[Id, str]:
        """Read the answers: by id, else by split, image and question, else line by line if every question agrees."""
        column = self.answer_column(rows, source)
        answered = [row for row in rows if column in row]
        known = {sample.id for sample in samples}
        asked = [_asked(row) for row in answered]
        if all(any(row.get(name) for name in self.id_columns) for row in answered):
            ids = [self.row_id(row) for row in answered]
            if known & set(ids):
                _refuse_others(samples, ids, asked, source)
                refuse_doubles(ids, source)
                return {id_: str(row[column]) for id_, row in zip(ids, answered, strict=True)}
        named = [_normal(row) for row in answered]
        keys = [_key(row) for row in named]
        by_key = {_key(s.fields): s.id for s in samples}
        if set(keys) & by_key.keys():
            refuse_doubles(keys, source)
            _refuse_other_release(named, samples, source)
            return {by_key.get(key, key): str(row[column]) for key, row in zip(keys, answered, strict=True)}
        if asked == [s.fields["question"] for s in samples]:
            return {s.id: str(row[column]) for s, row in zip(samples, answered, strict=True)}
        raise UserError(
            f"{source}: its rows have neither the ids nor the images of the questions, and its {len(rows)} questions "
            f"differ from the {len(samples)} labels' line by line, so they may be of another release"
            f"{_release_of(samples)}; give LLaVA's {QUESTION_FILE} with the label files of the same release."
        )

    def score(self, samples: Sequence[Sample], answers: Mapping[Id, str], judge: Judge | None = None) -> Score:
        """Score each split with "yes" as the positive class; the headline is the mean F1, or else the pooled."""
        official = self.chosen_rule == "official"
        said = {s.id: self._read(answers[s.id]) for s in samples}
        measures = lmms_eval_measures if self.chosen_rule == "lmms-eval" else _measures
        splits: dict[str, list[Sample]] = defaultdict(list)
        for sample in samples:
            for split in _splits(sample):
                splits[split].append(sample)
        scores: dict[str, Any] = {name: measures(own, said) for name, own in sorted(splits.items())}
        pooled = [sample for own in splits.values() for sample in own]
        scores["pooled"] = measures(pooled, said)
        scores["mean f1"] = sum(scores[name]["f1"] for name in splits) / len(splits)
        counts = {
            "questions": len(samples),
            "splits": {name: len(own) for name, own in sorted(splits.items())},
            "neither": sum(answer is None for answer in said.values()),
            "empty": sum(not answers[s.id].strip() for s in samples),
        }
        notes = [] if set(splits) == set(SPLITS) else [f"splits in the file: {', '.join(sorted(splits))}."]
        if counts["neither"]:
            taken = "leaves them out" if self.chosen_rule == "lmms-eval" else "takes them for no"
            notes.append(f"{counts['neither']} answers are neither yes nor no by the rule; F1 {taken}.")
        headline = scores["mean f1"] if official else scores["pooled"]["f1"]
        right: dict[Id, bool | float] = {s.id: said[s.id] == s.fields["label"] for s in samples}
        return Score("scored", self.rule, 100 * headline, scores, counts, notes, per_sample=right)

    def headline(
        self, samples: Sequence[Sample], answers: Mapping[Id, str], values: Mapping[str, bool | float]
    ) -> Headline:
        """The mean F1 of the splits, or else the pooled F1."""
        said = [self._read(answers[s.id]) for s in samples]
        counted = np.array([bool(answer) or self.chosen_rule != "lmms-eval" for answer in said])
        claimed, gold = (
            np.array([word == "yes" for word in words]) for words in (said, [s.fields["label"] for s in samples])
        )
        splits = [_splits(s) for s in samples]
        ids = [str(s.id) for s in samples]
        return f1_headline(ids, claimed, gold & counted, splits, self.chosen_rule != "official")

    def reading(self, answer: str, fields: Row) -> str:
        """Yes or no, else the answer's words."""
        return self._read(answer) or super().reading(answer, fields)

    def _read(self, answer: str) -> str | None:
        read = {"official": official_answer, "vlmevalkit": yes_or_no, "lmms-eval": lmms_eval_answer}[self.chosen_rule]
        return read(answer)


def _splits(sample: Sample) -> list[str]:
    return [split.strip() for split in sample.fields["category"].split(",")]


def official_answer(text: str) -> str:
    """Read "no" from the first sentence as LLaVA's scorer does; everything else is "yes"."""
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def lmms_eval_answer(text: str) -> str | None:
    """Read "yes" or "no" as lmms-eval does: the answer has to be the word, in any case and without a period."""
    text = text.lower().strip()
    return text if text in ("yes", "no") else None


def lmms_eval_measures(samples: Sequence[Sample], said: Mapping[Id, str | None]) -> dict[str, float]:
    """lmms-eval's measures: recall and F1 without the answers that are neither, the yes ratio of the gold answers."""
    read = _measures([s for s in samples if said[s.id]] or samples, said)
    accuracy = sum(said[s.id] == s.fields["label"] for s in samples) / len(samples)
    gold = sum(s.fields["label"] == "yes" for s in samples) / len(samples)
    return {**read, "accuracy": accuracy, "yes_ratio": gold}


def _measures(samples: Sequence[Sample], said: Mapping[Id, str | None]) -> dict[str, float]:
    pairs = [(said[s.id], s.fields["label"]) for s in samples]
    positive = sum(answer == label == "yes" for answer, label in pairs)
    claimed = sum(answer == "yes" for answer, _ in pairs)
    true = sum(label == "yes" for _, label in pairs)
    precision = positive / claimed if claimed else 0.0
    recall = positive / true if true else 0.0
    return {
        "f1": 2 * precision * recall / (precision + recall) if positive else 0.0,
        "accuracy": sum(answer == label for answer, label in pairs) / len(pairs),
        "precision": precision,
        "recall": recall,
        "yes_ratio": claimed / len(pairs),
    }


def _read_folder(folder: Path) -> list[Row]:
    """Read all label files of a folder and, if there is one, LLaVA's question file, whose questions then count."""
    files = sorted(path for path in folder.rglob(f"{LABEL_FILE}*.json*"))
    if not files:
        raise UserError(f"{folder}: holds no label files ({LABEL_FILE}{SPLITS[0]}.json and so on), nor below it.")
    labels = [_normal(row) for path in files for row in _labelled(read_rows(path), path)]
    questions = next((path for path in (folder / QUESTION_FILE, folder.parent / QUESTION_FILE) if path.is_file()), None)
    if questions is None:
        return labels
    gold = {_key(row): row["label"] for row in labels}
    asked = [_normal(row) for row in read_rows(questions)]
    lacking = [row.get("question_id", "?") for row in asked if _key(row) not in gold]
    if lacking:
        raise UserError(
            f"{questions}: {first_few(lacking)} of {len(asked)} questions have no label in "
            f"{first_few([file.name for file in files])}: the label files are of another release{_release_of(labels)}; "
            f"give those of the questions' release{_release_of(asked)}."
        )
    return [{**row, "label": gold[_key(row)]} for row in asked]


def _labelled(rows: list[Row], path: Path) -> list[Row]:
    """Add the split of a label file, which only its file name has."""
    if path.stem.startswith(LABEL_FILE) and "category" not in rows[0]:
        return [{**row, "category": path.stem.removeprefix(LABEL_FILE), "question_id": ""} for row in rows]
    return rows


def _refuse_others(samples: Sequence[Sample], ids: Sequence[Id], asked: Sequence[str], source: str) -> None:
    """Refuse predictions that have the ids of the questions but ask something else."""
    questions = {sample.id: sample.fields["question"] for sample in samples}
    others = [
        id_ for id_, question in zip(ids, asked, strict=True) if question and questions.get(id_, question) != question
    ]
    if others:
        raise UserError(
            f"{source}: {first_few(others)} rows have the id of another question, so the data may be of another release"
            f"{_release_of(samples)}; give the data that was asked."
        )


def _refuse_other_release(answered: Sequence[Row], samples: Sequence[Sample], source: str) -> None:
    """Refuse answers to the random split of one public release with the labels of another."""
    numbers = {_random(answered), _random(samples)}
    if numbers == RELEASES.keys():
        raise UserError(
            f"{source}: answers {_random(answered)} questions of the random split, and the labels are of another "
            f"release{_release_of(samples)}; give the label files of the release that was asked."
        )


def _release_of(rows: Sequence[Row | Sample]) -> str:
    """Which release has these questions, as a remark; nothing where their number tells none."""
    number = _random(rows)
    return f" ({number} in the random split: {RELEASES[number]})" if number in RELEASES else ""


def _random(rows: Sequence[Row | Sample]) -> int:
    fields = [row.fields if isinstance(row, Sample) else row for row in rows]
    return sum("random" in row.get("category", "").split(",") for row in fields)


def _asked(row: Row) -> str:
    """The question of a prediction row, without LLaVA's instruction."""
    text = row.get("question") or row.get("prompt") or ""
    return text.removesuffix(SHORT_INSTRUCTION).strip()


def _normal(row: Row) -> Row:
    asked = _asked(row) or row.get("text", "").removesuffix(SHORT_INSTRUCTION).strip()
    image = next((row[name] for name in ("image_source", "image_path", "image") if _is_name(row.get(name))), "")
    label = row.get("label") or (row.get("answer") if "label" not in row else "")
    named = {"question": asked, "category": row.get("category", ""), "label": str(label or "").strip().lower()}
    kept = {name: cell for name, cell in row.items() if name not in ("text", "answer", "label")}
    path = {"image_path": image if Path(image).suffix else f"{image}.jpg"} if image else {}
    return {**kept, **path, **{name: cell for name, cell in named.items() if cell}}


def _is_name(cell: object) -> bool:
    return isinstance(cell, str) and 0 < len(cell) <= 64


def _key(row: Row) -> str:
    return f"{row.get('category', '')}/{Path(row.get('image_path', '')).stem}: {row.get('question', '')}"
