"""Statistics of results that real scorers have scored."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner
from typer.testing import Result as Done

import eval.overview
from eval.answering.models import check_model, with_seeds
from eval.benchmarks import get_benchmark
from eval.compare import app
from eval.reading.images import image_keys
from eval.reading.tables import sha256
from eval.sample import Id
from eval.showing.results import IMAGES, Result, find_results
from eval.study.statistics.loyalty import loyalty
from eval.study.statistics.many import compare_many, contests, holm
from eval.study.statistics.pairs import load_pair
from eval.study.statistics.power import measured
from eval.study.statistics.scored import find_keys, load_scored
from eval.study.statistics.seeds import estimate, grouped, mean_draws, seed_of, spread
from eval.study.statistics.vtc import DIFFICULT, GROUP_A, SIMPLE, by_difficulty
from llava_skip_base.errors import UserError
from llava_skip_base.files import read_json, write_json, write_json_lines

Rows = list[dict[str, Any]]
Say = Callable[[Id], str]


def save(
    folder: Path, benchmark: str, data: Path, say: Say, rule: str | None = None, keep: bool = True, **facts: Any
) -> Result:
    """A result as an evaluation leaves it, of a model that says `say(id)`; `keep`: with the keys of its images."""
    chosen = get_benchmark(benchmark, rule)
    samples = chosen.load(data)
    answers = {sample.id: say(sample.id) for sample in samples}
    score = chosen.score(samples, answers)
    lines = [{**s.fields, "index": s.id, "prompt": "?", "prediction": answers[s.id]} for s in samples]
    write_json_lines(folder / "answers.jsonl", lines)
    write_json(folder / "per_sample.json", {str(id_): value for id_, value in score.per_sample.items()})
    if keep:
        write_json(folder / IMAGES, image_keys(samples))
    found = {
        "benchmark": benchmark,
        "status": "scored",
        "score": score.score,
        "full_score": chosen.full_score,
        "rule": score.rule,
        "protocol": "p",
        "model": {"name": folder.name},
        "data": {"path": str(data), "images": None, "sha256": sha256([data])},
    }
    write_json(folder / "results.json", found | facts)
    return Result.load(folder)


@pytest.fixture
def pope(write_tsv: Callable[..., Path], encoded_image: Callable[..., str]) -> Path:
    """60 questions about 20 images, of three splits."""
    rows = [
        {
            "index": n,
            "question": f"Is there thing {n}?",
            "answer": "yes" if n % 2 else "no",
            "category": ("random", "popular", "adversarial")[n % 3],
            "image": encoded_image((n // 3, 0, 0)),
        }
        for n in range(60)
    ]
    return write_tsv(rows, "pope.tsv")


@pytest.fixture
def mme(write_tsv: Callable[..., Path], encoded_image: Callable[..., str]) -> Path:
    """32 questions about 16 images, of two categories of perception and one of cognition."""
    rows = [
        {
            "index": n,
            "question": f"Is it {n}?",
            "answer": "Yes" if n % 2 else "No",
            "category": ("count", "color", "color", "code_reasoning")[n // 8],
            "image_path": f"{n // 2}.png",
            "image": encoded_image((0, n // 2, 0)),
        }
        for n in range(32)
    ]
    return write_tsv(rows, "mme.tsv")


def guesser(seed: int, words: str = "yes no maybe") -> Say:
    """A model that answers at random, the same at each call."""
    return lambda id_: str(np.random.default_rng([seed, *str(id_).encode()]).choice(words.split()))


@pytest.mark.parametrize("rule", ["official", "vlmevalkit", "lmms-eval"])
def test_what_is_resampled_is_the_benchmarks_own_score(
    tmp_path: Path, pope: Path, mme: Path, write_tsv: Callable[..., Path], mmstar_rows: Rows, rule: str
) -> None:
    star = write_tsv(mmstar_rows, "star.tsv")
    for number, (name, data, words) in enumerate(
        [("pope", pope, "yes no maybe"), ("mme", mme, "yes no hm"), ("mmstar", star, "A B")]
    ):
        scored = load_scored(save(tmp_path / name, name, data, guesser(number, words), rule))
        assert scored.headline.value == pytest.approx(scored.result.facts["score"], abs=1e-9)
        assert not [note for note in scored.notes if "cannot be resampled" in note]
        found = scored.interval()
        assert found.low < found.value < found.high


def test_mmbench_is_resampled_by_question_with_all_its_passes(
    tmp_path: Path, write_tsv: Callable[..., Path], mmbench_rows: Rows
) -> None:
    golds = {row["index"]: row["answer"] for row in mmbench_rows}
    data = write_tsv(mmbench_rows)
    scored = load_scored(save(tmp_path / "m", "mmbench", data, lambda id_: "A" if id_ == 2000009 else golds[int(id_)]))
    assert scored.ids == ["7", "9"] and scored.headline.value == 50.0 == scored.result.facts["score"]
    assert set(scored.keys or {}) == {"7", "9", "1000007", "1000009", "2000009"}


def test_questions_about_one_image_are_drawn_together(tmp_path: Path, pope: Path) -> None:
    """A model that is right or wrong about whole images has an interval wider by the root of 3."""
    say = lambda id_: "yes" if (int(id_) % 2 == 1) == (int(id_) // 3 % 2 == 0) else "no"  # noqa: E731
    scored = load_scored(save(tmp_path / "m", "pope", pope, say))
    alone = load_scored(scored.result, {})
    assert scored.clusters is not None and scored.clusters.max() == 19 and alone.clusters is None
    widths = [own.mean().high - own.mean().low for own in (scored, alone)]
    assert widths[0] / widths[1] == pytest.approx(np.sqrt(3), rel=0.15)
    assert "20 images are few" in scored.notes[0] and "it is not known which questions share" in alone.notes[0]


def test_results_of_one_image_tell_as_much_as_one_question(tmp_path: Path, pope: Path) -> None:
    pair = [save(tmp_path / name, "pope", pope, guesser(number)) for number, name in enumerate("ab")]
    for result in pair:
        write_json(result.folder / IMAGES, dict.fromkeys(result.values, "one"))
    assert measured(load_pair(*pair)).independent == 1.0


def test_a_question_without_an_image_is_drawn_by_itself(tmp_path: Path, pope: Path) -> None:
    """HallusionBench and ScienceQA have some; the others still share their images."""
    whole = save(tmp_path / "m", "pope", pope, guesser(0))
    keys = read_json(whole.folder / IMAGES)
    write_json(whole.folder / IMAGES, {id_: key for id_, key in keys.items() if int(id_) >= 6})
    scored = load_scored(whole)
    assert scored.clusters is not None and len(set(scored.clusters.tolist())) == 18 + 6
    assert not any("not known" in note for note in scored.notes)


def test_images_of_earlier_results_come_from_the_file_or_from_a_column(tmp_path: Path, pope: Path, mme: Path) -> None:
    new, old = (save(tmp_path / name, "pope", pope, guesser(0), keep=name == "new") for name in ("new", "old"))
    assert find_keys(old) == find_keys(new) and len(set((find_keys(old) or {}).values())) == 20
    named = save(tmp_path / "named", "mme", mme, guesser(0), keep=False)
    mme.unlink()
    assert len(set((find_keys(named) or {}).values())) == 16
    pope.unlink()
    assert find_keys(old) is None and find_keys(new) is not None


def run(*words: object) -> Done:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


def test_command_gives_the_score_with_its_own_test_and_keeps_the_old_keys(tmp_path: Path, pope: Path) -> None:
    golds = lambda id_: "yes" if int(id_) % 2 else "no"  # noqa: E731
    a = save(tmp_path / "pope/a", "pope", pope, guesser(1))
    b = save(tmp_path / "pope/b", "pope", pope, golds)
    done = run(a.folder, b.folder, "--json", tmp_path / "out.json", "--filter", a.folder)
    assert done.exit_code == 0, done.output
    assert "more than noise" in done.output and "60 about 20 images" in done.output
    assert "does not say that its images were down-sampled" in done.output
    out = read_json(tmp_path / "out.json")
    assert (out["questions"], out["images"], out["test"]) == (60, 20, "McNemar by image, exact")
    assert out["score"]["test"].startswith("paired permutation by image")
    assert out["score"]["b"]["value"] == 100.0 and out["score"]["a"]["value"] == pytest.approx(a.facts["score"])
    assert out["filter"]["difficult"]["a"]["value"] == 0.0 and out["filter"]["simple"]["a"]["value"] == 100.0


def test_holm_adjusts_as_in_its_paper() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_models_are_compared_on_all_benchmarks_with_correction(
    tmp_path: Path, pope: Path, mme: Path, write_tsv: Callable[..., Path], mmstar_rows: Rows
) -> None:
    star, results = write_tsv(mmstar_rows, "star.tsv"), tmp_path / "results"
    for model, seed in (("a", 1), ("b", 2)):
        for name, data, words in (("pope", pope, "yes no"), ("mme", mme, "yes no"), ("mmstar", star, "A B")):
            save(results / name / model, name, data, guesser(seed, words))
    save(results / "other/c", "mmstar", star, guesser(3, "A B"))
    done = run("--models", "a", "b", "--results", results, "--json", tmp_path / "out.json")
    assert done.exit_code == 0, done.output
    out = read_json(tmp_path / "out.json")
    rows = out["benchmarks"]
    assert [row["benchmark"] for row in rows] == ["mme", "mmstar", "pope"] and (tmp_path / "out.png").is_file()
    assert [row["adjusted"] for row in rows] == pytest.approx(holm([row["p"] for row in rows]))
    percents = [row["difference"]["value"] * (0.05 if row["benchmark"] == "mme" else 1) for row in rows]
    assert out["average"]["difference"]["value"] == pytest.approx(np.mean(percents))
    assert 0 < out["average"]["p"] <= 1 and out["correction"] == "Holm"
    assert "no result of 'd'" in run("--models", "a", "d", "--results", results).stderr
    assert "on no benchmark in common" not in done.output


def test_average_is_as_sure_as_independent_benchmarks_make_it(tmp_path: Path, pope: Path) -> None:
    """The same benchmark four times, as if it were four, halves the standard error."""
    a, b = (save(tmp_path / name, "pope", pope, guesser(seed, "yes no")) for name, seed in (("a", 1), ("b", 2)))
    one = contests([a], [b])
    rows, alone = compare_many(one)
    _, four = compare_many(one * 4)
    width, narrow = (found.difference.high - found.difference.low for found in (alone, four))
    assert narrow / width == pytest.approx(0.5, rel=0.08) and four.p < alone.p
    assert alone.difference.value == pytest.approx(rows[0].difference.value) == pytest.approx(four.difference.value)


def test_loyalty_compares_choices_where_there_are_any_and_words_else(
    tmp_path: Path, write_tsv: Callable[..., Path], mmbench_rows: Rows, pope: Path
) -> None:
    data = write_tsv(mmbench_rows)
    dense = save(tmp_path / "dense", "mmbench", data, lambda id_: "A")
    texts = {7: "(A)", 9: "The answer is A.", 1000007: "A.", 1000009: "B", 2000009: "none of them"}
    model = save(tmp_path / "model", "mmbench", data, lambda id_: texts[int(id_)])
    assert loyalty(model, dense).value == 60.0
    yes = save(tmp_path / "yes", "pope", pope, lambda id_: "Yes, there is.")
    some = save(tmp_path / "some", "pope", pope, lambda id_: "yes" if int(id_) < 45 else "No.")
    found = loyalty(some, yes)
    assert found.value == 75.0 and found.low < 60 < 88 < found.high  # 15 of 20 images: a question alone gives +-11
    with pytest.raises(UserError, match="answer different questions"):
        loyalty(model, yes)
    (tmp_path / "yes/answers.jsonl").unlink()
    with pytest.raises(UserError, match="answers.jsonl is missing"):
        loyalty(some, yes)


def test_filter_splits_the_questions_by_the_smaller_image(tmp_path: Path, pope: Path) -> None:
    gold = lambda id_: "yes" if int(id_) % 2 else "no"  # noqa: E731
    wrong = lambda id_: "no" if int(id_) % 2 else "yes"  # noqa: E731
    small = save(tmp_path / "small", "pope", pope, lambda id_: (wrong if int(id_) < 20 else gold)(id_))
    a = save(tmp_path / "a", "pope", pope, gold)
    b = save(tmp_path / "b", "pope", pope, lambda id_: (wrong if int(id_) < 10 else gold)(id_))
    groups = by_difficulty(load_pair(a, b), small)
    difficult, simple = groups[DIFFICULT], groups[SIMPLE]
    assert difficult and simple and (difficult.questions, simple.questions) == (20, 40)
    assert (difficult.a.value, difficult.b.value, simple.difference.value) == (100.0, 50.0, 0.0)
    assert by_difficulty(load_pair(a, b), a)[DIFFICULT] is None
    own = by_difficulty(load_pair(b, a), small)  # of the 20, the first model gets 10 right
    assert [group and group.questions for group in own.values()] == [20, 40, 10, 40]
    group_a = own[GROUP_A]
    assert group_a and (group_a.a.value, group_a.b.value) == (100.0, 100.0)


def test_names_of_seeds() -> None:
    assert seed_of("sv-llava-256-seed-42") == ("sv-llava-256", 42)
    assert seed_of("m-seed-7@fastv-64") == ("m@fastv-64", 7) and seed_of("m-seed-7-blind") == ("m-blind", 7)
    assert seed_of("llava") is None and seed_of("seed-7") is None and seed_of("m-seed-7b") is None


def test_a_folder_of_seeds_is_all_of_its_models(tmp_path: Path) -> None:
    for seed in (100, 42, 7):
        folder = tmp_path / f"m/seed-{seed}"
        write_json(folder / "config.json", {})
        (folder / "tokenizer.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"x")
    found = with_seeds(tmp_path / "m")
    assert [check_model(folder).name for folder in found] == ["m-seed-7", "m-seed-42", "m-seed-100"]
    assert with_seeds(found[0]) == [found[0]] and with_seeds(tmp_path / "gone") == [tmp_path / "gone"]


def test_intervals_over_seeds_hold_the_truth() -> None:
    """Scores with an effect of the seed and one of the questions; the truth is the mean over both."""
    rng = np.random.default_rng(8)
    held = []
    for _ in range(400):
        seeds = 60 + rng.normal(0, 2, 3)
        question = rng.normal(0, 1)  # common to all seeds, as they answer the same questions
        found, _ = estimate(float(seeds.mean() + question), rng.normal(0, 1, 2000), [seeds], 300)
        held.append(found.low <= 60 <= found.high)
    assert 0.92 <= np.mean(held) <= 0.99
    assert estimate(1.0, np.zeros(10), [np.array([1.0])], 5)[1] == 1 / 11
    assert estimate(0.0, np.zeros(10), [np.array([1.0])], 5)[1] == 1.0


def test_seeds_are_a_group_in_overview_and_comparison(tmp_path: Path, pope: Path) -> None:
    results = tmp_path / "results"
    own = [save(results / f"pope/m-seed-{n}", "pope", pope, guesser(n, "yes no")) for n in (42, 43, 44)]
    save(results / "pope/dense", "pope", pope, guesser(9, "yes no"))
    scores = [result.facts["score"] for result in own]
    ((key, group),) = grouped(find_results([results])).items()
    found = spread([load_scored(result) for result in group])
    assert key == ("pope", "m") and found.seeds == (42, 43, 44)
    assert found.mean.value == pytest.approx(np.mean(scores)) and found.deviation == pytest.approx(
        np.std(scores, ddof=1)
    )
    few = [save(tmp_path / f"few/m-seed-{n}", "pope", pope, lambda id_: "yes") for n in (1, 2)]
    assert all(0 <= end <= 100 for end in (spread([load_scored(own) for own in few]).mean.low, found.mean.high))
    draws = mean_draws([load_scored(result) for result in group])
    assert found.mean.high - found.mean.low > 1.9 * 1.96 * np.sqrt(draws.var() + found.deviation**2 / 3)
    assert CliRunner().invoke(eval.overview.app, [str(results)]).exit_code == 0
    assert f"{np.mean(scores):.1f} ± {found.deviation:.1f}" in (results / "overview/overview.md").read_text()
    assert json.loads((results / "overview/seeds.json").read_text())[0]["seeds"] == [42, 43, 44]
    done = run("--models", "dense", "m", "--results", results, "--json", tmp_path / "out.json")
    assert done.exit_code == 0 and "dense has one seed" in done.output, done.output
    out = read_json(tmp_path / "out.json")
    assert out["seeds"] == [1, 3] and out["benchmarks"][0]["test"] == "t-test over seeds and questions"
    assert out["benchmarks"][0]["b"]["value"] == pytest.approx(np.mean(scores))
