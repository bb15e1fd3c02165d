from collections.abc import Callable
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from eval.benchmark import match
from eval.benchmarks import BENCHMARKS, get_benchmark
from eval.benchmarks.mmbench import MMBench, edition, question_text, short_groups
from eval.reading.tables import read_rows
from eval.scoring.judge import Judge
from llava_skip_base.errors import UserError

Rows = list[dict[str, Any]]
PERFECT = {7: "A", 9: "C", 1000007: "B", 1000009: "A", 2000009: "B"}


def test_registry_names_the_choices() -> None:
    names = "mmbench mmvet mmstar mme textvqa mmmu mathvista ocrbench gqa pope"
    later = "scienceqa seedimage vizwiz vqav2 ai2d chartqa docvqa hallusionbench"
    assert [*BENCHMARKS] == [*names.split(), *later.split()]
    assert isinstance(get_benchmark("MM-Bench"), MMBench)
    with pytest.raises(UserError, match="unknown benchmark 'seed'; choose one of mmbench, mmvet, mmstar, mme"):
        get_benchmark("seed")
    with pytest.raises(UserError, match="mmbench has no rule 'best'; choose one of vlmevalkit, vlmevalkit-2024"):
        get_benchmark("mmbench", rule="best")
    with pytest.raises(UserError, match="mmvet has no protocol 'cot'; choose one of llava"):
        get_benchmark("mmvet", protocol="cot")


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
    mmbench_rows[1]["C"] = ""
    score = MMBench().score(MMBench().load(write_tsv(mmbench_rows)), PERFECT)
    assert score.counts["gold_not_an_option"] == 1
    assert any("cannot be right" in note for note in score.notes)


@pytest.mark.parametrize("lost", [1, 3])
def test_missing_pass_is_refused(write_tsv: Callable[..., Path], mmbench_rows: Rows, lost: int) -> None:
    del mmbench_rows[lost]
    with pytest.raises(UserError, match=r"1 \(9\) questions lack the main row or a copy"):
        MMBench().load(write_tsv(mmbench_rows))


def test_duplicate_and_wordy_index_are_refused(write_tsv: Callable[..., Path], mmbench_rows: Rows) -> None:
    with pytest.raises(UserError, match=r"ids occur more than once: 1 \(7\)"):
        MMBench().load(write_tsv([*mmbench_rows, mmbench_rows[0]]))
    mmbench_rows[0]["index"] = "seven"
    with pytest.raises(UserError, match="whole numbers"):
        MMBench().load(write_tsv(mmbench_rows), with_images=False)


def test_wrong_columns_are_named(write_tsv: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="lacks the columns A, B, index, which mmbench needs; a row has question"):
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
    with pytest.raises(UserError, match=r"3 \(9, 1000009, 2000009\) of 5 predictions are missing"):
        match(samples, part)
    answers, counts, notes = match(samples, part, allow_missing=True)
    assert counts["missing"] == 3
    assert MMBench().score(samples, answers).score == 50.0
    with pytest.raises(UserError, match="none of the 1 prediction ids"):
        match(samples, {1: "A"}, allow_missing=True)


def test_prompts_of_the_other_protocols(write_tsv: Callable[..., Path], mmbench_rows: Rows) -> None:
    samples = MMBench().load(write_tsv(mmbench_rows), with_images=False)
    letter = "Answer with the option's letter from the given choices directly."
    expected = {
        "vlmevalkit": (
            "Hint: Look at\nthe middle.\nQuestion: Which animal?\nOptions:\nA. cat\nB. dog\n"
            "Please select the correct answer from the options above. \n"
        ),
        "vlmevalkit-llava": f"Look at\nthe middle.\nWhich animal?\nA. cat\nB. dog\n{letter}",
        "lmms-eval": f"Look at\nthe middle. Which animal? There are several options:\nA. cat\nB. dog\n\n{letter}",
    }
    for name, prompt in expected.items():
        benchmark = MMBench(protocol=name)
        assert benchmark.prompts(samples)[0] == prompt
        assert benchmark.protocol(samples) == f"{name}-en"


def test_prompts_of_the_other_protocols_in_chinese(write_tsv: Callable[..., Path], mmbench_rows: Rows) -> None:
    for row in mmbench_rows:
        row |= {"question": "这是什么?", "hint": "nan"}
    mmbench_rows[4] |= {"question": "What?", "A": "", "B": "", "C": ""}
    samples = MMBench().load(write_tsv(mmbench_rows), with_images=False)
    assert MMBench(protocol="lmms-eval").prompts(samples)[0] == (
        "nan 这是什么? 有如下几个选项：\nA. cat\nB. dog\n\n请直接使用所提供的选项字母作为答案回答。"
    )
    prompts = MMBench(protocol="vlmevalkit-llava").prompts(samples)
    assert prompts[0] == "这是什么?\nA. cat\nB. dog\n请直接回答选项字母。"
    assert prompts[4] == "What?\nAnswer the question directly."  # decided row by row
    assert MMBench(protocol="vlmevalkit").prompts(samples)[4] == "Question: What?\n"


@pytest.mark.parametrize(("rule", "right"), [("vlmevalkit", 0), ("vlmevalkit-2024", 1), ("lmms-eval", 1)])
def test_the_rule_decides(write_tsv: Callable[..., Path], mmbench_rows: Rows, rule: str, right: int) -> None:
    samples = MMBench().load(write_tsv(mmbench_rows), with_images=False)
    score = MMBench(rule).score(samples, PERFECT | {1000007: "B since dogs have ears like these"})
    assert score.counts["unresolved"] == 1 - right
    assert score.rule.startswith(f"mmbench-circular/{rule}")
    assert len(score.per_sample) == 2


def test_static_rule_scores_the_text_of_an_option(write_tsv: Callable[..., Path], mmbench_rows: Rows) -> None:
    samples = MMBench().load(write_tsv(mmbench_rows), with_images=False)
    answers = PERFECT | {7: "cat", 1000007: "it is the cat", 9: "snow"}
    assert MMBench("lmms-eval-static").score(samples, answers).score == 100.0
    assert MMBench("lmms-eval-static").score(samples, answers | {9: "snow or `C`"}).score == 100.0
    assert MMBench("lmms-eval-static").score(samples, answers | {9: "C would be snow, D not"}).score == 100.0
    assert MMBench("lmms-eval-static").score(samples, answers | {9: "E"}).score == 50.0


def test_a_note_says_how_many_answers_were_not_read(write_tsv: Callable[..., Path], mmbench_rows: Rows) -> None:
    samples = MMBench().load(write_tsv(mmbench_rows), with_images=False)
    answers = {id_: f"\u7b54\u6848\u662f{letter}\u3002" for id_, letter in PERFECT.items()}
    score = MMBench().score(samples, answers)
    assert (score.score, score.counts["unresolved"]) == (0.0, 5)
    assert score.notes[-1].startswith("5 of 5 answers name no option by this rule and count as wrong;")
    score = MMBench("lmms-eval-static").score(samples, answers)  # whose extractor knows Chinese phrases
    assert (score.score, score.notes) == (100.0, [])


def test_an_answer_that_pandas_reads_as_missing_is_no_text(write_tsv: Callable[..., Path], mmbench_rows: Rows) -> None:
    for row in mmbench_rows:
        row |= {letter: {"cat": "no", "dog": "yes"}.get(row[letter], row[letter]) for letter in "AB"}
    samples = MMBench().load(write_tsv(mmbench_rows), with_images=False)
    answers = PERFECT | {7: "None", 1000007: "no"}
    assert MMBench("lmms-eval").score(samples, answers).scores["dev"]["hits"] == 2  # "none" holds "no"
    assert MMBench().score(samples, answers).scores["dev"]["hits"] == 1
    assert MMBench().score(samples, answers | {7: "none"}).scores["dev"]["hits"] == 2


def test_an_option_that_reads_like_nothing_can_be_answered(write_tsv: Callable[..., Path], mmbench_rows: Rows) -> None:
    for row in mmbench_rows:  # question 7: None is right; question 9: N is right
        row |= {letter: {"cat": "None", "snow": "N"}.get(row[letter], row[letter]) for letter in "ABC"}
    samples = MMBench().load(write_tsv(mmbench_rows), with_images=False)
    assert MMBench().score(samples, PERFECT | {7: "None", 1000007: "None"}).score == 100.0
    # An absent answer is no "nan", which would hold the text of the option N.
    assert MMBench().score(samples, PERFECT | {9: "", 1000009: "", 2000009: ""}).score == 50.0


@pytest.mark.parametrize("rule", ["lmms-eval", "lmms-eval-static"])
def test_lmms_eval_takes_nan_for_a_text(write_tsv: Callable[..., Path], mmbench_rows: Rows, rule: str) -> None:
    for row in mmbench_rows:
        row |= {letter: {"dog": "banana", "": "nan"}.get(row[letter], row[letter]) for letter in "ABCD"}
    samples = MMBench().load(write_tsv(mmbench_rows), with_images=False)
    answers = PERFECT | {7: "no banana", 1000007: "no banana"}  # names banana and nan, so neither
    assert MMBench(rule).score(samples, answers).counts["unresolved"] == 2
    assert MMBench().score(samples, answers).counts["unresolved"] == 0


def test_edition_is_told() -> None:
    def rows(groups: int, passes: int, question: str, first: int = 0) -> list[Any]:
        base = {"question": question, "A": "x", "B": "y", "answer": "A"}
        indices = [k * 1000000 + first + g for g in range(groups) for k in range(passes)]
        return MMBench().samples([{"index": str(index), **base} for index in indices])

    assert edition(rows(510, 4, "这是什么")) == "CCBench"
    assert edition(rows(3, 2, "?", first=3000)) == "v1.1, EN"
    assert edition(rows(3, 2, "?")) == "other"
    dev = [*rows(837, 4, "?"), *rows(327, 3, "?", first=837)]
    assert (len(dev), edition(dev)) == (4329, "v1.0 dev of 2023-10-03, EN")


@pytest.fixture
def unread(write_tsv: Callable[..., Path], mmbench_rows: Rows) -> tuple[list[Any], dict[Any, str]]:
    """Question 7: one pass read, one not. Question 9: one pass wrong, so the unread one does not matter."""
    samples = MMBench().load(write_tsv(mmbench_rows), with_images=False)
    return samples, PERFECT | {1000007: "the feline", 9: "A", 2000009: "something"}


def test_judge_reads_only_what_matters(unread: Any, judge_server: Any, tmp_path: Path) -> None:
    samples, answers = unread
    server = judge_server(["B"])
    judge = Judge(server.url, tmp_path, "tiny", "j")
    score = MMBench().score(samples, answers, judge)
    assert len(server.requests) == 1
    prompt = server.requests[0]["messages"][0]["content"]
    assert prompt.endswith(
        "Question: Which animal??\nOptions: There are several options: \nA. dog\nB. cat\n\nAnswer: the feline\nReply: "
    )
    assert prompt.count("Reply: ") == 3
    assert (score.scores["dev"]["hits"], score.scores["dev"]["without_judge"]) == (1, 0.0)
    assert score.per_sample == {7: True, 9: False}
    assert score.rule.endswith("+judge")
    assert score.judge == judge.describe()
    assert MMBench().score(samples, answers, judge).score == 50.0
    assert len(server.requests) == 1  # what it said is kept


def test_static_rule_asks_no_judge(unread: Any, judge_server: Any, tmp_path: Path) -> None:
    samples, answers = unread
    server = judge_server(["B"])
    score = MMBench("lmms-eval-static").score(samples, answers, Judge(server.url, tmp_path, "tiny", "j"))
    assert (score.judge, score.rule, server.requests) == (None, MMBench.rules["lmms-eval-static"], [])
    assert score.score == 0.0


def test_judge_that_settles_nothing(unread: Any, judge_server: Any, tmp_path: Path) -> None:
    samples, answers = unread
    server = judge_server(["hard to say"])
    scores = [MMBench().score(samples, answers, Judge(server.url, tmp_path / str(n), "tiny", "j")) for n in range(2)]
    assert len(server.requests) == 6  # three attempts each
    assert scores[0].scores == scores[1].scores
    assert scores[0].counts["judge"] == {"asked": 1, "drawn_at_random": 1}
    assert scores[0].scores["dev"]["without_random_letters"] == 0.0
    assert any("drawn at random from a fixed seed" in note for note in scores[0].notes)


def test_judge_outage_and_dry_run(unread: Any, judge_server: Any, tmp_path: Path) -> None:
    samples, answers = unread
    server = judge_server([500])
    score = MMBench().score(samples, answers, Judge(server.url, tmp_path, "tiny", "j", retries=0))
    assert (score.status, score.score) == ("incomplete", None)
    score = MMBench().score(samples, answers, Judge(server.url, tmp_path, "tiny", "j", dry_run=True))
    assert (score.status, score.score, len(server.requests)) == ("scored", 0.0, 1)
    assert any("1 answers would be put to the judge" in note for note in score.notes)
    assert score.judge is None


def test_submission_is_what_the_server_takes(
    write_tsv: Callable[..., Path], mmbench_rows: Rows, tmp_path: Path
) -> None:
    samples = MMBench().load(write_tsv(mmbench_rows), with_images=False)
    notes = MMBench().write_submission(samples, PERFECT, tmp_path / "sent.xlsx")
    assert "5 rows of 2 questions, all passes" in notes[0]
    sheet = openpyxl.load_workbook(tmp_path / "sent.xlsx").active
    rows = list(sheet.iter_rows(values_only=True))
    assert rows[0] == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    assert rows[1] == (7, "Which animal?", "cat", "dog", None, None, "A", "A", "dev")
    for row in mmbench_rows:
        del row["answer"]
    tests = MMBench().load(write_tsv(mmbench_rows), with_images=False)
    MMBench().write_submission(tests, PERFECT, tmp_path / "test.xlsx")
    assert "answer" not in read_rows(tmp_path / "test.xlsx")[0]
    with pytest.raises(UserError, match=r"the submission: 1 \(9\) questions have fewer passes than options"):
        MMBench().write_submission(samples[:-1], PERFECT, tmp_path / "short.xlsx")
    assert not (tmp_path / "short.xlsx").exists()
