"""What a comparison can detect: formula against simulation."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from eval.scoring.intervals import sign_flip_test
from eval.study.power import run
from eval.study.statistics.power import Design, detectable, independent_discordance, mean_size
from llava_skip_base.console import make_app
from llava_skip_base.files import read_json


def differences(
    rng: np.random.Generator, images: int, size: int, only_a: float, only_b: float, share: float
) -> np.ndarray:
    """b - a for questions about images; with the chance `share` a question has its image's common difference."""
    chances = [only_a, 1 - only_a - only_b, only_b]
    common, own = (rng.choice([-1, 0, 1], shape, p=chances) for shape in ((images, 1), (images, size)))
    return np.where(rng.random((images, size)) < share, common, own).ravel()


@pytest.mark.parametrize(("images", "size", "share"), [(500, 1, 0.0), (150, 4, 0.6)])
def test_the_detectable_difference_is_found_8_times_in_10(images: int, size: int, share: float) -> None:
    discordance = 0.2
    points = detectable(Design(images * size, size, discordance, share**2))  # two questions share with share^2
    assert points is not None
    only_a, only_b = (discordance - points / 100) / 2, (discordance + points / 100) / 2
    rng, clusters = np.random.default_rng(3), np.repeat(np.arange(images), size)
    draws = (differences(rng, images, size, only_a, only_b, share) for _ in range(400))
    found = np.mean([sign_flip_test(own, clusters)[0] < 0.05 for own in draws])
    assert 0.73 <= found <= 0.87


def test_more_questions_and_fewer_benchmarks_detect_less() -> None:
    small, large = (detectable(Design(n, 1, 0.2, 0)) or 0 for n in (500, 2000))
    assert small / large == pytest.approx(2, rel=0.02)
    assert (detectable(Design(500, 1, 0.2, 0), benchmarks=10) or 0) > small
    assert (detectable(Design(500, 4, 0.2, 0.5)) or 0) > small
    assert detectable(Design(5, 1, 0.1, 0)) is None
    assert independent_discordance(0.5) == 0.5 and mean_size(np.array([0, 0, 0, 1])) == 2.5


def plan(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(make_app(run), [str(word) for word in words], env={"COLUMNS": "160"})
    return done.exit_code, done.output + done.stderr


def test_command_counts_questions_and_images(
    tmp_path: Path, write_tsv: Callable[..., Path], encoded_image: Callable[..., str]
) -> None:
    rows = [
        {"index": n, "question": "?", "answer": "yes", "category": "random", "image": encoded_image((n // 4, 0, 0))}
        for n in range(200)
    ]
    out = tmp_path / "out.json"
    code, said = plan("pope", "--data", write_tsv(rows), "--discordance", 0.2, "--correlation", 0.36, "--json", out)
    assert code == 0, said
    found = read_json(out)
    assert found["design"] == {"questions": 200, "size": 4.0, "discordance": 0.2, "correlation": 0.36}
    assert found["points"] == pytest.approx(detectable(Design(200, 4, 0.2, 0.36)))
    assert "0.1 is assumed" in plan("--questions", 100, "--images-count", 50)[1]
    assert "power 99.5%, level 0.1%" in plan("--questions", 100, "--power", 0.995, "--alpha", 0.001)[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give a benchmark"),
        (("pope", "--questions", "3"), "give a benchmark"),
        (("--questions", "3", "--images-count", "4"), "no more than questions"),
        (("--questions", "3", "--accuracy", "60"), "--accuracy is 60.0; expected a number between 0 and 1"),
        (("--questions", "3", "--benchmarks", "0"), "--benchmarks is 0"),
        (("--questions", "3", "--correlation", "2"), "--correlation is 2.0"),
    ],
)
def test_what_does_not_go_together_is_refused(words: tuple[str, ...], message: str) -> None:
    code, said = plan(*words)
    assert code == 2 and message in said
