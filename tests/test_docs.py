import re
from importlib import import_module
from pathlib import Path

import pytest
import typer

from llava_skip.presets import preset_rows
from llava_skip_base.command import PROGRAMS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_no_text_says_that_a_registry_has_the_project():
    """It is installed from a checkout."""
    kinds = {".md", ".py", ".yaml", ".sh", ".toml"}
    folders = ("docs", "eval", "llava_skip", "llava_skip_base", "scripts", "serve", "train")
    texts = [ROOT / "README.md", *(file for folder in folders for file in (ROOT / folder).rglob("*"))]
    said = re.compile(r"pip\s+install\s+['\"]?llava[-_]skip")
    assert [f for f in texts if f.suffix in kinds and said.search(f.read_text(encoding="utf-8"))] == []


def test_every_fault_has_a_test_that_exists():
    rows = [line for line in (ROOT / "docs/faults.md").read_text(encoding="utf-8").splitlines() if line[:2] == "| "]
    faults = [row.strip("| ").split(" | ") for row in rows if row != "| fault | what happens | test |"]
    named = [re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", fault[-1]) for fault in faults]
    assert len(faults) >= 100
    assert [fault for fault, tests in zip(faults, named, strict=True) if not tests and fault[-1] != "the same"] == []
    for file, name in (test for tests in named for test in tests):
        text = next(ROOT.glob(f"tests/**/{file}")).read_text(encoding="utf-8")
        assert not name or f"def {name}(" in text, f"{file}::{name}"


def eval_commands():
    """Module and arguments of each evaluation that a page or a job script shows."""
    texts = [path.read_text(encoding="utf-8") for path in [*PAGES, *ROOT.glob("scripts/**/*")] if path.is_file()]
    lines = [line for text in texts for line in text.replace("\\\n", " ").splitlines()]
    for line in lines:
        pattern = r"(?:-m (eval\.\w+)|llava-skip (eval|score|compare)|eval\.sbatch|make eval-\w+) (.*)"
        if shown := re.search(pattern, line):
            program = PROGRAMS[shown[2]].module if shown[2] else "eval.run"
            yield shown[1] or program, shown[3]


def test_options_of_evaluations_exist():
    commands = list(eval_commands())
    assert {"eval.run", "eval.score"} <= {module for module, _ in commands} and len(commands) > 10
    for module, arguments in commands:
        known = {
            name
            for option in typer.main.get_command(import_module(module).app).params
            for name in (*option.opts, *option.secondary_opts)
        }
        given = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", arguments)) - {"--dry-run"}
        assert given <= known, (module, arguments)


def test_the_table_of_presets_has_their_numbers():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] == "| `"]
    shown = {}
    for names, *numbers in cells:
        split = [[part.strip() for part in number.split(",")] for number in numbers]
        for place, name in enumerate(re.findall(r"`([\w-]+)`", names)):
            shown[name] = [part[min(place, len(part) - 1)] for part in split]
    expected = {
        name: [str(total), "all" if "all" in shown.get(name, []) else str(retained), str(skipped or "-"), str(cache)]
        for name, total, retained, skipped, cache in preset_rows()
    }
    assert shown == expected
