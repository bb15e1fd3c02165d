"""The rows of a trade-off: what each candidate scores and costs, how sure that is, and which rivals do better."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from eval.scoring.headline import mean_headline
from eval.scoring.intervals import Interval, bootstrap, difference_of, interval
from eval.showing.results import Result
from eval.study.candidates import Candidate
from eval.study.statistics.scored import clusters_of, find_keys
from llava_skip.flops import image_cost
from llava_skip_base.errors import UserError


@dataclass(frozen=True)
class Pair:
    """The values of two models on the questions of one benchmark.

    Attributes:
        ids: of the questions.
        a: right or wrong (or a grade from 0 to 1) of the first model [questions].
        b: of the second one.
        clusters: the number of each question's image; None if each question has its own.
        seed: of the draws, another one for each benchmark, so that the draws of two are independent.
    """

    ids: tuple[str, ...]
    a: np.ndarray
    b: np.ndarray
    clusters: np.ndarray | None
    seed: int

    def score(self) -> tuple[float, np.ndarray]:
        """The mean of the second model's values in percent, and that of each resample."""
        headline = mean_headline(self.ids, self.b)
        return headline.value, bootstrap(headline.parts, headline.function, self.clusters, seed=self.seed)

    def difference(self) -> tuple[float, np.ndarray]:
        """That of the second model minus that of the first one."""
        first, second = mean_headline(self.ids, self.a), mean_headline(self.ids, self.b)
        parts, function = np.hstack([first.parts, second.parts]), difference_of(first.function)
        return second.value - first.value, bootstrap(parts, function, self.clusters, seed=self.seed)


def pair(a: Result, b: Result, seed: int) -> Pair:
    """Two results of one benchmark, question by question.

    Raises:
        UserError: they are not about the same questions.
    """
    if a.facts["data"]["sha256"] != b.facts["data"]["sha256"] or a.values.keys() != b.values.keys():
        raise UserError(f"{a.folder} and {b.folder} are about different questions; evaluate both again.")
    ids = tuple(b.values)
    first, second = (np.array([float(own.values[id_]) for id_ in ids]) for own in (a, b))
    return Pair(ids, first, second, clusters_of(ids, find_keys(b)), seed)


def mean_interval(estimates: Sequence[tuple[float, np.ndarray]]) -> Interval:
    """The mean of independent estimates, each a value and its draws, and its interval."""
    values, draws = zip(*estimates, strict=True)
    shortest = min(map(len, draws))
    return interval(float(np.mean(values)), np.mean([own[:shortest] for own in draws], axis=0))


def make_row(
    candidate: Candidate, results: Mapping[str, Result], dense: Mapping[str, Result], text_tokens: int
) -> dict[str, Any]:
    """What a candidate scores and costs, as plain data.

    Args:
        candidate: the model.
        results: its results by benchmark.
        dense: those of the dense model, of the same benchmarks.
        text_tokens: tokens of text beside the image, in FLOPs.
    """
    pairs = {name: pair(dense[name], own, seed) for seed, (name, own) in enumerate(results.items())}
    scores = {name: own.score() for name, own in pairs.items()}
    differences = {name: own.difference() for name, own in pairs.items()}
    flops = image_cost(candidate.configuration, text_tokens).prefill_flops
    dense_flops = image_cost(Candidate(candidate.dense, candidate.dense, "").configuration, text_tokens).prefill_flops
    reduction = candidate.configuration.reduction_config
    return {
        "model": candidate.name,
        "series": candidate.series,
        "dense": candidate.dense.name,
        "is_dense": candidate.is_dense,
        "as_it_is": candidate.model.reduction is None,
        "reduction": None if reduction is None else str(reduction),
        "image_tokens": candidate.model.image_tokens(),
        "prefill_flops": flops,
        "flops_of_dense": flops / dense_flops,
        "score": asdict(mean_interval(list(scores.values()))),
        "difference": asdict(mean_interval(list(differences.values()))),
        **_costs([own.facts.get("costs") for own in results.values()]),
        "benchmarks": {
            name: {
                "headline": own.facts["score"],
                "full_score": own.facts.get("full_score", 100.0),
                "questions": len(own.values),
                "rule": own.facts["rule"],
                "score": asdict(interval(*scores[name])),
                "difference": asdict(interval(*differences[name])),
                "costs": own.facts.get("costs"),
            }
            for name, own in results.items()
        },
    }


def _costs(costs: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    """Seconds a question, as the mean of the benchmarks, and the largest peak of memory; None if one has none."""
    known = [own for own in costs if own]
    if len(known) < len(costs):
        return dict.fromkeys(("prefill_seconds", "decode_seconds", "seconds", "peak_memory_bytes"))
    prefill, decode = (
        float(np.mean([own[f"{part}_seconds_a_question"] for own in known])) for part in ("prefill", "decode")
    )
    peak = max(own["peak_memory_bytes"] for own in known)
    return {
        "prefill_seconds": prefill,
        "decode_seconds": decode,
        "seconds": prefill + decode,
        "peak_memory_bytes": peak,
    }


def against(
    candidates: Sequence[Candidate], rows: Sequence[dict[str, Any]], results: Mapping[str, Mapping[str, Result]]
) -> list[dict[str, Any]]:
    """Each model as it is, but the dense ones, against every rival of at most its FLOPs.

    Args:
        candidates: all of them.
        rows: theirs.
        results: theirs, by the candidate's name and the benchmark.
    """
    found = []
    for own, row in zip(candidates, rows, strict=True):
        if not row["as_it_is"] or row["is_dense"]:
            continue
        rivals = []
        for other, rival in zip(candidates, rows, strict=True):
            if other.dense != own.dense or rival["as_it_is"] or rival["prefill_flops"] > row["prefill_flops"]:
                continue
            pairs = [
                pair(mine, results[other.name][name], n) for n, (name, mine) in enumerate(results[own.name].items())
            ]
            difference = mean_interval([each.difference() for each in pairs])
            rivals.append({"model": other.name, "reduction": rival["reduction"], "difference": asdict(difference)})
        found.append({"model": own.name, "flops_of_dense": row["flops_of_dense"], "rivals": rivals})
    return found
