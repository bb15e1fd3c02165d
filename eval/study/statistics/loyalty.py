"""Loyalty: how often a model says what its dense twin says, right or wrong."""

import numpy as np

from eval.scoring.headline import mean_headline
from eval.scoring.intervals import Interval, headline_interval
from eval.showing.results import Result
from eval.study.statistics.scored import clusters_of, find_keys, question_fields, read_answers
from llava_skip_base.errors import UserError


def loyalty(model: Result, dense: Result, keys: dict[str, str] | None = None) -> Interval:
    """The share of answers, in percent, that are the same as the dense model's, and its interval by image.

    Two answers are the same if the benchmark reads the same choice (letter, option, yes or no) from both, else if their
    normalised words are equal. Each pass of MMBench is an answer.

    Args:
        model: the result of the model.
        dense: the result of its dense twin on the same questions, by the same rule.
        keys: which image each question is about; looked for in both results by default.

    Raises:
        UserError: the answers of one are not there, or are to other questions.
    """
    read = read_answers(model), read_answers(dense)
    for result, found in zip((model, dense), read, strict=True):
        if found is None:
            raise UserError(f"{result.folder}: its answers.jsonl is missing or not whole; evaluate again.")
    (benchmark, rows), (_, others) = (found for found in read if found is not None)
    said, twin = ({row["index"]: row for row in own} for own in (rows, others))
    if said.keys() != twin.keys():
        raise UserError(f"{model.folder} and {dense.folder} answer different questions; evaluate both alike.")
    same = []
    for id_, row in said.items():
        fields = question_fields(row)
        readings = {benchmark.reading(answers[id_]["prediction"], fields) for answers in (said, twin)}
        same.append(len(readings) == 1)
    keys = keys or find_keys(model) or find_keys(dense)
    return headline_interval(mean_headline(list(said), np.array(same)), clusters_of(list(said), keys))
