"""How answers of one or few words are compared: the VQA normalisation, and yes/no questions.

Sources: facebookresearch/mmf ``EvalAIAnswerProcessor``, which LLaVA uses for TextVQA (``m4c_evaluator.py``),
GT-Vision-Lab/VQA ``vqaEval.py``, the evaluator of VQAv2 and with small changes of VizWiz, and open-compass/VLMEvalKit
``vqa_eval.py``, whose rule for commas and periods between digits differs since 2025-05.
"""

import re
from collections.abc import Callable, Sequence

Pattern = re.Pattern[str]

_PUNCTUATION = ';/[]"{}()=+\\_->@<`,?!'
# A comma between digits, and a period that is removed: by mmf, by the evaluator of VQAv2, by VLMEvalKit since 2025-05.
_OFFICIAL = (re.compile(r"(?<=\d),+(?=\d)"), re.compile(r"\.(?!\d)"))
_EVALUATOR = (re.compile(r"\d,\d"), _OFFICIAL[1])
_VLMEVALKIT = (re.compile(r"\d,\d"), re.compile(r"(?<!\d)\.(?!\d)"))
# The original passes a flag where the number of replacements belongs, so it stops after that many periods.
_PERIODS = int(re.UNICODE)
_NUMBERS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
# Words that get an apostrophe, as "word:with apostrophe"; regular negations follow from the verbs.
_NEGATIONS = "ai are ca could did does do had has have is might must need ought sha should was were wo would".split()
_CONTRACTIONS = {f"{verb}nt": f"{verb}n't" for verb in _NEGATIONS} | dict(
    pair.split(":")
    for pair in """
    couldve:could've couldn'tve:couldn't've couldnt've:couldn't've hadnt've:hadn't've hadn'tve:hadn't've hed:he'd
    hed've:he'd've he'dve:he'd've hes:he's howd:how'd howll:how'll hows:how's Id've:I'd've I'dve:I'd've Im:I'm Ive:I've
    itd:it'd itd've:it'd've it'dve:it'd've itll:it'll let's:let's maam:ma'am
    mightnt've:mightn't've mightn'tve:mightn't've
    mightve:might've mustve:must've notve:not've oclock:o'clock ow's'at:'ow's'at 'ows'at:'ow's'at 'ow'sat:'ow's'at
    shed've:she'd've she'dve:she'd've she's:she's shouldve:should've shouldnt've:shouldn't've shouldn'tve:shouldn't've
    somebody'd:somebodyd somebodyd've:somebody'd've somebody'dve:somebody'd've somebodyll:somebody'll
    somebodys:somebody's someoned:someone'd someoned've:someone'd've someone'dve:someone'd've someonell:someone'll
    someones:someone's somethingd:something'd somethingd've:something'd've something'dve:something'd've
    somethingll:something'll thats:that's thered:there'd thered've:there'd've there'dve:there'd've therere:there're
    theres:there's theyd:they'd theyd've:they'd've they'dve:they'd've theyll:they'll theyre:they're theyve:they've
    twas:'twas wed've:we'd've we'dve:we'd've weve:we've whatll:what'll whatre:what're whats:what's whatve:what've
    whens:when's whered:where'd wheres:where's whereve:where've whod:who'd whod've:who'd've who'dve:who'd've
    wholl:who'll whos:who's whove:who've whyll:why'll whyre:why're whys:why's wouldve:would've wouldnt've:wouldn't've
    wouldn'tve:wouldn't've yall:y'all yall'll:y'all'll y'allll:y'all'll yall'd've:y'all'd've y'alld've:y'all'd've
    y'all'dve:y'all'd've youd:you'd youd've:you'd've you'dve:you'd've youll:you'll youre:you're youve:you've
    """.split()
)


def normalise_answer(text: str) -> str:
    """Bring an answer to the form in which VQA answers are compared."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _plain_words(text, *_OFFICIAL)


def vlmevalkit_form(text: str) -> str:
    """Bring an answer to the form in which VLMEvalKit compares VQA answers: without the official first steps."""
    return _plain_words(text, *_VLMEVALKIT)


def plain_form(text: str) -> str:
    """Bring an answer to the form of `normalise_answer` without its first steps, as lmms-eval does for VQAv2."""
    return _plain_words(text, *_OFFICIAL)


def evaluator_form(text: str) -> str:
    """Bring a model's answer to the form in which the evaluator of VQAv2 compares it."""
    return _plain_words(text, *_EVALUATOR)


def evaluator_golds(references: Sequence[str]) -> list[str]:
    """The annotators' answers as the evaluator of VQAv2 compares them: without punctuation where they differ."""
    if len(set(references)) < 2:
        return list(references)
    return [_strip_punctuation(text, *_EVALUATOR) for text in references]


def soft_accuracy(
    prediction: str, references: Sequence[object], form: Callable[[str], str] = normalise_answer
) -> float:
    """The score of an answer by the number of annotators who gave it, compared in the form that `form` makes.

    It is 1 from three other annotators on, averaged over leaving each one out.
    """
    return share_of_annotators(form(prediction), [form(str(reference)) for reference in references])


def share_of_annotators(own: str, said: Sequence[str]) -> float:
    """The soft accuracy of an answer among the annotators' answers, all in their final form."""
    same = said.count(own)
    if not same:
        return 0.0
    # Summed annotator by annotator, like the official script, so that the last bit is the same.
    return sum(min(1.0, (same - (answer == own)) / 3) for answer in said) / len(said)


def _plain_words(text: str, comma: Pattern, period: Pattern) -> str:
    text = _strip_punctuation(text.replace("\n", " ").replace("\t", " ").strip(), comma, period)
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _strip_punctuation(text: str, comma: Pattern, period: Pattern) -> str:
    """Remove punctuation next to a space, replace other punctuation by a space, and remove most periods."""
    stripped = text
    for mark in _PUNCTUATION:
        next_to_space = f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if next_to_space or comma.search(text) else " ")
    return period.sub("", stripped, count=_PERIODS)


def yes_or_no(text: str) -> str | None:
    """Read "yes" or "no" as VLMEvalKit does: one of them as a word and not the other; else None."""
    words = _strip_punctuation(text.lower(), *_VLMEVALKIT).split()
    if ("yes" in words) == ("no" in words):
        return None
    return "yes" if "yes" in words else "no"
