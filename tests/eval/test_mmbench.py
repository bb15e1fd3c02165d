from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval.benchmarks import BENCHMARKS, get_benchmark
from eval.benchmarks.base import match
from eval.benchmarks.mmbench import MMBench, question_text, short_groups
from eval.errors import EvalError

Rows = list[dict[str, Any]]
PERFECT = {7: "A", 9: "C", 1000007: "B", 1000009: "A", 2000009: "B"}


def test_registry_names_the_choices() -> None:
    assert set(BENCHMARKS) == {"mmbench", "mmstar", "mmvet"}
    with pytest.raises(EvalError, match="unknown benchmark 'MMBench'; choose one of mmbench, mmstar, mmvet"):
        get_benchmark("MMBench")


def test_circular_and_vanilla_by_hand(write_tsv: Callable[..., Path], mmbench_rows: Rows) -> None:
    samples = MMBench().load(write_tsv(mmbench_rows))
    # Question 9 is right in its main row and one copy, wrong in the other: 1 of 2 questions, 4 of 5 rows.
    score = MMBench().score(samples, PERFECT | {2000009: "snow or sun"})
    assert score.status == "scored"
    assert score.score == 50.0
    dev = score.scores["dev"]
    assert dev["Overall"] == 0.5
    assert dev["L2"] == {"FP-S": 1.0, "LR": 0.0}
    assert dev["L3"] == {"future_prediction": 0.0, "ocr": 1.0}
    assert (dev["hits"], dev["questions"]) == (1, 2)
    assert dev["vanilla"] == {"main_rows": 1.0, "all_rows": 0.8}
    assert score.counts["unresolved"] == 1
    assert score.counts["passes"] == {"2": 1, "3": 1}


def test_all_right_and_same_letter_always(write_tsv: Callable[..., Path], mmbench_rows: Rows) -> None:
    samples = MMBench().load(write_tsv(mmbench_rows))
    assert MMBench().score(samples, PERFECT).score == 100.0
    assert MMBench().score(samples, dict.fromkeys(PERFECT, "A")).score == 0.0


def test_prompt_is_llavas(write_tsv: Callable[..., Path], mmbench_rows: Rows) -> None:
    samples = MMBench().load(write_tsv(mmbench_rows))
    assert MMBench().prompts(samples)[0] == (
        "Look at\nthe middle.\nWhich animal?\nA. cat\nB. dog\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert MMBench().protocol(samples) == "llava-en"


def test_chinese_file_gets_the_chinese_instruction(write_tsv: Callable[..., Path], mmbench_rows: Rows) -> None:
    for row in mmbench_rows:
        row["question"] = "这是什么?"
    samples = MMBench().load(write_tsv(mmbench_rows))
    assert MMBench().prompts(samples)[1] == "这是什么?\nA. sun\nB. rain\nC. snow\n请直接回答选项字母。"
    assert MMBench().protocol(samples) == "llava-cn"


@pytest.mark.parametrize("word", ["nan", "None", "NONE", ""])
def test_missing_option_ends_the_list(write_tsv: Callable[..., Path], mmbench_rows: Rows, word: str) -> None:
    mmbench_rows[1]["B"] = word
    mmbench_rows[1]["hint"] = word
    samples = MMBench().load(write_tsv(mmbench_rows))
    assert question_text(samples[1].fields) == "What comes next?\nA. sun"


def test_options_na_and_null_are_options(write_tsv: Callable[..., Path], mmbench_rows: Rows) -> None:
    mmbench_rows[1] |= {"A": "NA", "B": "null"}
    samples = MMBench().load(write_tsv(mmbench_rows))
    assert question_text(samples[1].fields) == "What comes next?\nA. NA\nB. null\nC. snow"


def test_gold_that_is_no_option_is_counted(write_tsv: Callable[..., Path], mmbench_rows: Rows) -> None:
    mmbench_rows[1]["C"] = "nan"
    score = MMBench().score(MMBench().load(write_tsv(mmbench_rows)), PERFECT)
    assert score.counts["gold_not_an_option"] == 1
    assert any("cannot be right" in note for note in score.notes)


@pytest.mark.parametrize("lost", [1, 3])
def test_missing_pass_is_refused(write_tsv: Callable[..., Path], mmbench_rows: Rows, lost: int) -> None:
    del mmbench_rows[lost]
    with pytest.raises(EvalError, match=r"1 \(9\) questions lack the main row or a copy"):
        MMBench().load(write_tsv(mmbench_rows))


def test_duplicate_and_wordy_index_are_refused(write_tsv: Callable[..., Path], mmbench_rows: Rows) -> None:
    with pytest.raises(EvalError, match=r"ids occur more than once: 1 \(7\)"):
        MMBench().load(write_tsv([*mmbench_rows, mmbench_rows[0]]))
    mmbench_rows[0]["index"] = "seven"
    with pytest.raises(EvalError, match="whole numbers"):
        MMBench().load(write_tsv(mmbench_rows), with_images=False)


def test_wrong_columns_are_named(write_tsv: Callable[..., Path]) -> None:
    with pytest.raises(EvalError, match="lacks the columns A, B, index, which mmbench needs; it has question"):
        MMBench().load(write_tsv([{"question": "?"}]))


def test_short_groups_know_the_fixed_last_option(mmbench_rows: Rows) -> None:
    base = {"question": "?", "answer": "A"}
    turned = [
        {"index": "0", **base, "A": "1", "B": "2", "C": "3", "D": "4"},
        {"index": "1000000", **base, "A": "4", "B": "1", "C": "2", "D": "3"},
        {"index": "2000000", **base, "A": "3", "B": "4", "C": "1", "D": "2"},
    ]
    fixed = [
        {"index": "5", **base, "A": "1", "B": "2", "C": "3", "D": "all"},
        {"index": "1000005", **base, "A": "3", "B": "1", "C": "2", "D": "all"},
        {"index": "2000005", **base, "A": "2", "B": "3", "C": "1", "D": "all"},
    ]
    assert short_groups(MMBench().samples(turned + fixed)) == [0]
    assert short_groups(MMBench().samples(fixed[:2])) == [5]


def test_limit_keeps_whole_groups(write_tsv: Callable[..., Path], mmbench_rows: Rows) -> None:
    samples = MMBench().load(write_tsv(mmbench_rows))
    assert [sample.id for sample in MMBench().limit(samples, 1)] == [7, 1000007]


def test_test_split_is_not_scored(write_tsv: Callable[..., Path], mmbench_rows: Rows) -> None:
    for row in mmbench_rows:
        del row["answer"]
    score = MMBench().score(MMBench().load(write_tsv(mmbench_rows)), PERFECT)
    assert (score.status, score.score) == ("unscored", None)
    assert "2 of 2 questions have no gold answer" in score.notes[0]


def test_splits_are_not_mixed(write_tsv: Callable[..., Path], mmbench_rows: Rows) -> None:
    for row in mmbench_rows:
        row["split"] = "dev" if row["index"] % 1000000 == 9 else "test"
    score = MMBench().score(MMBench().load(write_tsv(mmbench_rows)), PERFECT | {9: "A"})
    assert {split: values["Overall"] for split, values in score.scores.items()} == {"test": 1.0, "dev": 0.0}
    assert score.score == 0.0


def test_match_counts_unknown_and_missing(mmbench_rows: Rows) -> None:
    rows = [{key: str(value) for key, value in row.items()} for row in mmbench_rows]
    samples = MMBench().samples(rows)
    answers, counts, notes = match(samples, PERFECT | {11: "A", 12: "B"})
    assert answers == PERFECT
    assert counts == {"missing": 0, "unknown": 2}
    assert "2 (11, 12) of 7 predictions are not in the benchmark file" in notes[0]
    part = {7: "A", 1000007: "B"}
    with pytest.raises(EvalError, match=r"3 \(9, 1000009, 2000009\) of 5 predictions are missing"):
        match(samples, part)
    answers, counts, notes = match(samples, part, allow_missing=True)
    assert counts["missing"] == 3
    assert MMBench().score(samples, answers).score == 50.0
    with pytest.raises(EvalError, match="none of the 1 prediction ids"):
        match(samples, {1: "A"}, allow_missing=True)
