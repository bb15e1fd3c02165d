"""Questions about scenes and about plain numbers, as open questions and in the two public multiple-choice layouts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from random import Random

from .scenes import CELLS, Scene

DIGITS = tuple("0123456789")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = "ABCD"
THRESHOLD = 5
"""The number that digits of an image are compared with."""
INSTRUCTION = "\nAnswer with the option's letter from the given choices directly."
SHORT_INSTRUCTION = "\nAnswer the question using a single word or phrase."


@dataclass(frozen=True)
class Question:
    """A question, its answer, and wrong answers to offer with it.

    `near` is always offered (at most four options in all), `far` fills the rest at random. A question with neither
    is an open question only.
    """

    kind: str
    text: str
    answer: str
    near: tuple[str, ...] = ()
    far: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """The number of options as a multiple choice; 1 for an open question."""
        return min(len(LETTERS), 1 + len(self.near) + len(self.far))


@dataclass(frozen=True)
class Choice:
    """A question with its options in order."""

    question: Question
    options: tuple[str, ...]

    @property
    def letter(self) -> str:
        """The letter of the right option."""
        return LETTERS[self.options.index(self.question.answer)]

    def rotated(self, k: int) -> Choice:
        """The options rotated right by k, as MMBench's circular passes do."""
        return Choice(self.question, tuple(self.options[i - k] for i in range(len(self.options))))

    def mmbench_prompt(self) -> str:
        """LLaVA's prompt for MMBench: a line for each option, then the instruction."""
        lines = [f"\n{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=False)]
        return self.question.text + "".join(lines) + INSTRUCTION

    def mmstar_question(self) -> str:
        """The question column of MMStar, with the options."""
        options = ", ".join(f"{letter}: {option}" for letter, option in zip(LETTERS, self.options, strict=False))
        return f"{self.question.text}\nOptions: {options}"

    def mmstar_prompt(self) -> str:
        """The prompt for MMStar: the question column, then the instruction."""
        return self.mmstar_question() + INSTRUCTION

    @property
    def mmbench_answer(self) -> str:
        """The right option as MMBench's prompt writes it, letter first."""
        return f"{self.letter}. {self.question.answer}"

    @property
    def mmstar_answer(self) -> str:
        """The right option as MMStar's question writes it, letter first."""
        return f"{self.letter}: {self.question.answer}"


def make_choice(question: Question, rng: Random, position: int | None = None) -> Choice:
    """Turn a question into a multiple choice, the answer at `position` (random when None)."""
    wrong = [*question.near, *rng.sample(question.far, len(question.far))][: question.size - 1]
    rng.shuffle(wrong)
    wrong.insert(rng.randrange(question.size) if position is None else position, question.answer)
    return Choice(question, tuple(wrong))


def pick(questions: list[Question], rng: Random) -> Question:
    """Draw the kind first, then the answer, then the question.

    Neither a kind nor an answer (such as "no") is then more likely because it has more questions; only comparing, which
    takes longest to learn, is asked more often.
    """
    kinds = sorted({q.kind for q in questions})
    kind = rng.choices(kinds, weights=[3 if kind == "larger" else 1 for kind in kinds])[0]
    answer = rng.choice(sorted({q.answer for q in questions if q.kind == kind}))
    return rng.choice([q for q in questions if (q.kind, q.answer) == (kind, answer)])


def scene_questions(scene: Scene) -> list[Question]:
    """Every question that can be asked about a scene."""
    digits = scene.digits
    asked = (_which, _presence, _count, _larger, _list)
    return [question for kind in asked for question in kind(digits)]


def number_questions() -> list[Question]:
    """Every question that needs no image."""
    return [*_number_larger(), *_number_names()]


def _without(values: tuple[str, ...], answer: str) -> tuple[str, ...]:
    return tuple(value for value in values if value != answer)


def _which(digits: dict[str, int]) -> Iterator[Question]:
    present = {str(digit) for digit in digits.values()}
    for cell, digit in digits.items():
        wrong = _without(DIGITS, str(digit))
        # The other digits of the image are offered, so that the position matters.
        near = tuple(d for d in wrong if d in present)
        far = tuple(d for d in wrong if d not in present)
        yield Question("which", f"Which digit is {cell}?", str(digit), near, far)


def _presence(digits: dict[str, int]) -> Iterator[Question]:
    for cell in CELLS:
        answer, wrong = ("yes", "no") if cell in digits else ("no", "yes")
        yield Question("presence", f"Is there a digit {cell}?", answer, (wrong,))


def _count(digits: dict[str, int]) -> Iterator[Question]:
    answer = str(len(digits))
    yield Question("count", "How many digits?", answer, _without(DIGITS[1:5], answer))


def _larger(digits: dict[str, int]) -> Iterator[Question]:
    for cell, digit in digits.items():
        answer = "equal" if digit == THRESHOLD else cell if digit > THRESHOLD else str(THRESHOLD)
        wrong = _without((cell, str(THRESHOLD), "equal"), answer)
        yield Question("larger", f"Which is larger, {cell} or {THRESHOLD}?", answer, wrong)


def _list(digits: dict[str, int]) -> Iterator[Question]:
    # Each digit after its position: reading the digit at a named position serves every other question about it.
    yield Question("list", "Which digits are there?", ", ".join(f"{c} {digits.get(c, 'none')}" for c in CELLS))


def _number_larger() -> Iterator[Question]:
    for a, b in permutations(range(10), 2):
        yield Question("number larger", f"Which is larger, {a} or {b}?", str(max(a, b)), (str(min(a, b)),))


def _number_names() -> Iterator[Question]:
    for digit, word in zip(DIGITS, WORDS, strict=True):
        yield Question("number word", f"Which word is {digit}?", word, far=_without(WORDS, word))
        yield Question("number digit", f"Which digit is {word}?", digit, far=_without(DIGITS, digit))
