import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from eval.overview import app
from eval.reading.tables import sha256
from llava_skip_base.files import write_json, write_json_lines

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
HOSTILE = (
    """<script>document.title = "owned"</script><img src=x onerror="document.title='owned'">"'&\u202e{{ 7 * 7 }}"""
)


@pytest.fixture
def place(tmp_path: Path, write_tsv: Callable[..., Path], mmstar_rows: list[dict[str, Any]]) -> Path:
    """Two models on five MMStar questions; the first gets 0 and 1 right, the second 1 and 2."""
    data = write_tsv(mmstar_rows)
    for model, right in {"dense": (0, 1), "skip": (1, 2)}.items():
        save(tmp_path / "results/mmstar" / model, mmstar_rows, data, right)
    return tmp_path / "results"


def save(folder: Path, rows: list[dict[str, Any]], data: Path, right: tuple[int, ...]) -> None:
    facts = {
        "benchmark": "mmstar",
        "status": "scored",
        "score": 20.0 * len(right),
        "rule": "mmstar-official",
        "protocol": "skip-vision",
        "model": {"name": folder.name, "preset": folder.name, "sha256": "m"},
        "data": {"path": str(data), "images": None, "sha256": sha256([data])},
        "versions": {"torch": "2"},
    }
    write_json(folder / "results.json", facts)
    write_json(folder / "per_sample.json", {str(row["index"]): row["index"] in right for row in rows})
    answers = [
        {
            **{k: row[k] for k in ("index", "answer", "category")},
            "prompt": row["question"],
            "prediction": f"{HOSTILE} {row['index']}",
        }
        for row in rows
    ]
    write_json_lines(folder / "answers.jsonl", answers)


def overview(*words: object) -> Result:
    done = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    return done


class Texts(HTMLParser):
    """Collects elements with their attributes, and the text of the answers."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def visible(self) -> list[str | None]:
        return [a["id"] for tag, a in self.elements if tag == "article" and "hidden" not in a]


def test_table_markdown_and_json_say_where_numbers_come_from(place: Path) -> None:
    done = overview(place)
    assert re.search(r"mmstar\s*│\s*40.0 │\s*40.0", done.output)
    text = (place / "overview/overview.md").read_text()
    assert "| mmstar | 40.0 | 40.0 |" in text and "| mmstar | skip | skip | scored | 5 | skip-vision |" in text
    facts = json.loads((place / "overview/overview.json").read_text())
    assert [(fact["model"], fact["score"], fact["questions"]) for fact in facts] == [
        ("dense", 40.0, 5),
        ("skip", 40.0, 5),
    ]
    assert {"preset", "protocol", "rule", "versions", "model_sha256"} < facts[0].keys() and facts[0]["data"]["sha256"]


def test_charts_are_pictures_and_a_radar_needs_three_axes(place: Path, mmstar_rows: list[dict[str, Any]]) -> None:
    overview(place)
    folder = place / "overview"
    assert sorted(path.name for path in folder.glob("*.png")) == ["bars.png"]  # two categories, one benchmark
    rows = [{**row, "category": "abc"[row["index"] % 3]} for row in mmstar_rows]
    for model in ("dense", "skip"):
        save(place / "mmstar" / model, rows, place.parent / "data.tsv", (0,))
    overview(place)
    assert sorted(path.name for path in folder.glob("*.png")) == ["bars.png", "radar-mmstar.png"]
    assert min(Image.open(folder / "radar-mmstar.png").size) > 300
    before = (folder / "radar-mmstar.png").read_bytes()
    overview(place)
    assert (folder / "radar-mmstar.png").read_bytes() == before


def test_pages_escape_what_models_and_files_say(place: Path) -> None:
    overview(place)
    page = (place / "overview/mmstar.html").read_text()
    read = Texts(page)
    assert page.count("<script>") == 2 and "<img src=x" not in page
    assert read.text.count(HOSTILE) == 10
    pictures = [a["src"] for tag, a in read.elements if tag == "img"]
    assert len(set(pictures)) == 5 and all((place / "overview" / name).is_file() for name in pictures)
    verdicts = [a["data-verdict"] for tag, a in read.elements if "data-verdict" in a]
    assert verdicts == ["right", "wrong", "right", "right", "wrong", "right", "wrong", "wrong", "wrong", "wrong"]


def test_circular_copies_are_one_question(
    tmp_path: Path, write_tsv: Callable[..., Path], mmbench_rows: list[dict[str, Any]]
) -> None:
    data = write_tsv(mmbench_rows)
    save(tmp_path / "results/mmbench/dense", [{**row, "answer": "A"} for row in mmbench_rows], data, (7,))
    facts = json.loads((tmp_path / "results/mmbench/dense/results.json").read_text())
    write_json(tmp_path / "results/mmbench/dense/results.json", {**facts, "benchmark": "mmbench"})
    overview(tmp_path / "results")
    read = Texts((tmp_path / "results/overview/mmbench.html").read_text())
    assert read.visible() == ["q-7", "q-9"]
    assert len([1 for tag, a in read.elements if a.get("class") == "prompt"]) == 5
    assert len([1 for tag, a in read.elements if tag == "img"]) == 2


def test_pictures_of_a_changed_file_are_left_out_and_said_so(place: Path) -> None:
    data = place.parent / "data.tsv"
    data.write_text(data.read_text() + "\n")
    overview(place)
    page = (place / "overview/mmstar.html").read_text()
    assert "There are no pictures: " in page and "has changed since the evaluation" in page


def test_doubled_and_missing_results_are_refused(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "mmstar", tmp_path / "other/mmstar")
    done = CliRunner().invoke(app, [str(place), str(tmp_path / "other")])
    assert done.exit_code == 2 and "are both of dense on mmstar" in done.stderr
    (tmp_path / "empty").mkdir()
    done = CliRunner().invoke(app, [str(tmp_path / "empty")])
    assert done.exit_code == 2 and "no results.json in" in done.stderr


@pytest.fixture(scope="module")
def browse(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str], str]:
    """Opens a page in a real browser, runs its script, and returns what the page has become."""
    browser = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if browser is None:
        pytest.skip(f"no browser found ({', '.join(BROWSERS)}); 'apt-get install chromium' brings one")
    profile = tmp_path_factory.mktemp("profile")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=3000",
        f"--user-data-dir={profile}",
    ]

    def dump(page: Path, query: str = "") -> str:
        command = [browser, *options, "--dump-dom", f"{page.resolve().as_uri()}{query}"]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=180).stdout

    return dump


@pytest.mark.parametrize(
    ("query", "shown"),
    [
        ("", [0, 1, 2, 3, 4]),
        ("?verdictA=right", [0, 1]),
        ("?verdictA=wrong&verdictB=right", [2]),
        ("?verdictA=wrong&verdictB=wrong", [3, 4]),
        ("?modelA=1&verdictA=right", [1, 2]),
        ("?text=QUESTION%203", [3]),
    ],
)
def test_filters_in_a_browser(place: Path, browse: Callable[..., str], query: str, shown: list[int]) -> None:
    overview(place)
    dom = browse(place / "overview/mmstar.html", query)
    read = Texts(dom)
    assert read.visible() == [f"q-{number}" for number in shown]
    assert f'<output id="shown">{len(shown)} of 5</output>' in dom
    assert "owned" not in re.findall(r"<title>.*</title>", dom)[0]


def test_browser_shows_two_models_and_all_pictures(place: Path, browse: Callable[..., str]) -> None:
    overview(place)
    page = place / "overview/mmstar.html"
    both, one = browse(page), browse(page, "?modelB=0")
    hidden = [("hidden" in a) for tag, a in Texts(both).elements if "data-model" in a]
    assert hidden == [False] * 10
    assert [("hidden" in a) for tag, a in Texts(one).elements if "data-model" in a] == [False, True] * 5
    for picture in (place / "overview/pictures").iterdir():
        picture.unlink()
    assert browse(page).count(">picture missing<") == 5 and ">picture missing<" not in both
