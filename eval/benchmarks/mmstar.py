"""MMStar (Lin-Chen/MMStar): multiple choice without copies, scored by the first characters of the answer."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from eval.benchmarks.base import LETTER_INSTRUCTION, Benchmark, Id, Sample, Score, is_missing, listed_options
from eval.errors import EvalError, some
from eval.judge import Judge

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


class MMStar(Benchmark):
    """MMStar in its published form (options inside the question) or with option columns."""

    name = "mmstar"
    rule = "mmstar-official"
    max_new_tokens = 1024
    embedded = "mmstar.tsv"
    columns = ("question", "answer", "category", "l2_category")

    def check_whole(self, samples: Sequence[Sample], source: str) -> None:
        """Refuse a prediction file of the official categories with fewer rows than they have."""
        lacking = lacks_official_rows(samples)
        if lacking:
            raise EvalError(
                f"{source}: lacks {lacking} of MMStar's 1500 rows; complete it, or give the benchmark file with --data."
            )

    def protocol(self, samples: Sequence[Sample]) -> str:
        """Name the prompt of the Skip-Vision evaluation, which asks for the letter."""
        return "skip-vision"

    def prompts(self, samples: Sequence[Sample]) -> list[str]:
        """Word question, option columns if there are any, and the instruction."""
        return [
            s.fields["question"].replace("<image 1>", "image") + listed_options(s.fields) + f"\n{LETTER_INSTRUCTION}"
            for s in samples
        ]

    def score(self, samples: Sequence[Sample], answers: Mapping[Id, str], judge: Judge | None = None) -> Score:
        """Score by the official rule: fractions of all questions, of each category and of each sub-category."""
        lacking = [sample.id for sample in samples if is_missing(sample.fields["answer"])]
        if lacking:
            raise EvalError(f"{some(lacking)} of {len(samples)} rows have no gold answer; give the whole file.")
        hits: Counter[tuple[str, ...]] = Counter()
        totals = _totals(samples)
        for sample in samples:
            if is_right(answers[sample.id], sample.fields["answer"]):
                category, sub = sample.fields["category"], sample.fields["l2_category"]
                hits.update([(), (category,), (category, sub)])
        scores = {_key(part): hits[part] / total for part, total in totals.items()}
        counts = {"questions": len(samples), "hits": hits[()], "empty": sum(not answers[s.id].strip() for s in samples)}
        return Score("scored", self.rule, 100 * scores["final score"], scores, counts)


def is_right(prediction: str, gold: str) -> bool:
    """Apply the official test: the gold letter must open the answer, bare or after one of three fixed leads.

    Args:
        prediction: the model's answer.
        gold: the right letter.
    """
    text, letter = _normalise(prediction), _normalise(gold)
    return any(text.startswith(lead + letter) for lead in _LEADS)


def lacks_official_rows(samples: Sequence[Sample]) -> int:
    """Count the rows that a file of the official categories lacks; 0 for any other file.

    Args:
        samples: rows with their categories.
    """
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


def _totals(samples: Sequence[Sample]) -> dict[tuple[str, ...], int]:
    """Count the questions of each part, in the official order, parts of other names after it as the file has them."""
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
