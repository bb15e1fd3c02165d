"""The page of the paper's tables is that of the recipes, and has every row."""

import re

from tests.support.runs import ROOT
from train.planning.page import cost_of, page, rows
from train.planning.published import BENCHMARKS, NO_METHOD
from train.recipe.recipes import paper_row, read_recipe, recipe_names

PAGE = ROOT / "docs/reproduce.md"
ROWS = {1: 11, 2: 7, 3: 1}
"""Rows of the paper's tables."""


def test_the_page_is_made_from_the_recipes():
    assert PAGE.read_text(encoding="utf-8") == page(), "docs/reproduce.md is stale: run llava-skip reproduce"


def test_every_row_of_the_paper_is_a_recipe_or_has_a_reason():
    named = [row.paper["table"] for row in rows()] + [table for table, *_ in NO_METHOD]
    assert {table: named.count(table) for table in ROWS} == ROWS
    assert all(reason for *_, reason in NO_METHOD)
    for row in rows():
        assert set(row.paper["scores"]) <= set(BENCHMARKS) and row.paper["row"]
        assert row.cost is not None and row.cost["memory"]["fits"], row.name
        assert row.recipe["output_dir"] == f"{{checkpoints}}/{row.name}"


def test_a_row_differs_from_others_by_data_alone():
    own = {"preset", "model", "data", "images", "reduction", "output_dir", "per_device_train_batch_size", "max_length",
           "train_parts", "learning_rate"}  # fmt: skip
    for table, first in ((1, "table1-llava"), (2, "table2-llava")):
        base = read_recipe(first)
        for row in rows():
            if row.paper["table"] == table:
                assert {key for key in base | row.recipe if base.get(key) != row.recipe.get(key)} <= own


def test_each_page_command_names_a_recipe_and_what_an_earlier_one_writes():
    written = set()
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if found := re.match(r"llava-skip train --recipe (\S+)$", line):
            recipe = read_recipe(found[1])
            assert not recipe["model"].startswith("{checkpoints}") or recipe["model"].split("/")[1] in written
            written.add(found[1])
        elif found := re.match(r"llava-skip eval --model checkpoints/(\S+) (--reduction \S+ )?\$DATA$", line):
            assert found[1] in written
    assert {row.name for row in rows()} <= written


def test_a_run_does_not_read_the_row_of_the_paper():
    assert "paper" not in read_recipe("table1-sv-cos") and paper_row("table1-sv-cos")["hours"] == 9.8
    assert paper_row("finetune-665k") is None and len([n for n in recipe_names() if paper_row(n)]) == 17


def test_a_skipping_row_costs_less_than_the_dense_one():
    hours = {name: cost_of(f"table1-{name}")["hours"] for name in ("llava", "sv-llava-256", "sv-llava-100")}
    assert hours["sv-llava-100"] < hours["sv-llava-256"] < hours["llava"]
