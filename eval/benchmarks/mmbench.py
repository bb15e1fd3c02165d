"""MMBench (MMBench TSV, open-compass): multiple choice, scored circularly over rotated copies of each question.

Index g < 1e6 is a question, index k*1e6 + g its k-th copy with rotated options. A question is a hit only if it and all
its copies are answered right. Copies are never made here, because some groups of the public files have fewer.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from eval.benchmarks.base import (
    LETTER_INSTRUCTION,
    Benchmark,
    Id,
    Sample,
    Score,
    is_missing,
    listed_options,
    options,
)
from eval.errors import EvalError, some
from eval.extraction import NO_CHOICE, RULE, extract_choice
from eval.judge import Judge
from eval.tables import Row

PASS_STEP = 1_000_000
CHINESE_INSTRUCTION = "请直接回答选项字母。"
ABBREVIATIONS = {
    "attribute_reasoning": "AR",
    "coarse_perception": "CP",
    "finegrained_perception (cross-instance)": "FP-C",
    "finegrained_perception (instance-level)": "FP-S",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
}
_CHINESE = re.compile("[\u4e00-\u9fff]")

Groups = dict[int, list[Sample]]


class MMBench(Benchmark):
    """MMBench dev and test, English and Chinese, v1.0 and v1.1, and CCBench."""

    name = "mmbench"
    rule = f"mmbench-circular/{RULE}"
    max_new_tokens = 1024
    embedded = "mmbench.tsv"
    columns = ("question", "A", "B")  # test files have no answers

    def samples(self, rows: Sequence[Row]) -> list[Sample]:
        """Turn rows into samples; every copy needs its question and all earlier copies."""
        samples = super().samples(rows)
        words = [sample.id for sample in samples if not isinstance(sample.id, int)]
        if words:
            raise EvalError(f"MMBench indices are whole numbers, saw {some(words)}; is this an MMBench file?")
        gaps = [
            first
            for first, passes in group(samples).items()
            if [sample.id for sample in passes] != [first + k * PASS_STEP for k in range(len(passes))]
        ]
        if gaps:
            raise EvalError(
                f"{some(gaps)} questions lack the main row or a copy before their last one; circular scoring needs "
                f"every pass (index + k*{PASS_STEP}). Give the whole file."
            )
        return samples

    def limit(self, samples: list[Sample], count: int) -> list[Sample]:
        """Keep the first ``count`` questions with all their copies."""
        kept = set(list(group(samples))[:count])
        return [sample for sample in samples if _question(sample) in kept]

    def check_whole(self, samples: Sequence[Sample], source: str) -> None:
        """Refuse a prediction file with fewer passes than options, such as VLMEvalKit's file of one row a question."""
        short = short_groups(samples)
        if short:
            raise EvalError(
                f"{source}: {some(short)} questions have fewer passes than options, so circular scoring would be too "
                "kind; give the file with a row for every pass, or the benchmark file with --data."
            )

    def protocol(self, samples: Sequence[Sample]) -> str:
        """Name LLaVA's prompt, in the file's language."""
        return "llava-cn" if _is_chinese(samples) else "llava-en"

    def prompts(self, samples: Sequence[Sample]) -> list[str]:
        """Word LLaVA's MMBench prompts; the instruction follows the language of the file, not of single rows."""
        instruction = CHINESE_INSTRUCTION if _is_chinese(samples) else LETTER_INSTRUCTION
        return [f"{question_text(sample.fields)}\n{instruction}" for sample in samples]

    def score(self, samples: Sequence[Sample], answers: Mapping[Id, str], judge: Judge | None = None) -> Score:
        """Score circularly (official) and plainly (for comparison), overall and by ability of the main row."""
        letters = {s.id: extract_choice(answers[s.id], options(s.fields)) for s in samples}
        groups = group(samples)
        graded = {first: passes for first, passes in groups.items() if all(_gold(sample) for sample in passes)}
        counts = _counts(groups, graded, letters)
        notes = _notes(groups, graded)
        if not graded:
            return Score("unscored", self.rule, counts=counts, notes=notes)
        scores = {
            split: _split_scores({first: groups[first] for first in firsts}, letters)
            for split, firsts in _by(graded, "split", default="none").items()
        }
        headline = "dev" if "dev" in scores else next(iter(scores))
        if len(scores) > 1:
            notes.append(f"the splits {', '.join(scores)} are not mixed; the score is that of {headline}.")
        return Score("scored", self.rule, 100 * scores[headline]["Overall"], scores, counts, notes)


def question_text(fields: Row) -> str:
    """Word hint, question and options, without the instruction."""
    hint = fields.get("hint", "")
    return ("" if is_missing(hint) else f"{hint}\n") + fields["question"] + listed_options(fields)


def group(samples: Sequence[Sample]) -> Groups:
    """Gather the passes of each question, by the question's index, the main row first."""
    groups: Groups = defaultdict(list)
    for sample in samples:
        groups[_question(sample)].append(sample)
    return {first: sorted(passes, key=lambda sample: int(sample.id)) for first, passes in groups.items()}


def short_groups(samples: Sequence[Sample]) -> list[int]:
    """Find questions that seem to lack their last copies, from the options alone.

    A question has as many passes as options, but four options and three passes are right too when D stays in place.

    Args:
        samples: rows with their options.
    """
    short = []
    for first, passes in group(samples).items():
        expected = len(options(passes[0].fields))
        keeps_last = expected == 4 and len(passes) == 3 and passes[1].fields.get("D") != passes[0].fields["C"]
        if len(passes) < expected - keeps_last:
            short.append(first)
    return short


def _question(sample: Sample) -> int:
    return int(sample.id) % PASS_STEP


def _is_chinese(samples: Sequence[Sample]) -> bool:
    return 2 * sum(bool(_CHINESE.search(sample.fields["question"])) for sample in samples) > len(samples)


def _gold(sample: Sample) -> str:
    answer = sample.fields.get("answer", "").strip()
    return "" if is_missing(answer) else answer


def _by(groups: Groups, column: str, default: str = "") -> dict[str, list[int]]:
    """Sort questions by a column of their main row; questions without it are left out unless a default is given."""
    parts: dict[str, list[int]] = defaultdict(list)
    for first, passes in groups.items():
        value = passes[0].fields.get(column, "") or default
        if value:
            parts[value].append(first)
    return dict(parts)


def _split_scores(groups: Groups, letters: Mapping[Id, str | None]) -> dict[str, Any]:
    right = {s.id: letters[s.id] == _gold(s) for passes in groups.values() for s in passes}
    hit = {first: all(right[s.id] for s in passes) for first, passes in groups.items()}

    def mean(firsts: Sequence[int]) -> float:
        return sum(hit[first] for first in firsts) / len(firsts)

    l2, l3 = _by(groups, "l2_category"), _by(groups, "category")
    return {
        "Overall": mean(list(groups)),
        "L2": {ABBREVIATIONS.get(name, name): mean(l2[name]) for name in sorted(l2)},
        "L3": {name: mean(l3[name]) for name in sorted(l3)},
        "hits": sum(hit.values()),
        "questions": len(groups),
        "vanilla": {
            "main_rows": sum(right[first] for first in groups) / len(groups),
            "all_rows": sum(right.values()) / len(right),
        },
    }


def _counts(groups: Groups, graded: Groups, letters: Mapping[Id, str | None]) -> dict[str, Any]:
    rows = [sample for passes in graded.values() for sample in passes]
    return {
        "questions": len(groups),
        "rows": len(letters),
        "passes": dict(sorted(Counter(str(len(passes)) for passes in groups.values()).items())),
        "without_gold": len(groups) - len(graded),
        "gold_not_an_option": sum(_gold(sample) not in options(sample.fields) for sample in rows),
        "unresolved": sum(letter is None for letter in letters.values()),
        "no_choice": sum(letter == NO_CHOICE for letter in letters.values()),
    }


def _notes(groups: Groups, graded: Groups) -> list[str]:
    notes = []
    if len(graded) < len(groups):
        lacking = len(groups) - len(graded)
        notes.append(f"{lacking} of {len(groups)} questions have no gold answer (a test split?) and are not scored.")
    lone = [first for first, passes in groups.items() if len(passes) == 1]
    if lone:
        notes.append(f"{some(lone)} questions have a single pass, so for them circular scoring is plain scoring.")
    barred = [s.id for passes in graded.values() for s in passes if _gold(s) not in options(s.fields)]
    if barred:
        notes.append(f"the gold letter of {some(barred)} rows is not among their options, so they cannot be right.")
    return notes
