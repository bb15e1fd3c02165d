"""Score against cost: what is compared, what is refused, that nothing is done twice, and what is written."""

import csv
import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import eval.answering.generate
from eval.answering.generate import Generator, numerics
from eval.answering.models import check_model
from eval.answering.workers import Answerer, Job
from eval.run import app as eval_app
from eval.showing.tradeoff import verdicts
from eval.study.candidates import plan_candidates, read_methods
from eval.study.tradeoff import Pair, mean_interval
from eval.tradeoff import app
from llava_skip.reduction import ReductionConfig
from llava_skip.reduction.method import _REDUCTIONS
from llava_skip.reduction.random_rows import RandomRows
from llava_skip_base.errors import UserError
from tests.eval.test_generate import noise

HOSTILE = "<b>[x]$|_&"
Rows = list[dict[str, Any]]


@pytest.fixture
def compare(write_tsv: Callable[..., Path], mmstar_rows: Rows, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs the program on five questions."""
    data = write_tsv(mmstar_rows)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def run(*words: object) -> Result:
        limits = ["--benchmarks", "mmstar", "--data", data, "--batch-size", 5, "--max-new-tokens", 2]
        return CliRunner().invoke(app, [str(word) for word in [*limits, "--output", "out", *words]])

    return run


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the models that are loaded from now on."""
    loaded: list[str] = []

    class Counted(Generator):
        def __init__(self, model: Any, *words: Any) -> None:
            loaded.append(model.name)
            super().__init__(model, *words)

    monkeypatch.setattr(eval.answering.generate, "Generator", Counted)
    return loaded


def test_dense_models_get_every_method_at_every_budget(saved: Path, saved_dense: Path) -> None:
    plan = plan_candidates([saved, saved_dense], "random,seed=3,grid", "18,6", ["random:9", "grid:6"])
    assert [(own.name, own.series, own.dense.name) for own in plan.candidates] == [
        ("dense", "dense", "dense"),
        ("dense@random-18-seed=3", "random,seed=3", "dense"),
        ("dense@random-6-seed=3", "random,seed=3", "dense"),
        ("dense@grid-18", "grid", "dense"),
        ("dense@grid-6", "grid", "dense"),  # once, although it is named twice
        ("dense@random-9", "random", "dense"),
        ("random", "random", "dense"),
    ]
    assert [own.is_dense for own in plan.candidates] == [True] + [False] * 6
    assert plan.candidates[2].configuration.image_seq_length == 6
    assert read_methods("random, seed=1,grid") == [("random", ",seed=1"), ("grid", "")]


def test_what_does_not_fit_is_left_out_and_said(saved_dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Few(RandomRows):
        name = "few"

        def most_rows(self, tokens: int) -> int:
            return 9

    monkeypatch.setitem(_REDUCTIONS, "few", Few())
    plan = plan_candidates([saved_dense], "random,few", "18,6", [])
    assert [own.name for own in plan.candidates[1:]] == ["dense@random-18", "dense@random-6", "dense@few-6"]
    assert len(plan.left_out) == 1 and plan.left_out[0].startswith("dense: reduction few:18 keeps 18 tokens")
    with pytest.raises(UserError, match="--methods few fits no dense model.*few:18"):
        plan_candidates([saved_dense], "random,few", "18", [])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--methods", "rendom", "--budgets", "6"), "the method is 'rendom'; known: random"),
        (("--methods", "random", "--budgets", "37"), "--budgets 37 fits no dense model."),
        (("--methods", "random"), "--methods is given without --budgets"),
        (("--methods", "random,random", "--budgets", "6"), "--methods names 1 (random) twice"),
        (("--methods", "random", "--budgets", "6,x"), "--budgets has x; give numbers"),
        (("--methods", "random", "--budgets", "6,0"), "--budgets has 0; give numbers"),
        (("--methods", "random", "--budgets", "6,6"), "give each number once"),
        (("--reduction", "random:40"), "--reduction random:40 fits no dense model."),
        (("--reduction", "random"), "random needs the number of tokens"),
    ],
)
def test_refused_before_a_model_loads(
    compare: Any, saved_dense: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    loaded = counted(monkeypatch)
    done = compare("--model", saved_dense, *words)
    assert done.exit_code == 2 and message in done.stderr and "Traceback" not in done.output
    assert loaded == [] and not Path("out").exists()


def test_models_are_refused_before_one_loads(
    compare: Any, saved: Path, saved_dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = counted(monkeypatch)
    assert "none of 1 (random) is dense" in compare("--model", saved).stderr
    other = shutil.copytree(saved_dense, tmp_path / "foreign")
    (other / "config.json").write_text('{"model_type": "llava"}')
    assert "convert it: llava-skip convert" in compare("--model", saved_dense, "--model", other).stderr
    twice = ["--model", str(saved), "--reduction", "random:6", "--reduction", "random:6", "--benchmarks", "mmstar"]
    done = CliRunner().invoke(eval_app, twice)
    assert done.exit_code == 2 and "--reduction names 1 (random:6) twice" in done.stderr
    done = CliRunner().invoke(eval_app, ["--model", str(saved), "--reduction", "random:6", "--benchmarks", "mmstar"])
    assert (
        done.exit_code == 2 and "--reduction random:6 is for a dense model, and its config.json has skip" in done.stderr
    )
    with pytest.raises(UserError, match="is for models of the library"):
        check_model(other).reduced(ReductionConfig.parse("random:6"))
    assert loaded == []


class Page(HTMLParser):
    """The texts of a page and the images that it shows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.images: list[str] = []
        self.feed(text)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attributes)["src"] or "")


def test_one_load_serves_a_folder_and_a_second_run_does_nothing(
    compare: Any, saved: Path, saved_dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = shutil.copytree(saved_dense, tmp_path / HOSTILE)
    loaded = counted(monkeypatch)
    words = ["--model", dense, "--model", saved, "--methods", "random", "--budgets", "18,6", "--page", "docs/page.md"]
    done = compare(*words)
    assert done.exit_code == 0, done.output
    assert loaded == [HOSTILE, "random"]
    found = json.loads(Path("out/tradeoff.json").read_text())
    names = [HOSTILE, f"{HOSTILE}@random-18", f"{HOSTILE}@random-6", "random"]
    assert [row["model"] for row in found["rows"]] == names
    flops = [row["flops_of_dense"] for row in found["rows"]]
    assert flops[0] == 1 > flops[1] > flops[2] and [row["image_tokens"]["entering"] for row in found["rows"]][:3] == [
        36, 18, 6
    ]  # fmt: skip
    assert all(row["seconds"] > 0 and row["peak_memory_bytes"] > 0 for row in found["rows"])
    assert found["rows"][0]["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert [rival["reduction"] for rival in found["against"][0]["rivals"]]
    lines = list(csv.DictReader(Path("out/tradeoff.csv").open()))
    assert [(line["benchmark"], line["model"]) for line in lines] == [
        (part, name) for name in names for part in ("mean", "mmstar")
    ]
    page = Page(Path("out/index.html").read_text())
    assert page.images == ["score-flops.png", "score-seconds.png"]
    assert page.texts.count(HOSTILE) == 2 and "<b>" not in Path("out/index.html").read_text()
    assert all(min(Image.open(Path("out") / name).size) > 300 for name in page.images)
    assert Path("docs/page-score-flops.png").is_file() and "&" in Path("docs/page.md").read_text()
    assert r"\<b\>" in Path("docs/page.md").read_text()

    before = {path: path.read_bytes() for path in Path("out").rglob("*.jsonl")}
    again = compare(*words[:-2])
    assert again.exit_code == 0 and loaded == [HOSTILE, "random"]
    assert before == {path: path.read_bytes() for path in before}
    assert json.loads(Path("out/tradeoff.json").read_text()) == found


def test_a_reduction_equals_a_folder_saved_with_it(
    saved_dense: Path, write_tsv: Callable[..., Path], mmstar_rows: Rows, tmp_path: Path
) -> None:
    data, whole = write_tsv(mmstar_rows), Generator(check_model(saved_dense), numerics())
    whole.model.set_reduction(ReductionConfig.parse("random:6,seed=2"))
    whole.processor.follow(whole.model.config)
    for part in (whole.model, whole.processor):
        part.save_pretrained(tmp_path / "with")
    words = ["--benchmarks", "mmstar", "--data", data, "--output", tmp_path / "out", "--max-new-tokens", 4]
    for chosen in (("--model", tmp_path / "with"), ("--model", saved_dense, "--reduction", "random:6,seed=2")):
        done = CliRunner().invoke(eval_app, [str(word) for word in [*words, *chosen]])
        assert done.exit_code == 0, done.output
    folders = [tmp_path / "out/mmstar" / name for name in ("with", "dense@random-6-seed=2")]
    results = [json.loads((folder / "results.json").read_text()) for folder in folders]
    assert (folders[0] / "predictions.json").read_bytes() == (folders[1] / "predictions.json").read_bytes()
    assert (
        results[0]["image_tokens"]
        == results[1]["image_tokens"]
        == dict.fromkeys(("entering", "attention", "ffn", "cache"), 6)
    )
    assert [own["model"]["reduction"] for own in results] == ["random:6,seed=2"] * 2
    identities = [json.loads((folder / "run.json").read_text()) for folder in folders]
    assert "reduction" not in identities[0] and identities[1]["reduction"] == "random:6,seed=2"


def test_a_loaded_model_takes_each_reduction_and_none(saved_dense: Path) -> None:
    dense = check_model(saved_dense)
    models = [dense, dense.reduced(ReductionConfig.parse("random:6")), dense]
    jobs = [Job(0, (1, 2), ("Which?", "Where is it?"), ((noise(1),), (noise(2),)), model, 6) for model in models]
    answerer = Answerer(numerics())
    first, reduced, last = (answerer(job).texts for job in jobs)
    assert first == last != reduced == Answerer(numerics())(jobs[1]).texts


def test_the_mean_of_benchmarks_is_paired_and_draws_images() -> None:
    right, rng = np.ones(40), np.random.default_rng(0)
    ids, half = tuple(map(str, range(40))), (rng.random(40) < 0.5).astype(float)
    pairs = [Pair(ids, right, half, None, seed) for seed in range(2)]
    found = mean_interval([own.difference() for own in pairs])
    alone = mean_interval([pairs[0].difference()])
    assert found.value == alone.value == 100 * (half.mean() - 1)
    assert found.high - found.low < 0.85 * (alone.high - alone.low)  # two draws are independent: 1 / sqrt(2)
    same = mean_interval([Pair(ids, half, half, None, 0).difference()])
    assert (same.low, same.high) == (0, 0)
    by_image = mean_interval([Pair(ids, right, np.repeat(half[:10], 4), np.repeat(np.arange(10), 4), 0).score()])
    single = mean_interval([Pair(ids, right, np.repeat(half[:10], 4), None, 0).score()])
    assert by_image.high - by_image.low > 1.5 * (single.high - single.low)


def test_a_page_says_where_a_rival_wins() -> None:
    def rival(name: str, low: float, high: float) -> dict[str, Any]:
        return {"reduction": name, "difference": {"value": (low + high) / 2, "low": low, "high": high}}

    rivals = [rival("better:6", 1.0, 3.0), rival("equal:6", -1.0, 2.0), rival("worse:6", -5.0, -1.0)]
    own = {"model": "skipping", "flops_of_dense": 0.8, "rivals": rivals}
    (line,) = verdicts({"against": [own]})
    assert "of 3 rivals with at most its FLOPs, 1 score more: better:6 (+2.0 [+1.0, +3.0])" in line
    assert "1 score less, and 1 cannot be told apart. The best of them is better:6" in line
    (line,) = verdicts({"against": [{**own, "rivals": []}]})
    assert line.endswith("no rival has at most its FLOPs.")
