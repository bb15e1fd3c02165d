"""How a language model grades MM-Vet answers.

Structure, scale, worked cases and retries follow the official grader (yuweihao/MM-Vet ``mm-vet_evaluator.py``); the
wording of its prompt is our own.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.sample import Id, Sample
from eval.scoring.judge import Judge, digest, read_replies, save_replies

INSTRUCTION = (
    "Below are questions, each with its ground truth and the prediction of a model. Compare the prediction with the "
    "ground truth and say how correct it is. Where the ground truth holds <AND>, the prediction is totally right only "
    "if it has all of the parts; where it holds <OR>, one part is enough to be totally right. The correctness is "
    "one of 0.0 (totally wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9 or 1.0 (totally right). Only fill in the "
    "last blank."
)
HEADER = ("Question", "Ground truth", "Prediction", "Correctness")
_EQUATION = ("What is x in the equation?", "-1 <AND> -5")
_MEME = (
    "Can you explain this meme?",
    "The meme is about two countries whose names mislead: Iceland, whose name promises ice, is mild and green, while "
    "Greenland, whose name promises green, lies almost wholly under ice. The two countries are shown side by side, and "
    "the caption says that this mix-up is where its author's trust issues began. It is funny because an ordinary fact "
    "of geography is blamed for a lasting personal distrust.",
)
WORKED_CASES = (
    (*_EQUATION, "x = 3", "0.0"),
    (*_EQUATION, "x = -1", "0.5"),
    (*_EQUATION, "x = -5", "0.5"),
    (*_EQUATION, "x = -5 or 5", "0.5"),
    (*_EQUATION, "x = -1 or x = -5", "1.0"),
    (
        *_MEME,
        "The meme plays on the names of Iceland and Greenland: Iceland is in fact green, and Greenland is in fact icy.",
        "0.4",
    ),
    (
        *_MEME,
        "The meme jokes that the names of Iceland and Greenland are the wrong way round: Iceland is lush and Greenland "
        "is a sheet of ice. Its author claims that finding this out gave them trust issues, and the humour lies in "
        "blaming a deep suspicion of everything on two badly chosen names.",
        "1.0",
    ),
)
REASK = "\nPredict the correctness of the answer (digit): "
# The official grader asks once more after these, but never reads that reply.
TEMPERATURES = (0.0, 0.0, 0.5, 1.0, 1.5)
MAX_TOKENS = 3

Grades = dict[str, dict[str, Any]]


def grading_prompt(sample: Sample, prediction: str, text: str | None = None) -> str:
    """Word the question to the judge: instruction, table with worked cases, and the row to complete.

    `text` is the official prompt, to be used instead of instruction and table.
    """
    rows = [HEADER, ("---",) * len(HEADER), *WORKED_CASES]
    table = "\n".join(" | ".join(row) for row in rows)
    truth = sample.fields["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    text = f"{INSTRUCTION}\n\n{table}" if text is None else text.rstrip("\n")
    return f"{text}\n\n" + " | ".join([sample.fields["question"], truth, prediction, ""])


def parse_grade(reply: str) -> float | None:
    """Read a grade: the text before the first space as a number in [0, 1], or None."""
    try:
        grade = float(reply.split(" ")[0].strip())
    except ValueError:
        return None
    return grade if 0.0 <= grade <= 1.0 else None


def grade_once(sample: Sample, prediction: str, judge: Judge) -> tuple[float, str]:
    """Ask for one grade, again at higher temperatures while the reply is no grade; 0.0 if none is.

    Returns:
        The grade and the reply it was read from.

    Raises:
        JudgeUnavailable: if the endpoint fails; that is not a grade of 0.
    """
    prompt, reply = grading_prompt(sample, prediction, judge.prompt), ""
    for number, temperature in enumerate(TEMPERATURES):
        reply = judge.ask(prompt + (REASK if number else ""), temperature, MAX_TOKENS)
        value = parse_grade(reply)
        if value is not None:
            return value, reply
    return 0.0, reply


def grade(samples: Sequence[Sample], answers: Mapping[Id, str], judge: Judge, path: Path) -> Grades:
    """Let the judge grade every answer ``judge.runs`` times, run after run.

    Each grade is saved at once to the grade file ``path``, in the official form; saved grades are not asked for again.

    Returns:
        The content of the grade file.

    Raises:
        UserError: if the file has grades of other answers.
        JudgeUnavailable: if the endpoint fails; the grades so far are kept.
    """
    asked = {str(s.id): grading_prompt(s, answers[s.id], judge.prompt) for s in samples}
    saved = read_replies(path, asked, score=list, content=list, model=list)
    empty = {id_: {"asked": digest(prompt), "model": [], "content": [], "score": []} for id_, prompt in asked.items()}
    grades: Grades = {**{id_: saved.get(id_, entry) for id_, entry in empty.items()}, **saved}
    for run in range(judge.runs):
        open_samples = [s for s in samples if len(grades[str(s.id)]["score"]) <= run]
        graded = judge.map(lambda sample: grade_once(sample, answers[sample.id], judge), open_samples)
        for sample, (value, reply) in graded:
            entry = grades[str(sample.id)]
            entry["model"].append(judge.model)
            entry["content"].append(reply)
            entry["score"].append(value)
            save_replies(path, {id_: entry for id_, entry in grades.items() if entry["score"]})
    return grades
