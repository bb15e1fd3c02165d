import json
from pathlib import Path

import pytest

from eval.answering.answers import AnswerLog
from llava_skip_base.errors import UserError

RUN = {"model_sha256": "m", "data_sha256": "d"}


def write(folder: Path, count: int) -> None:
    with AnswerLog(folder, RUN) as log:
        log.append([{"index": number, "prediction": f"answer\n{number} é"} for number in range(count)])


def test_answers_come_back(tmp_path: Path) -> None:
    write(tmp_path, 3)
    with AnswerLog(tmp_path, RUN) as log:
        assert [log.answers[n]["prediction"] for n in range(3)] == ["answer\n0 é", "answer\n1 é", "answer\n2 é"]


def test_answers_reach_the_disk_at_once(tmp_path: Path) -> None:
    with AnswerLog(tmp_path, RUN) as log:
        log.append([{"index": 0, "prediction": "A"}])
        assert json.loads(log.path.read_bytes()) == {"index": 0, "prediction": "A"}


@pytest.mark.parametrize("lost", [1, 5, 20])
def test_half_a_line_is_cut_off_and_only_that(tmp_path: Path, lost: int) -> None:
    write(tmp_path, 3)
    path = tmp_path / "answers.jsonl"
    data = path.read_bytes()
    path.write_bytes(data[:-lost])
    with AnswerLog(tmp_path, RUN) as log:
        assert sorted(log.answers) == [0, 1]
        log.append([{"index": 2, "prediction": "answer\n2 é"}])
    assert path.read_bytes() == data


def test_damage_elsewhere_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 3)
    path = tmp_path / "answers.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:9], lines[2]]) + "\n")
    with pytest.raises(UserError, match="line 2: not an answer"):
        AnswerLog(tmp_path, RUN)
    path.write_text("\n".join([lines[0], lines[0]]) + "\n")
    with pytest.raises(UserError, match=r"answers occur twice for 1 \(0\)"):
        AnswerLog(tmp_path, RUN)


def test_another_run_is_refused_with_what_differs(tmp_path: Path) -> None:
    write(tmp_path, 1)
    with pytest.raises(UserError, match="another run.*data_sha256: d there, e now.*--output"):
        AnswerLog(tmp_path, RUN | {"data_sha256": "e"})
    assert json.loads((tmp_path / "run.json").read_text()) == RUN


def test_answers_of_unknown_origin_are_refused(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / "run.json").unlink()
    with pytest.raises(UserError, match=r"run\.json is gone"):
        AnswerLog(tmp_path, RUN)


def test_two_writers_are_refused(tmp_path: Path) -> None:
    with AnswerLog(tmp_path, RUN), pytest.raises(UserError, match="another run is writing there"):
        AnswerLog(tmp_path, RUN)
