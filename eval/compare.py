"""Compare two results of one benchmark: ``python -m eval.compare results/mmstar/A results/mmstar/B``.

Says how far apart they are, how sure that is, and whether the choice of questions alone could explain it.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from scipy import stats

from eval.showing.results import Result
from llava_skip_base.console import PlainTable, make_app, make_table, output_console, print_next, print_text, run_app
from llava_skip_base.errors import UserError, first_few
from llava_skip_base.files import write_json, writing

CONFIDENCE = 0.95
RESAMPLES = 10_000
SEED = 0
# Most values drawn at once, so that a benchmark of any size fits into memory.
DRAWN_AT_ONCE = 10_000_000


@dataclass(frozen=True)
class Mean:
    """A mean over questions, in percent, and its bootstrap confidence interval from `low` to `high`."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Comparison:
    """Two models on the same questions.

    Attributes:
        difference: b - a, question by question.
        only_a: number of questions that the first model answers better.
        only_b: number of questions that the second one answers better.
        test: name of the paired test.
        p: probability of a difference this large if the models were equally good.
        within_noise: whether p is above 1 - the confidence level.
    """

    questions: int
    a: Mean
    b: Mean
    difference: Mean
    only_a: int
    only_b: int
    test: str
    p: float
    within_noise: bool


def compare(a: np.ndarray, b: np.ndarray) -> Comparison:
    """Compare the values of two models on the same questions.

    Intervals are percentiles of 10,000 seeded bootstrap resamples of the questions. The test is McNemar's exact one
    if every value is right or wrong, else a paired permutation test on the mean difference.

    Args:
        a: right or wrong (bool), or grades from 0 to 1 (float), of the first model [questions].
        b: the same of the second one.
    """
    only_a, only_b = int((a > b).sum()), int((b > a).sum())
    difference = b.astype(float) - a.astype(float)
    if a.dtype == b.dtype == bool:
        test, p = "McNemar, exact", _mcnemar(only_a, only_b)
    else:
        test, p = f"paired permutation, {RESAMPLES} draws", _permutation(difference)
    return Comparison(len(a), _mean(a), _mean(b), _mean(difference), only_a, only_b, test, p, bool(p > 1 - CONFIDENCE))


def _mean(values: np.ndarray) -> Mean:
    values = 100 * values.astype(float)
    if values.min() == values.max():  # every resample is the same
        return Mean(float(values[0]), float(values[0]), float(values[0]))
    drawn = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, DRAWN_AT_ONCE // len(values)),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(SEED),
    )
    low, high = drawn.confidence_interval
    return Mean(float(values.mean()), float(low), float(high))


def _mcnemar(only_a: int, only_b: int) -> float:
    return float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def _permutation(difference: np.ndarray) -> float:
    if not difference.any():
        return 1.0
    drawn = stats.permutation_test(
        (difference,),
        np.mean,
        permutation_type="samples",
        n_resamples=RESAMPLES,
        batch=max(1, DRAWN_AT_ONCE // len(difference)),
        vectorized=True,
        rng=np.random.default_rng(SEED),
    )
    return float(drawn.pvalue)


def aligned(a: Result, b: Result) -> tuple[np.ndarray, np.ndarray]:
    """Pair the values of two results, after checking that they can be compared.

    Raises:
        UserError: if they differ in more than the model.
    """
    for result in (a, b):
        if result.facts["status"] != "scored" or not result.values:
            raise UserError(f"{result.folder}: is {result.facts['status']}, so there is nothing to compare; score it.")
    different = [f"{name}: {x} and {y}" for name, x, y in zip(_COMPARED, _key(a), _key(b), strict=True) if x != y]
    if different:
        raise UserError(
            f"{a.folder} and {b.folder} differ in more than the model ({'; '.join(different)}), so their scores cannot "
            "be compared; evaluate both alike."
        )
    if unpaired := sorted(a.values.keys() ^ b.values.keys()):
        raise UserError(
            f"{first_few(unpaired)} questions are in one of the results only (a --limit?); evaluate both alike."
        )
    ids = list(a.values)
    return np.array([a.values[id_] for id_ in ids]), np.array([b.values[id_] for id_ in ids])


_COMPARED = ("benchmark", "data", "protocol", "rule", "max_new_tokens", "judge")


def _key(result: Result) -> tuple[object, ...]:
    facts = result.facts
    limits = (facts.get("generation") or {}).get("max_new_tokens")
    return (facts["benchmark"], facts["data"]["sha256"], facts["protocol"], facts["rule"], limits, facts.get("judge"))


def comparison_table(a: Result, b: Result, found: Comparison) -> PlainTable:
    """The comparison for the terminal."""
    headings = ("", "score", f"mean of questions, {CONFIDENCE:.0%} interval")
    models = (("A", a, found.a), ("B", b, found.b))
    rows = [(f"{name}: {result.model}", f"{result.facts['score']:.1f}", mean) for name, result, mean in models]
    table = make_table(f"{a.benchmark}: A and B", headings, rows)
    table.add_row("B - A", f"{b.facts['score'] - a.facts['score']:+.1f}", str(found.difference), style="bold")
    table.add_section()
    table.add_row("questions", "", str(found.questions))
    table.add_row("better in A / B only", "", f"{found.only_a} / {found.only_b}")
    table.add_row(found.test, "", f"p = {found.p:.3g}")
    return table


def run(
    a: Annotated[Path, typer.Argument(help="Results folder of one model on a benchmark, or its results.json.")],
    b: Annotated[Path, typer.Argument(help="Results folder of the other model on the same benchmark.")],
    json: Annotated[Path | None, typer.Option(help="Where to write the comparison as well.")] = None,
) -> None:
    """Compare two models on a benchmark: difference, confidence interval, paired test."""
    results = Result.load(a), Result.load(b)
    found = compare(*aligned(*results))
    output_console().print(comparison_table(*results, found))
    verdict = "within noise" if found.within_noise else "more than noise"
    print_text(f"The difference is {verdict} at the {CONFIDENCE:.0%} level (p = {found.p:.3g}).")
    if json:
        named = {name: {"folder": str(r.folder), **r.facts} for name, r in zip(("a", "b"), results, strict=True)}
        method = {"confidence": CONFIDENCE, "resamples": RESAMPLES, "seed": SEED}
        with writing(json):
            write_json(json, {**asdict(found), "method": method, "results": named})
    print_next("llava-skip overview shows the questions that only one of the two answers right")


app = make_app(run)


def main() -> None:
    """Run the command line."""
    run_app(app)


if __name__ == "__main__":
    main()
