"""MMStar (Lin-Chen/MMStar): multiple choice without copies, scored by the first characters of the answer.

VLMEvalKit and lmms-eval score it by rules of their own, whose numbers are not comparable with the official ones.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from string import ascii_uppercase

import numpy as np

from eval.benchmark import LETTER_INSTRUCTION, Benchmark
from eval.reading.tables import Row
from eval.sample import Id, Sample, Score, is_missing, listed_options, options
from eval.scoring.extraction import VERSIONS, is_lookalike, lmms_eval_extractor, vlmevalkit
from eval.scoring.headline import Headline, grouped_headline
from eval.scoring.judge import Judge
from eval.scoring.pandas_cells import cell_as_text, options_that_stay
from llava_skip_base.errors import UserError, first_few

# The official file's categories in the order of its score report, with the number of questions of each sub-category.
OFFICIAL = {
    "coarse perception": {"image scene and topic": 141, "image style & quality": 78, "image emotion": 31},
    "fine-grained perception": {"object counting": 92, "recognition": 118, "localization": 40},
    "instance reasoning": {
        "single-instance reasoning": 99,
        "cross-instance attribute reasoning": 89,
        "cross-instance relation reasoning": 62,
    },
    "logical reasoning": {"code & sequence reasoning": 39, "diagram reasoning": 110, "common reasoning": 101},
    "science & technology": {
        "biology & chemistry & physics": 146,
        "electronics & energy & mechanical eng.": 46,
        "geography & earth science & agriculture": 58,
    },
    "math": {"geometry": 116, "numeric commonsense and calculation": 48, "statistical reasoning": 86},
}
_LEADS = ("", "(", "option ", "the answer is ")
_LETTERED = re.compile(r"(?:^|,) *([A-D]): ")
_BRACKETED = re.compile(r"^\(([A-D])\) (.*)$", re.MULTILINE)


class MMStar(Benchmark):
    """MMStar in its published form (options inside the question) or with option columns."""

    name = "mmstar"
    rules = {
        "official": "mmstar-official",
        "vlmevalkit": f"mmstar/{VERSIONS['vlmevalkit']}",
        "lmms-eval": f"mmstar/{VERSIONS['lmms-eval-static']}",
    }
    protocols = ("skip-vision", "official", "vlmevalkit", "lmms-eval")
    max_new_tokens = 1024
    limits = {"official": 32}
    embedded = "mmstar.tsv"
    columns = ("question", "answer", "category", "l2_category")

    def check_whole(self, samples: Sequence[Sample], source: str) -> None:
        """Refuse a prediction file of the official categories with fewer rows than they have."""
        lacking = lacks_official_rows(samples)
        if lacking:
            raise UserError(
                f"{source}: lacks {lacking} of MMStar's 1500 rows; complete it, or give the benchmark file with --data."
            )

    def prompts(self, samples: Sequence[Sample]) -> list[str]:
        """Question, option columns if there are any, and the instruction of the protocol."""
        prompt = {
            "skip-vision": skip_vision_prompt,
            "official": official_prompt,
            "vlmevalkit": vlmevalkit_prompt,
            "lmms-eval": lmms_eval_prompt,
        }[self.chosen_protocol]
        return [prompt(sample.fields) for sample in samples]

    def score(self, samples: Sequence[Sample], answers: Mapping[Id, str], judge: Judge | None = None) -> Score:
        """Score by the chosen rule: fractions of all questions, of each category and of each sub-category."""
        lacking = [sample.id for sample in samples if is_missing(sample.fields["answer"])]
        if lacking:
            raise UserError(f"{first_few(lacking)} of {len(samples)} rows have no gold answer; give the whole file.")
        named = {s.id: self._named(answers[s.id], s.fields) for s in samples}
        official = self.chosen_rule == "official"
        golds = {s.id: s.fields["answer"] for s in samples}
        right = {
            id_: is_right(answers[id_], gold) if official else gold.strip() in named[id_] for id_, gold in golds.items()
        }
        hits: Counter[tuple[str, ...]] = Counter()
        totals = _totals(samples)
        for sample in samples:
            if right[sample.id]:
                category, sub = sample.fields["category"], sample.fields["l2_category"]
                hits.update([(), (category,), (category, sub)])
        shares = {part: hits[part] / total for part, total in totals.items()}
        if self.chosen_rule == "lmms-eval":
            shares = _unweighted(shares)
        scores = {_key(part): share for part, share in shares.items()}
        texts = [answers[s.id] for s in samples]
        counts = {
            "questions": len(samples),
            "hits": hits[()],
            "empty": sum(not text.strip() for text in texts),
            "lookalike_letters": sum(map(is_lookalike, texts)),
        }
        notes = []
        if not any(named.values()):
            notes.append(f"none of the {len(samples)} answers names an option by this rule, so all count as wrong.")
        if not official:
            notes.append(
                f"the rule {self.rule} is not MMStar's own: its numbers are not comparable with published ones."
            )
        score = 100 * scores["final score"]
        return Score("scored", self.rule, score, scores, counts, notes, per_sample=dict(right))

    def headline(
        self, samples: Sequence[Sample], answers: Mapping[Id, str], values: Mapping[str, bool | float]
    ) -> Headline:
        """The accuracy; by lmms-eval's rule the mean of the sub-categories'."""
        if self.chosen_rule != "lmms-eval":
            return super().headline(samples, answers, values)
        own = [s for s in samples if str(s.id) in values]
        groups = [f"{s.fields['category']}/{s.fields['l2_category']}" for s in own]
        ids = [str(s.id) for s in own]
        return grouped_headline(ids, np.array([values[id_] for id_ in ids]), groups, None)

    def reading(self, answer: str, fields: Row) -> str:
        """The letter that the answer names, else its words."""
        named = sorted(letter for letter in self._named(answer, fields) if letter)
        return "".join(named) or super().reading(answer, fields)

    def _named(self, prediction: str, fields: Row) -> set[str | None]:
        """The letters that an answer names; by the official rule each that would be right if it were gold."""
        if self.chosen_rule == "official":
            return {letter for letter in ascii_uppercase if is_right(prediction, letter)}
        if self.chosen_rule == "lmms-eval":
            letter = lmms_eval_extractor(prediction, "ABCD")
        else:
            listed = question_options(fields)
            letter = vlmevalkit(cell_as_text(prediction), options_that_stay(listed) if any(listed.values()) else listed)
        return {letter} - {None}


def skip_vision_prompt(fields: Row) -> str:
    """The paper's prompt: the question, with "image" instead of its placeholder, and the letter instruction."""
    return fields["question"].replace("<image 1>", "image") + listed_options(fields) + f"\n{LETTER_INSTRUCTION}"


def official_prompt(fields: Row) -> str:
    """The prompt of MMStar's own code for LLaVA: a letter is asked for only where there are option columns."""
    lines = listed_options(fields)
    return fields["question"] + lines + (f"\n{LETTER_INSTRUCTION}" if lines else "\nAnswer the question directly.")


def vlmevalkit_prompt(fields: Row) -> str:
    """VLMEvalKit's prompt for LLaVA models."""
    lines = "".join(f"\n{letter}. {text}" for letter, text in options(fields).items())
    return fields["question"] + lines + (f"\n{LETTER_INSTRUCTION}" if lines else "\nAnswer the question directly.")


def lmms_eval_prompt(fields: Row) -> str:
    """lmms-eval's prompt, whose instruction has no full stop."""
    return fields["question"].strip() + f"\n{LETTER_INSTRUCTION.removesuffix('.')}"


def question_options(fields: Row) -> dict[str, str]:
    """The options, from columns or from the question (`Options: A: x, B: y` or lines `(A) x`).

    Returns:
        Text by letter; letters with empty texts where the question has another form.
    """
    columns = {letter: fields[letter] for letter in ascii_uppercase if fields.get(letter)}
    if columns:
        return columns
    lead, _, listed = fields["question"].rpartition("Options:")
    if not lead:
        return dict(_BRACKETED.findall(fields["question"])) or dict.fromkeys("ABCD", "")
    parts = _LETTERED.split(listed.strip())
    return dict(zip(parts[1::2], (text.strip() for text in parts[2::2]), strict=True))


def gain_and_leakage(with_image: float, without_image: float, language_model: float) -> dict[str, float]:
    """MMStar's two measures of how a score depends on the images.

    Args:
        with_image: the model's score with images, 0 to 100.
        without_image: its score on the questions alone.
        language_model: the score of the language model that it was built on.

    Returns:
        The three scores, `multi-modal gain` (what images add) and `multi-modal leakage` (what training with images
        added to answers without them), in points.
    """
    return {
        "with image": with_image,
        "without image": without_image,
        "language model": language_model,
        "multi-modal gain": with_image - without_image,
        "multi-modal leakage": max(0.0, without_image - language_model),
    }


def is_right(prediction: str, gold: str) -> bool:
    """The official test: the gold letter must start the answer, bare or after one of three fixed leads."""
    text, letter = _normalise(prediction), _normalise(gold)
    return any(text.startswith(lead + letter) for lead in _LEADS)


def lacks_official_rows(samples: Sequence[Sample]) -> int:
    """The number of rows that a file of the official categories lacks; 0 for any other file."""
    seen = Counter((sample.fields["category"], sample.fields["l2_category"]) for sample in samples)
    official = {(name, sub): count for name, subs in OFFICIAL.items() for sub, count in subs.items()}
    if seen.keys() != official.keys():
        return 0
    return sum(max(0, count - seen[part]) for part, count in official.items())


def _normalise(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def _key(part: tuple[str, ...]) -> str:
    if not part:
        return "final score"
    return part[0] if len(part) == 1 else f"{part[0]}({part[1]})"


def _unweighted(shares: Mapping[tuple[str, ...], float]) -> dict[tuple[str, ...], float]:
    """Average sub-categories without weights, as lmms-eval does."""
    averaged: dict[tuple[str, ...], float] = dict(shares)
    for part in shares:
        subs = [share for sub, share in shares.items() if len(sub) == 2 and sub[: len(part)] == part]
        averaged[part] = sum(subs) / len(subs)
    return averaged


def _totals(samples: Sequence[Sample]) -> dict[tuple[str, ...], int]:
    """The number of questions of each part, in the official order, then parts of other names in the file's order."""
    counts = Counter((sample.fields["category"], sample.fields["l2_category"]) for sample in samples)
    official = [(name, sub) for name, subs in OFFICIAL.items() for sub in subs]
    parts = [part for part in official if part in counts] + [part for part in counts if part not in official]
    subs_of: dict[str, list[str]] = defaultdict(list)
    for category, sub in parts:
        subs_of[category].append(sub)
    totals: dict[tuple[str, ...], int] = {(): len(samples)}
    for category, subs in subs_of.items():
        totals[(category,)] = sum(counts[category, sub] for sub in subs)
        totals.update({(category, sub): counts[category, sub] for sub in subs})
    return totals
