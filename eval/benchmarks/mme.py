"""MME (MME_Benchmark_release_version): two yes/no questions for each image, in 14 categories."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.benchmark import SHORT_INSTRUCTION, Benchmark
from eval.reading.tables import Row, read_rows
from eval.sample import Id, Sample, Score
from eval.scoring.headline import Headline, grouped_headline
from eval.scoring.judge import Judge
from eval.scoring.vqa import yes_or_no
from llava_skip_base.errors import UserError, first_few
from llava_skip_base.files import read_text

PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()
YES_NO_INSTRUCTION = "Please answer yes or no."
RELEASE = "MME_Benchmark_release_version"
IMAGE_SUFFIXES = (".jpg", ".png", ".jpeg")


class MME(Benchmark):
    """MME as its release folder, a folder of result files, VLMEvalKit's TSV or the Hugging Face parquet."""

    name = "mme"
    rules = {
        "official": "mme-official",
        "vlmevalkit": "mme/vlmevalkit-2026-08",
        "lmms-eval": "mme/lmms-eval-2026-08",
    }
    max_new_tokens = 128
    embedded = "mme.tsv"
    columns = ("category", "picture", "question", "gold")
    public_names = {"picture": "image_path (or question_id)", "gold": "answer"}
    full_score = 2000.0

    def read(self, data: Path) -> list[Row]:
        """Read a file, or a folder with the release or with one txt file for each category."""
        return read_folder(data) if data.is_dir() else read_rows(data)

    def read_predictions(self, path: Path) -> list[Row]:
        """Read a file, or the folder of txt files that the official scorer takes."""
        return self.read(path)

    def normalise(self, rows: list[Row]) -> list[Row]:
        """Give category, image (`picture`), question and gold the same names, and each question an id."""
        return [_normal(row) for row in rows]

    def image_folder(self, data: Path) -> Path:
        """The folder that holds the categories' folders."""
        if data.is_dir():
            return data / RELEASE if (data / RELEASE).is_dir() else data
        return super().image_folder(data)

    def prompts(self, samples: Sequence[Sample]) -> list[str]:
        """LLaVA's prompts: the short-answer instruction instead of the file's own."""
        return [f"{_bare(sample.fields['question'])}\n{SHORT_INSTRUCTION}" for sample in samples]

    def predictions(self, rows: Sequence[Row], source: str, samples: Sequence[Sample]) -> dict[Id, str]:
        """Read the answers; two rows share LLaVA's question_id, so the question is part of the id."""
        known = {sample.id for sample in samples}
        named = [row if row.get("id") in known else _normal(row) for row in rows]
        return super().predictions(named, source, samples)

    def score(self, samples: Sequence[Sample], answers: Mapping[Id, str], judge: Judge | None = None) -> Score:
        """Sum accuracy and accuracy over both questions of an image, in percent, over the categories."""
        pairs: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
        said = {s.id: self._read(answers[s.id]) for s in samples}
        right = {s.id: said[s.id] == s.fields["gold"].lower() for s in samples}
        other = sum(answer is None for answer in said.values())
        for sample in samples:
            pairs[sample.fields["category"]][sample.fields["picture"]].append(right[sample.id])
        odd = [f"{name}/{image}" for name, own in pairs.items() for image, two in own.items() if len(two) != 2]
        if odd:
            raise UserError(
                f"{first_few(odd)} images do not have two questions; MME asks two about each. Give the whole file."
            )
        order = [name for name in (*PERCEPTION, *COGNITION) if name in pairs]
        order += [name for name in pairs if name not in order]
        parts = {name: _accuracies(list(pairs[name].values())) for name in order}
        sums = {name: part["acc"] + part["acc_plus"] for name, part in parts.items()}
        scores: dict[str, Any] = {
            "perception": sum(sums[name] for name in PERCEPTION if name in sums),
            "cognition": sum(sums[name] for name in COGNITION if name in sums),
            "categories": sums,
            "accuracies": parts,
        }
        counts = {"questions": len(samples), "pictures": sum(map(len, pairs.values())), "other": other}
        counts["empty"] = sum(not answers[s.id].strip() for s in samples)
        notes = ["the score is the sum over the perception categories, 2000 at most; cognition has 800."]
        lacking = [name for name in (*PERCEPTION, *COGNITION) if name not in pairs]
        if lacking:
            notes.append(f"no questions of {first_few(lacking)} categories: the sums are over the others.")
        if other:
            notes.append(f"{other} answers are neither yes nor no by the rule and count as wrong.")
        return Score("scored", self.rule, scores["perception"], scores, counts, notes, per_sample=dict(right))

    def headline(
        self, samples: Sequence[Sample], answers: Mapping[Id, str], values: Mapping[str, bool | float]
    ) -> Headline:
        """The sum over the perception categories of both accuracies; that of both questions is in the first's row."""
        own = [s for s in samples if s.fields["category"] in PERCEPTION and str(s.id) in values]
        pairs: dict[tuple[str, str], list[int]] = defaultdict(list)
        for number, sample in enumerate(own):
            pairs[sample.fields["category"], sample.fields["picture"]].append(number)
        hits = np.array([bool(values[str(s.id)]) for s in own])
        asked = {two[0]: all(hits[two]) for two in pairs.values()}
        # Rows of single questions, then rows of pairs, each group a category; a pair has the id of its first question.
        ids = [str(s.id) for s in own]
        singles = grouped_headline(ids, hits, [s.fields["category"] for s in own], 100.0)
        firsts = [ids[first] for first in asked]
        both = grouped_headline(firsts, np.array([*asked.values()]), [own[n].fields["category"] for n in asked], 100.0)
        width = singles.parts.shape[1]
        return Headline(
            tuple(ids),
            np.hstack([singles.parts, both.of(ids)]),
            lambda sums: singles.function(sums[..., :width]) + both.function(sums[..., width:]),
        )

    def reading(self, answer: str, fields: Row) -> str:
        """Yes or no, else the answer's words."""
        return self._read(answer) or super().reading(answer, fields)

    def _read(self, answer: str) -> str | None:
        read = {"official": official_answer, "vlmevalkit": yes_or_no, "lmms-eval": lmms_eval_answer}[self.chosen_rule]
        return read(answer)


def official_answer(text: str) -> str | None:
    """Read "yes" or "no" as the official scorer does: among the first four characters; else None."""
    start = text.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), None)


def lmms_eval_answer(text: str) -> str | None:
    """Read "yes" or "no" as lmms-eval does: as the official scorer, but without periods, and also from one letter."""
    text = text.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(text, official_answer(text))


def read_folder(folder: Path) -> list[Row]:
    """Read the release (a folder for each category) or result files (a txt file for each category).

    Raises:
        UserError: it is neither, or a line has another number of fields.
    """
    if (folder / RELEASE).is_dir():
        folder = folder / RELEASE
    names = (*PERCEPTION, *COGNITION)
    rows: list[Row] = []
    for name in names:
        if (folder / f"{name}.txt").is_file():
            rows += _result_rows(folder / f"{name}.txt", name)
        elif (folder / name).is_dir():
            rows += _release_rows(folder / name, name)
    if not rows:
        raise UserError(
            f"{folder}: holds neither a folder nor a txt file of any MME category ({', '.join(names[:3])}...)."
        )
    return rows


def _result_rows(path: Path, category: str) -> list[Row]:
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        fields = line.split("\t")
        if line.strip() and len(fields) not in (3, 4):
            raise UserError(
                f"{path}, line {number}: {len(fields)} fields; expected image, question, gold and answer, by tabs."
            )
        if line.strip():
            named = dict(zip(("image_path", "question", "answer", "prediction"), fields, strict=False))
            rows.append({"category": category, **named})
    return rows


def _release_rows(folder: Path, category: str) -> list[Row]:
    nested = (folder / "images").is_dir()
    images = folder / "images" if nested else folder
    rows = []
    for path in sorted((folder / "questions_answers_YN" if nested else folder).glob("*.txt")):
        named = [images / (path.stem + suffix) for suffix in IMAGE_SUFFIXES]
        image = next((name for name in named if name.is_file()), named[0])
        for number, line in enumerate(read_text(path).strip().split("\n"), start=1):
            question, tab, answer = line.strip().partition("\t")
            if not tab:
                raise UserError(f"{path}, line {number}: expected a question, a tab and yes or no.")
            name = str(image.relative_to(folder.parent))
            rows.append({"category": category, "image_path": name, "question": question, "answer": answer})
    return rows


def _accuracies(pairs: list[list[bool]]) -> dict[str, float]:
    right = [answer for two in pairs for answer in two]
    return {"acc": 100 * sum(right) / len(right), "acc_plus": 100 * sum(map(all, pairs)) / len(pairs)}


def _bare(question: str) -> str:
    """A question without the instructions that the file or LLaVA add to it."""
    for instruction in (SHORT_INSTRUCTION, YES_NO_INSTRUCTION):
        question = question.replace(instruction, "")
    return " ".join(question.split())


def _normal(row: Row) -> Row:
    path = str(next((row[name] for name in ("image_path", "question_id", "image_name") if row.get(name)), ""))
    question = row.get("question") or row.get("prompt") or ""
    category = row.get("category") or path.partition("/")[0]
    image = row.get("picture") or Path(path).name.split(".")[0]
    named = {"category": category, "picture": image, "question": question}
    if row.get("answer"):
        named["gold"] = str(row["answer"]).strip()
    kept = {name: cell for name, cell in row.items() if name not in ("answer", "question_id", "prompt")}
    return {
        **kept,
        **{name: cell for name, cell in named.items() if cell},
        "index": f"{category}/{image}: {_bare(question)}",
    }
