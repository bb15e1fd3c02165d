import json
import multiprocessing
import sys

import pytest

from tests.support.conversations import byte_tokenizer
from train.arguments import ModelArguments
from train.bench_data import (
    BenchArguments,
    in_new_process,
    load_and_read,
    made_up_records,
    main,
    measure,
    show,
    write_records,
)


def in_fork(function, *arguments):
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def test_memory_does_not_grow_with_the_records(tmp_path):
    # As Python objects the larger set would take 100 MiB; what may grow is Arrow's pool of read buffers.
    own = {}
    for count in (500, 30_000):
        write_records(tmp_path / f"{count}.json", count)
        found = in_fork(load_and_read, str(tmp_path / f"{count}.json"), str(tmp_path / "cache"), 2000)
        assert found["records"] == count
        own[count] = found["own_mib"] - found["own_before_mib"]
    assert (tmp_path / "30000.json").stat().st_size > 20e6
    assert own[30_000] - own[500] < 30, own


@pytest.mark.slow
def test_two_hundred_thousand_records_load_in_a_gibibyte(tmp_path):
    write_records(tmp_path / "data.json", 200_000)
    found = in_new_process(load_and_read, str(tmp_path / "data.json"), str(tmp_path / "cache"), 20_000)
    assert found["records"] == 200_000 and found["resident_mib"] < 1024, found
    assert found["own_mib"] - found["own_before_mib"] < 150, found  # as Python objects they would take 700


def test_the_bench_measures_and_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))  # which `measure` changes
    monkeypatch.setattr("train.bench_data.in_new_process", in_fork)
    byte_tokenizer().save_pretrained(tmp_path)
    model = ModelArguments(tokenizer=str(tmp_path), template="v1", preset="sv-llava-100")
    figures = measure(model, BenchArguments(records=200, pictures=24, width=64, workers=[0, 1]))
    assert figures["later_load"]["records"] == 200
    assert all(rate > 0 for name in ("pictures", "samples") for rate in figures[f"{name}_per_second"].values())
    show(figures)
    assert "images decoded/s, 1 workers" in capsys.readouterr().out


def test_the_program_reads_its_command_line_as_the_others_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("train.bench_data.measure", lambda model, arguments: {"workers": arguments.workers})
    monkeypatch.setattr("train.bench_data.show", print)
    monkeypatch.setattr(sys, "argv", ["bench_data", "--workers", "1", "2", "--report", str(tmp_path / "figures.json")])
    main()
    assert json.loads((tmp_path / "figures.json").read_text()) == {"workers": [1, 2]}
    monkeypatch.setattr(sys, "argv", ["bench_data", "--workerz", "1"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2 and "Did you mean --workers?" in capsys.readouterr().err


def test_made_up_records_have_the_form_of_llavas():
    records = list(made_up_records(64))
    assert json.dumps(records) == json.dumps(list(made_up_records(64)))
    assert sum("image" in record for record in records) == 56
    assert all(("image" in r) == ("<image>" in r["conversations"][0]["value"]) for r in records)
