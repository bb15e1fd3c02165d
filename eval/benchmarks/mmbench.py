"""MMBench (MMBench TSV, open-compass): multiple choice, scored circularly over rotated copies of each question.

Index g < 1e6 is a question, index k*1e6 + g its k-th copy with rotated options. A question is a hit only if it and all
its copies are answered right. Copies are never made here, because some questions of the public files have fewer.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.benchmark import LETTER_INSTRUCTION, Benchmark
from eval.errors import JudgeUnavailable
from eval.reading.tables import Row, write_xlsx
from eval.sample import Id, Sample, Score, is_missing, listed_options, options
from eval.scoring.extraction import EXTRACTORS, NO_CHOICE, VERSIONS, is_lookalike
from eval.scoring.headline import Headline, split_headline
from eval.scoring.judge import Judge
from eval.scoring.matching import CHINESE, Matches, match_choices
from eval.scoring.pandas_cells import cell_as_text
from llava_skip_base.errors import UserError, first_few

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
# Questions and rows of the public files; v1.1 is known by its higher indices.
EDITIONS = {
    (1164, 4329): "v1.0 dev of 2023-10-03",
    (1176, 4377): "v1.0 dev of 2023-07-12",
    (1784, 6666): "v1.0 test",
    (510, 2040): "CCBench",
}
FIRST_V11_INDEX = 3000
REQUIRED = ("index", "question", "A", "B", "C", "D", "prediction")  # by the server

Groups = dict[int, list[Sample]]


class MMBench(Benchmark):
    """MMBench dev and test, English and Chinese, v1.0 and v1.1, and CCBench."""

    name = "mmbench"
    rules = {name: f"mmbench-circular/{version}" for name, version in VERSIONS.items()}
    protocols = ("llava", "vlmevalkit", "vlmevalkit-llava", "lmms-eval")
    max_new_tokens = 1024
    limits = {"vlmevalkit-llava": 2048}
    embedded = "mmbench.tsv"
    columns = ("question", "A", "B")
    optional_columns = ("answer",)  # test files have none
    submission = "submission.xlsx"

    def samples(self, rows: Sequence[Row]) -> list[Sample]:
        """Turn rows into samples; every copy needs its question and all earlier copies."""
        samples = super().samples(rows)
        words = [sample.id for sample in samples if not isinstance(sample.id, int)]
        if words:
            raise UserError(f"MMBench indices are whole numbers, saw {first_few(words)}; is this an MMBench file?")
        gaps = [
            first
            for first, passes in group(samples).items()
            if [sample.id for sample in passes] != [first + k * PASS_STEP for k in range(len(passes))]
        ]
        if gaps:
            raise UserError(
                f"{first_few(gaps)} questions lack the main row or a copy before their last one; circular scoring "
                f"needs every pass (index + k*{PASS_STEP}). Give the whole file."
            )
        return samples

    def question(self, id_: Id) -> Id:
        """The index of the main row."""
        return int(id_) % PASS_STEP if isinstance(id_, int) or (id_.isdecimal() and len(id_) < 20) else id_

    def limit(self, samples: list[Sample], count: int) -> list[Sample]:
        """The first `count` questions with all their copies."""
        kept = set(list(group(samples))[:count])
        return [sample for sample in samples if _question(sample) in kept]

    def check_whole(self, samples: Sequence[Sample], source: str) -> None:
        """Refuse a prediction file with fewer passes than options, such as VLMEvalKit's file of one row a question."""
        short = short_groups(samples)
        if short:
            raise UserError(
                f"{source}: {first_few(short)} questions have fewer passes than options, so the circular score would "
                "be too high; give the file with a row for every pass, or the benchmark file with --data."
            )

    def protocol(self, samples: Sequence[Sample]) -> str:
        """The prompt protocol, with the file's language."""
        return f"{self.chosen_protocol}-{'cn' if _is_chinese(samples) else 'en'}"

    def prompts(self, samples: Sequence[Sample]) -> list[str]:
        """The prompts, in the language of the file or, where the protocol does so, of each row."""
        chinese = _is_chinese(samples)
        prompt = {
            "llava": lambda fields: llava_prompt(fields, chinese),
            "vlmevalkit": vlmevalkit_prompt,
            "vlmevalkit-llava": vlmevalkit_llava_prompt,
            "lmms-eval": lambda fields: lmms_eval_prompt(fields, chinese),
        }[self.chosen_protocol]
        return [prompt(sample.fields) for sample in samples]

    def score(self, samples: Sequence[Sample], answers: Mapping[Id, str], judge: Judge | None = None) -> Score:
        """Score circularly (official) and plainly (for comparison), overall and by ability of the main row."""
        extract = EXTRACTORS[self.chosen_rule]
        static = self.chosen_rule == "lmms-eval-static"
        judge = None if static else judge  # the rule is what lmms-eval does instead of asking one
        letters = {s.id: extract(self.said(answers[s.id], s.fields), self.choices(s.fields)) for s in samples}
        groups = group(samples)
        graded = {first: passes for first, passes in groups.items() if all(_gold(sample) for sample in passes)}
        counts = _counts(groups, graded, letters, answers)
        notes = _notes(groups, graded, counts)
        if not graded:
            return Score("unscored", self.rule, counts=counts, notes=notes)
        matches = Matches()
        if judge:
            try:
                matches = match_choices(_undecided(graded, letters), answers, judge, EXTRACTORS["vlmevalkit"])
            except JudgeUnavailable as error:
                notes.insert(0, f"matching answers to options is incomplete: {error} Run again to go on.")
                return Score("incomplete", self.rule, counts=counts, notes=notes, judge=judge.describe())
            counts["judge"] = {"asked": len(matches.letters), "drawn_at_random": len(matches.drawn)}
            notes += _judge_notes(judge, matches)
        elif counts["unresolved"]:
            notes.append(
                f"{counts['unresolved']} of {counts['rows']} answers name no option by this rule and count as wrong"
                + ("." if static else "; a judge (--judge-url) can read them.")
            )
        scores = {
            split: _split_scores({first: groups[first] for first in firsts}, letters, matches)
            for split, firsts in _by(graded, "split", default="none").items()
        }
        headline = "dev" if "dev" in scores else next(iter(scores))
        if len(scores) > 1:
            notes.append(f"the splits {', '.join(scores)} are not mixed; the score is that of {headline}.")
        judged = judge.describe() if judge and not judge.dry_run else None
        rule = f"{self.rule}+judge" if judged else self.rule
        final = {**letters, **matches.letters}
        per_sample: dict[Id, bool | float] = {
            first: all(final[s.id] == _gold(s) for s in passes) for first, passes in graded.items()
        }
        score = 100 * scores[headline]["Overall"]
        return Score("scored", rule, score, scores, counts, notes, judged, per_sample)

    def headline(
        self, samples: Sequence[Sample], answers: Mapping[Id, str], values: Mapping[str, bool | float]
    ) -> Headline:
        """The circular accuracy of the headline's split."""
        return split_headline(values, {str(s.id): s.fields.get("split") or "none" for s in samples}, "dev")

    def reading(self, answer: str, fields: Row) -> str:
        """The letter of the option that the answer chooses, else its words."""
        letter = EXTRACTORS[self.chosen_rule](self.said(answer, fields), self.choices(fields))
        return letter or super().reading(answer, fields)

    def choices(self, fields: Row) -> dict[str, str]:
        """The options as the scoring rule sees them; lmms-eval takes "nan" for a text."""
        if self.chosen_rule.startswith("lmms-eval"):
            return {letter: fields[letter] for letter in "ABCD" if fields.get(letter, "")}
        return options(fields)

    def said(self, answer: str, fields: Row) -> str:
        """An answer as the scoring rule sees it; VLMEvalKit takes "None" for "nan", unless an option reads so."""
        if not answer or self.chosen_rule.startswith("lmms-eval") or answer in options(fields).values():
            return answer
        return cell_as_text(answer)

    def write_submission(self, samples: Sequence[Sample], answers: Mapping[Id, str], path: Path) -> list[str]:
        """Write the workbook that the MMBench server takes (LLaVA's form), after checking that every pass is there."""
        self.check_whole(samples, "the submission")
        columns = [*REQUIRED, *(name for name in ("answer", "split") if any(_cell(s, name) for s in samples))]
        rows = ({**{name: _cell(s, name) for name in columns}, "prediction": answers[s.id]} for s in samples)
        lost = write_xlsx(path, columns, rows)
        notes = [f"{path}: {len(samples)} rows of {len(group(samples))} questions, all passes, for the MMBench server."]
        if lost["control_characters"]:
            notes.append(f"{lost['control_characters']} cells had control characters, which a workbook cannot hold.")
        if lost["cut"]:
            notes.append(f"{lost['cut']} cells were cut to the length that a workbook can hold.")
        return notes


def question_text(fields: Row) -> str:
    """Hint, question and options as LLaVA writes them, without the instruction."""
    hint = fields.get("hint", "")
    return ("" if is_missing(hint) else f"{hint}\n") + fields["question"] + listed_options(fields)


def llava_prompt(fields: Row, chinese: bool) -> str:
    """LLaVA's prompt (`model_vqa_mmbench.py` with `--single-pred-prompt`)."""
    return f"{question_text(fields)}\n{CHINESE_INSTRUCTION if chinese else LETTER_INSTRUCTION}"


def vlmevalkit_prompt(fields: Row) -> str:
    """VLMEvalKit's prompt for models without one of their own (`image_mcq.py`)."""
    hint, choices = fields.get("hint", ""), options(fields)
    text = ("" if is_missing(hint) else f"Hint: {hint}\n") + f"Question: {fields['question']}\n"
    if choices:
        text += "Options:\n" + "".join(f"{letter}. {option}\n" for letter, option in choices.items())
        text += "Please select the correct answer from the options above. \n"
    return text


def vlmevalkit_llava_prompt(fields: Row) -> str:
    """VLMEvalKit's prompt for LLaVA models, which looks for Chinese row by row."""
    hint, choices = fields.get("hint", ""), options(fields)
    text = ("" if is_missing(hint) else f"{hint}\n") + fields["question"]
    text += "".join(f"\n{letter}. {option}" for letter, option in choices.items())
    if CHINESE.search(text):
        return text + ("\n请直接回答选项字母。" if choices else "\n请直接回答问题。")
    return text + (f"\n{LETTER_INSTRUCTION}" if choices else "\nAnswer the question directly.")


def lmms_eval_prompt(fields: Row, chinese: bool) -> str:
    """lmms-eval's prompt (`en_utils.py`, `cn_utils.py`); the Chinese one prints a hint that reads "nan"."""
    hint = fields.get("hint", "")
    shown = hint if chinese or hint != "nan" else ""
    lead = "有如下几个选项：" if chinese else "There are several options:"
    instruction = "请直接使用所提供的选项字母作为答案回答。" if chinese else LETTER_INSTRUCTION
    choices = [f"\n{letter}. {fields[letter]}" for letter in "ABCDE" if fields.get(letter, "") not in ("", "nan")]
    text = f"{shown} " if shown else ""
    return f"{text}{fields['question']} {lead}{''.join(choices)}\n\n{instruction}"


def edition(samples: Sequence[Sample]) -> str:
    """The public file that has this number of questions and rows, with its language."""
    groups = group(samples)
    name = EDITIONS.get((len(groups), len(samples)), "other")
    if max(groups) >= FIRST_V11_INDEX:
        name = "v1.1"
    return name if name in ("other", "CCBench") else f"{name}, {'CN' if _is_chinese(samples) else 'EN'}"


def group(samples: Sequence[Sample]) -> Groups:
    """The passes of each question, by the question's index, the main row first."""
    groups: Groups = defaultdict(list)
    for sample in samples:
        groups[_question(sample)].append(sample)
    return {first: sorted(passes, key=lambda sample: int(sample.id)) for first, passes in groups.items()}


def short_groups(samples: Sequence[Sample]) -> list[int]:
    """Questions that seem to lack their last copies, judged by the options alone.

    A question has as many passes as options, but four options and three passes are right too when D is not rotated.
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
    return 2 * sum(bool(CHINESE.search(sample.fields["question"])) for sample in samples) > len(samples)


def _gold(sample: Sample) -> str:
    answer = sample.fields.get("answer", "").strip()
    return "" if is_missing(answer) else answer


def _cell(sample: Sample, column: str) -> Any:
    if column == "index":
        return sample.id
    if len(column) == 1:
        return options(sample.fields).get(column, "")
    return _gold(sample) if column == "answer" else sample.fields.get(column, "")


def _by(groups: Groups, column: str, default: str = "") -> dict[str, list[int]]:
    """Questions by a column of their main row; questions without it are left out unless a default is given."""
    parts: dict[str, list[int]] = defaultdict(list)
    for first, passes in groups.items():
        value = passes[0].fields.get(column, "") or default
        if value:
            parts[value].append(first)
    return dict(parts)


def _undecided(groups: Groups, letters: Mapping[Id, str | None]) -> list[Sample]:
    """The rows that a judge must read: no letter was found, and no other pass of the question is wrong already."""
    rows = []
    for passes in groups.values():
        unread = [s for s in passes if letters[s.id] is None]
        if all(letters[s.id] == _gold(s) for s in passes if letters[s.id] is not None):
            rows += unread
    return rows


def _split_scores(groups: Groups, letters: Mapping[Id, str | None], matches: Matches) -> dict[str, Any]:
    final = {**letters, **matches.letters}
    right = {s.id: final[s.id] == _gold(s) for passes in groups.values() for s in passes}
    hit = {first: all(right[s.id] for s in passes) for first, passes in groups.items()}

    def mean(firsts: Sequence[int]) -> float:
        return sum(hit[first] for first in firsts) / len(firsts)

    l2, l3 = _by(groups, "l2_category"), _by(groups, "category")
    scores: dict[str, Any] = {
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
    if matches.letters:
        settled = [f for f, passes in groups.items() if hit[f] and not matches.drawn & {s.id for s in passes}]
        exact = [f for f, passes in groups.items() if all(letters[s.id] == _gold(s) for s in passes)]
        scores["without_random_letters"] = len(settled) / len(groups)
        scores["without_judge"] = len(exact) / len(groups)
    return scores


def _counts(
    groups: Groups, graded: Groups, letters: Mapping[Id, str | None], answers: Mapping[Id, str]
) -> dict[str, Any]:
    every = [sample for passes in groups.values() for sample in passes]
    rows = [sample for passes in graded.values() for sample in passes]
    return {
        "edition": edition(every),
        "questions": len(groups),
        "rows": len(letters),
        "passes": dict(sorted(Counter(str(len(passes)) for passes in groups.values()).items())),
        "without_gold": len(groups) - len(graded),
        "gold_not_an_option": sum(_gold(sample) not in options(sample.fields) for sample in rows),
        "options_that_read_nan": sum(any(map(is_missing, options(sample.fields).values())) for sample in every),
        "empty": sum(not answers[sample.id].strip() for sample in every),
        "unresolved": sum(letter is None for letter in letters.values()),
        "no_choice": sum(letter == NO_CHOICE for letter in letters.values()),
        "lookalike_letters": sum(is_lookalike(answers[sample.id]) for sample in every),
    }


def _notes(groups: Groups, graded: Groups, counts: Mapping[str, Any]) -> list[str]:
    notes = []
    if len(graded) < len(groups):
        lacking = len(groups) - len(graded)
        notes.append(f"{lacking} of {len(groups)} questions have no gold answer (a test split?) and are not scored.")
    lone = [first for first, passes in groups.items() if len(passes) == 1]
    if lone:
        notes.append(f"{first_few(lone)} questions have a single pass, so for them circular scoring is plain scoring.")
    barred = [s.id for passes in graded.values() for s in passes if _gold(s) not in options(s.fields)]
    if barred:
        notes.append(
            f"the gold letter of {first_few(barred)} rows is not among their options, so they cannot be right."
        )
    if counts["options_that_read_nan"]:
        notes.append(
            f"{counts['options_that_read_nan']} rows have an option that reads nan or none; it counts as an option, "
            "but LLaVA's prompt leaves it and the ones after it out."
        )
    if counts["lookalike_letters"]:
        notes.append(
            f"{counts['lookalike_letters']} answers are a letter of another alphabet that looks like an option letter; "
            "no published rule accepts it."
        )
    return notes


def _judge_notes(judge: Judge, matches: Matches) -> list[str]:
    if judge.dry_run:
        return [f"dry run: {judge.sent} answers would be put to the judge; nothing was sent."]
    notes = ["plain scores count answers that the judge was not asked about as wrong."]
    if matches.drawn:
        notes.append(
            f"the judge settled nothing for {len(matches.drawn)} answers; their letters were drawn at random from a "
            "fixed seed, and 'without_random_letters' counts them as wrong."
        )
    return notes
