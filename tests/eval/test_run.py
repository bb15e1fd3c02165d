import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import eval.answering.generate
from eval.answering.models import check_model
from eval.run import app
from llava_skip_base.paths import newest_model
from tests.support.answering import AtOnce

ROOT = Path(__file__).parents[2]
Rows = list[dict[str, Any]]


class Echo(AtOnce):
    """A fake model that always answers A, and records what it was asked."""

    batches: list[list[str]] = []

    loaded: list[str] = []

    def __init__(self, model: Any, numerics: Any, rank: int) -> None:
        Echo.loaded.append(model.name)

    def answer(self, prompts: Sequence[str], images: Sequence[Sequence[Any]], max_new_tokens: int) -> list[str]:
        assert all(image.open().mode == "RGB" for own in images for image in own)
        Echo.batches.append(list(prompts))
        return ["A"] * len(prompts)


@pytest.fixture(autouse=True)
def fake_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(eval.answering.generate, "Generator", Echo)
    monkeypatch.setattr(Echo, "batches", [])
    monkeypatch.setattr(Echo, "loaded", [])
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def evaluate(model_folder: Path) -> Callable[..., Result]:
    def run(benchmark: str, *options: object, model: Path | None = model_folder) -> Result:
        chosen = ["--model", model] if model else []
        return CliRunner().invoke(app, [str(word) for word in ["--benchmarks", benchmark, *chosen, *options]])

    return run


def load(path: str | Path) -> Any:
    return json.loads(Path(path).read_text())


def test_mmbench_from_end_to_end(
    evaluate: Callable[..., Result], write_tsv: Callable[..., Path], mmbench_rows: Rows
) -> None:
    done = evaluate("mmbench", "--data", write_tsv(mmbench_rows), "--batch-size", 2)
    assert done.exit_code == 0, done.output
    assert "scored; written to results/mmbench/tiny/results.json" in done.output
    result = load("results/mmbench/tiny/results.json")
    assert result["status"] == "scored"
    assert result["score"] == 0.0
    assert result["scores"]["dev"]["vanilla"]["all_rows"] == 0.4
    assert result["protocol"] == "llava-en"
    assert result["model"]["skip"] == {"retained": 7, "skipped": 9, "forget_cache": True}
    assert result["image_tokens"] == {"entering": 18, "attention": 18, "ffn": 9, "cache": 9}
    assert len(result["data"]["sha256"]) == 64
    assert result["generation"]["max_new_tokens"] == 1024
    assert {"torch", "transformers", "llava_skip", "python"} == set(result["versions"])
    lengths = [len(prompt) for batch in Echo.batches for prompt in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert list(load("results/mmbench/tiny/predictions.json")) == ["7", "9", "1000007", "1000009", "2000009"]
    lines = Path("results/mmbench/tiny/answers.jsonl").read_text().splitlines()
    assert {json.loads(line)["index"] for line in lines} == {7, 9, 1000007, 1000009, 2000009}


def test_many_benchmarks_and_models_load_each_model_once(
    evaluate: Callable[..., Result],
    write_tsv: Callable[..., Path],
    mmbench_rows: Rows,
    mmstar_rows: Rows,
    model_folder: Path,
) -> None:
    other = shutil.copytree(model_folder, model_folder.parent / "other")
    (other / "model.safetensors").write_bytes(b"others")
    data = ["--data", f"mmbench={write_tsv(mmbench_rows)}", "--data", f"mmstar={write_tsv(mmstar_rows, 'star.tsv')}"]
    done = evaluate("all", "--model", other, *data, "--output", "out")
    assert done.exit_code == 0, done.output
    assert Echo.loaded == ["tiny", "other"]
    found = {str(path) for path in Path("out").rglob("results.json")}
    assert found == {f"out/{b}/{m}/results.json" for b in ("mmbench", "mmstar") for m in ("tiny", "other")}
    page = Path("out/overview/mmstar.html").read_text()
    assert page.count("<article") == 5 and page.count('class="answer ') == 10
    shown = load("out/overview/overview.json")
    assert {fact["model_sha256"] for fact in shown} == {check_model(model_folder).sha256, check_model(other).sha256}
    assert "mmbench: other" in done.output and "index.html" in done.output


def test_results_do_not_depend_on_when_or_where(
    evaluate: Callable[..., Result], write_tsv: Callable[..., Path], mmstar_rows: Rows
) -> None:
    data = write_tsv(mmstar_rows)
    for output in ("one", "two"):
        evaluate("mmstar", "--data", data, "--output", output)
    files = {path.relative_to("one") for path in Path("one").rglob("*") if path.is_file()}
    same = {name for name in files if Path("one", name).read_bytes() == Path("two", name).read_bytes()}
    assert {str(name) for name in files - same} <= {"mmstar/tiny/run_info.json"}
    assert load("one/mmstar/tiny/run_info.json").keys() == {"host", "processes", "resumed", "seconds_since_start"}
    assert load("one/mmstar/tiny/per_sample.json") == {"0": True, "1": False, "2": False, "3": False, "4": True}


def test_blind_questions_have_no_image_and_a_folder_of_their_own(
    evaluate: Callable[..., Result],
    write_tsv: Callable[..., Path],
    mmstar_rows: Rows,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[Any] = []
    answer = Echo.answer
    monkeypatch.setattr(Echo, "answer", lambda *words: shown.extend(words[2]) or answer(*words))
    data = write_tsv(mmstar_rows)
    assert evaluate("mmstar", "--data", data, "--blind").exit_code == 0
    assert shown == [()] * 5
    result = load("results/mmstar/tiny-blind/results.json")
    assert (result["model"]["name"], result["generation"]["blind"]) == ("tiny-blind", True)
    evaluate("mmstar", "--data", data)
    assert [len(images) for images in shown[5:]] == [1] * 5


def test_run_that_cannot_be_scored_does_not_stop_the_others(
    evaluate: Callable[..., Result],
    write_tsv: Callable[..., Path],
    mmbench_rows: Rows,
    mmstar_rows: Rows,
) -> None:
    star = write_tsv([{**mmstar_rows[0], "answer": ""}], "star.tsv")
    done = evaluate("mmstar,mmbench", "--data", f"mmbench={write_tsv(mmbench_rows)}", "--data", f"mmstar={star}")
    assert done.exit_code == 2
    assert "error: mmstar, tiny: 1 (0) of 1 rows have no gold answer" in done.stderr
    assert load("results/mmbench/tiny/results.json")["status"] == "scored"
    assert not Path("results/mmstar/tiny/results.json").exists()


def test_limit_then_all(evaluate: Callable[..., Result], write_tsv: Callable[..., Path], mmstar_rows: Rows) -> None:
    data = write_tsv(mmstar_rows)
    assert evaluate("mmstar", "--data", data, "--limit", 2).exit_code == 0
    assert set(load("results/mmstar/tiny/images.json")) == {"0", "1"}
    assert load("results/mmstar/tiny/results.json")["counts"]["questions"] == 2
    done = evaluate("mmstar", "--data", data)
    assert "2 of 5 answers were there already" in done.output
    result = load("results/mmstar/tiny/results.json")
    assert result["score"] == pytest.approx(40.0)
    assert load("results/mmstar/tiny/run_info.json")["resumed"] == 2
    assert len(Path("results/mmstar/tiny/answers.jsonl").read_text().splitlines()) == 5
    keys = load("results/mmstar/tiny/images.json")
    assert set(keys) == set(load("results/mmstar/tiny/per_sample.json")) and len(set(keys.values())) == 5


def test_finished_run_loads_no_model(
    evaluate: Callable[..., Result], write_tsv: Callable[..., Path], mmstar_rows: Rows
) -> None:
    data = write_tsv(mmstar_rows)
    evaluate("mmstar", "--data", data)
    Echo.batches.clear()
    assert evaluate("mmstar", "--data", data).exit_code == 0
    assert Echo.batches == []


def test_interrupted_run_repeats_whole_batches_but_no_answers(
    evaluate: Callable[..., Result], write_tsv: Callable[..., Path], mmstar_rows: Rows
) -> None:
    data = write_tsv(mmstar_rows)
    evaluate("mmstar", "--data", data, "--batch-size", 2)
    undisturbed, batches = Path("results/mmstar/tiny/answers.jsonl").read_bytes(), list(Echo.batches)
    lines = undisturbed.splitlines(keepends=True)
    Path("results/mmstar/tiny/answers.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:10])
    Echo.batches.clear()
    assert evaluate("mmstar", "--data", data, "--batch-size", 2).exit_code == 0
    assert Echo.batches == batches[1:]
    assert Path("results/mmstar/tiny/answers.jsonl").read_bytes() == undisturbed


def test_mmvet_without_a_judge(evaluate: Callable[..., Result], mmvet_data: Path) -> None:
    done = evaluate("mmvet", "--data", mmvet_data)
    assert done.exit_code == 0
    assert "no score was computed" in done.output
    result = load("results/mmvet/tiny/results.json")
    assert (result["status"], result["score"]) == ("unscored", None)
    assert load("results/mmvet/tiny/predictions.json") == {"v1_0": "A", "v1_1": "A", "v1_2": "A"}


def test_mmvet_with_a_judge(
    evaluate: Callable[..., Result], mmvet_data: Path, judge_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = judge_server(["0.5"])
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    done = evaluate("mmvet", "--data", mmvet_data, "--judge-runs", 2)
    assert done.exit_code == 0, done.output
    result = load("results/mmvet/tiny/results.json")
    assert result["score"] == 50.0
    assert result["judge"] == {"model": "gpt-4-0613", "url": server.url, "runs": 2}
    written = "".join(path.read_text() for path in Path("results/mmvet/tiny").iterdir())
    assert "sk-very-secret" not in written + done.output


def test_judge_outage_is_incomplete(
    evaluate: Callable[..., Result], mmvet_data: Path, judge_server: Callable[..., Any]
) -> None:
    server = judge_server(["1.0", 503])
    done = evaluate("mmvet", "--data", mmvet_data, "--judge-url", server.url)
    assert done.exit_code == 1
    assert "grading is incomplete, 1 of 3 grades" in done.output
    result = load("results/mmvet/tiny/results.json")
    assert (result["status"], result["score"], result["scores"]) == ("incomplete", None, {})


def test_other_data_in_the_same_folder_is_refused(
    evaluate: Callable[..., Result], write_tsv: Callable[..., Path], mmstar_rows: Rows
) -> None:
    evaluate("mmstar", "--data", write_tsv(mmstar_rows))
    done = evaluate("mmstar", "--data", write_tsv(mmstar_rows[:4], "other.tsv"))
    assert done.exit_code == 2
    assert "holds the answers of another run (data_sha256" in done.stderr
    done = evaluate("mmstar", "--data", "data.tsv", "--max-new-tokens", 3)
    assert "max_new_tokens: 1024 there, 3 now" in done.stderr


def test_changed_weights_are_another_model(
    evaluate: Callable[..., Result], write_tsv: Callable[..., Path], mmstar_rows: Rows, model_folder: Path
) -> None:
    data = write_tsv(mmstar_rows)
    evaluate("mmstar", "--data", data)
    (model_folder / "model.safetensors").write_bytes(b"trained on")
    done = evaluate("mmstar", "--data", data)
    assert done.exit_code == 2
    assert "model_sha256" in done.stderr


def test_errors_come_before_a_model_loads(
    evaluate: Callable[..., Result], write_tsv: Callable[..., Path], mmstar_rows: Rows, model_folder: Path
) -> None:
    data = write_tsv(mmstar_rows)

    def message(*words: object, model: Path | None = model_folder) -> str:
        done = evaluate(*words, model=model)
        assert done.exit_code == 2, done.output
        assert "Traceback" not in done.output
        return done.stderr

    assert "unknown benchmark 'mmstars'; choose one of" in message("mmstars")
    assert "--benchmarks is 'mmstar,mmstar'" in message("mmstar,mmstar")
    assert "with 2 benchmarks say whose: --data mmbench=" in message("mmbench,mmstar", "--data", data)
    assert "say whose it is, --benchmarks NAME with one of mmbench" in message("all", "--data", data)
    assert "mmvet is not evaluated here" in message("mmstar", "--data", f"mmvet={data}")
    assert "--data is given twice for mmstar" in message("mmstar", "--data", data, "--data", data)
    assert "several models are called 1 (tiny)" in message("mmstar", "--data", data, "--model", model_folder)
    assert "--dtype is 'int4'" in message("mmstar", "--data", data, "--dtype", "int4")
    assert "gone.tsv: no such file" in message("mmstar", "--data", "gone.tsv")
    assert "no --data given, and playground/data/digits/eval/mmstar.tsv does not exist" in message("mmstar")
    assert "lacks the columns A, B, which mmbench needs" in message("mmbench", "--data", data)
    assert "nowhere: no such model folder" in message("mmstar", "--data", data, model=Path("nowhere"))
    assert "no model given, and checkpoints/ holds none" in message("mmstar", "--data", data, model=None)
    assert "--batch-size is 0" in message("mmstar", "--data", data, "--batch-size", 0)
    assert "nowhere: no such image folder" in message("mmstar", "--data", data, "--images", "nowhere")
    assert "data.tsv: is a file" in message("mmstar", "--data", data, "--output", data)
    assert "judge URL 'x': expected http" in message("mmstar", "--data", data, "--judge-url", "x")
    tagged = write_tsv([{**mmstar_rows[0], "question": "What is an <image>, and <image>?"}], "tagged.tsv")
    assert "1 (0) of 1 questions hold another number of <image> than" in message("mmstar", "--data", tagged)
    (model_folder / "adapter_config.json").write_text("{}")
    assert "is a LoRA adapter; merge it: llava-skip merge-lora" in message("mmstar", "--data", data)
    (model_folder / "adapter_config.json").unlink()
    (model_folder / "model.safetensors").unlink()
    assert "holds no weights" in message("mmstar", "--data", data)
    (model_folder / "config.json").write_text("{")
    assert "not valid JSON" in message("mmstar", "--data", data)
    (model_folder / "config.json").unlink()
    assert "holds no config.json" in message("mmstar", "--data", data)
    assert Echo.batches == []
    assert not Path("results").exists()


def test_newest_model_and_embedded_data_are_the_defaults(
    evaluate: Callable[..., Result], write_tsv: Callable[..., Path], mmstar_rows: Rows, model_folder: Path
) -> None:
    for age, name in [(30, "old"), (20, "new"), (10, "new/checkpoint-5")]:
        folder = Path("checkpoints") / name
        folder.mkdir(parents=True)
        for file in model_folder.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        os.utime(folder / "config.json", (time.time() - age,) * 2)
    assert newest_model() == Path("checkpoints/new")
    write_tsv(mmstar_rows, "playground/data/digits/eval/mmstar.tsv")
    assert evaluate("mmstar", model=None).exit_code == 0
    assert load("results/mmstar/new/results.json")["model"]["path"] == "checkpoints/new"


def test_model_hash_leaves_logs_out(model_folder: Path) -> None:
    before = check_model(model_folder).sha256
    (model_folder / "trainer_state.json").write_text("{}")
    assert check_model(model_folder).sha256 == before
    (model_folder / "chat_template.jinja").write_text("{}")
    assert check_model(model_folder).sha256 != before


SLOW_RUN = textwrap.dedent("""
    import sys, time
    import eval.answering.generate
    from eval.run import app
    from tests.support.answering import AtOnce

    class Slow(AtOnce):
        def __init__(self, model, numerics, rank):
            pass

        def answer(self, prompts, images, max_new_tokens):
            time.sleep(0.2)
            return [prompt[9] + ". " + "x" * 2000 for prompt in prompts]

    eval.answering.generate.Generator = Slow
    app(sys.argv[1:])
""")


def test_real_kill_loses_and_doubles_nothing(
    write_tsv: Callable[..., Path], mmstar_rows: Rows, model_folder: Path
) -> None:
    data = write_tsv(mmstar_rows)
    command = [sys.executable, "-c", SLOW_RUN, "--benchmarks", "mmstar", "--model", model_folder, "--data", data]
    command = [*map(str, command), "--batch-size", "1", "--output"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "calm"], env=environment, check=True, capture_output=True)

    victim = subprocess.Popen(
        [*command, "killed"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    log, deadline = Path("killed/mmstar/tiny/answers.jsonl"), time.monotonic() + 60
    while not (log.exists() and log.read_bytes().count(b"\n") >= 2):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not Path("killed/mmstar/tiny/results.json").exists()
    assert log.read_bytes().count(b"\n") < 5

    subprocess.run([*command, "killed"], env=environment, check=True, capture_output=True)
    assert log.read_bytes() == Path("calm/mmstar/tiny/answers.jsonl").read_bytes()
    calm, killed = Path("calm/mmstar/tiny/results.json"), Path("killed/mmstar/tiny/results.json")
    assert killed.read_bytes() == calm.read_bytes()
    assert load(killed.with_name("run_info.json"))["resumed"] >= 2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--engine", "tgi"], "choose one of transformers, vllm"),
        (["--engine", "vllm", "--attn", "sdpa"], "--attn"),
        (["--engine", "vllm", "--processes", "2"], "--processes"),
        (["--engine", "vllm"], "scripts/vllm_env.sh"),
    ],
)
def test_an_engine_that_is_unknown_or_missing(
    evaluate: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, options: list[str], named: str
) -> None:
    monkeypatch.setattr("eval.answering.engines.find_spec", lambda name: None)
    done = evaluate("mmstar", *options)
    assert done.exit_code == 2
    assert named in done.output
    assert Echo.loaded == []
