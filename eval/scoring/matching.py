"""A judge that says which option an answer means, for answers from which no rule could take a letter.

Structure, number of attempts and fallback follow VLMEvalKit's choice matcher; the wording is our own. If the
judge names no option, a letter is drawn at random, as there, but with a seed, and counted separately.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from eval.sample import Id, Sample, options
from eval.scoring.extraction import NO_CHOICE, Options
from eval.scoring.judge import Judge, digest, read_replies, save_replies

ATTEMPTS = 3
MAX_TOKENS = 64
SEED = 2680
CHINESE = re.compile("[\u4e00-\u9fff]")

_ENGLISH = {
    "instruction": (
        "You are given a single-choice question, its options, and an answer to it. Say which option the answer means. "
        "Reply with one capital letter: that of the option, or Z if the answer means none of them."
    ),
    "open": "Question: {question}?\nOptions: {options}\nAnswer: {answer}\nReply: ",
    "question": "What is the main object in the image",
    "options": "There are several options: \n",
    "words": ("teddy bear", "rabbit", "cat", "dog"),
    "answers": (("a cute teddy bear", "A"), ("Spider", NO_CHOICE)),
    "example": "Example {}:",
}
_CHINESE = {
    "instruction": (
        "下面是一道单选题、它的选项和对它的一个回答。请判断这个回答指的是哪个选项。"
        "只输出一个大写字母：对应选项的字母；如果回答与所有选项的意思都不同，则输出 Z。"
    ),
    "open": "问题：{question}？\n选项：{options}\n回答：{answer}\n输出：",
    "question": "图中的主要物体是什么",
    "options": "有以下几个选项：\n",
    "words": ("泰迪熊", "兔子", "猫", "狗"),
    "answers": (("一只可爱的泰迪熊", "A"), ("蜘蛛", NO_CHOICE)),
    "example": "例 {}：",
}


@dataclass
class Matches:
    """The letters of answers that no rule could read.

    Attributes:
        letters: letter by sample id.
        drawn: ids whose letter was drawn at random because the judge named none.
    """

    letters: dict[Id, str] = field(default_factory=dict)
    drawn: set[Id] = field(default_factory=set)


def matching_prompt(question: str, choices: Options, prediction: str) -> str:
    """Word the question to the judge: instruction, two examples, and the open case, in the question's language."""
    words: dict[str, Any] = _CHINESE if CHINESE.search(question) else _ENGLISH
    example = _listed(words, dict(zip("ABCD", words["words"], strict=True)))
    cases = [(words["question"], example, answer, letter) for answer, letter in words["answers"]]
    cases.append((question, _listed(words, choices), prediction, ""))
    parts = [words["instruction"]]
    for number, (asked, listed, answer, letter) in enumerate(cases, start=1):
        opened = words["open"].format(question=asked, options=listed, answer=answer)
        parts.append(f"{words['example'].format(number)}\n{opened}{letter}")
    return "\n".join(parts)


def match_choices(
    samples: Sequence[Sample],
    answers: Mapping[Id, str],
    judge: Judge,
    extract: Callable[[str, Options], str | None],
) -> Matches:
    """Let the judge match answers to options; `extract` reads its replies, which a file next to the result keeps.

    Raises:
        JudgeUnavailable: if the endpoint fails; the replies so far are kept.
    """
    prompts = {s.id: matching_prompt(s.fields["question"], options(s.fields), answers[s.id]) for s in samples}
    path = judge.file("choices")
    replies = read_replies(path, {str(id_): prompt for id_, prompt in prompts.items()}, replies=list)

    def ask(sample: Sample) -> tuple[str | None, list[str]]:
        said: list[str] = []
        for _ in range(ATTEMPTS):
            said.append(judge.ask(prompts[sample.id], 0.0, MAX_TOKENS))
            letter = extract(said[-1], options(sample.fields))
            if letter:
                return letter, said
        return None, said

    for sample, (letter, said) in judge.map(ask, [s for s in samples if str(s.id) not in replies]):
        replies[str(sample.id)] = {"asked": digest(prompts[sample.id]), "letter": letter, "replies": said}
        save_replies(path, replies)
    found = Matches()
    for sample in samples:
        if str(sample.id) not in replies:  # a dry run
            continue
        letter = replies[str(sample.id)]["letter"]
        if letter is None:
            found.drawn.add(sample.id)
            # Seeded by the question, so that the letter does not depend on order or concurrency.
            letter = Random(f"{SEED}/{sample.id}").choice([*options(sample.fields), NO_CHOICE])
        found.letters[sample.id] = letter
    return found


def _listed(words: Mapping[str, Any], choices: Options) -> str:
    return words["options"] + "".join(f"{letter}. {text}\n" for letter, text in choices.items())
