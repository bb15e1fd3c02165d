import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What lmms-eval 0.7 needs to run a task, but for what this project has; the rest of its list is for other models, and
# would replace the pinned torch's companions.
NEEDED = ("aiohttp", "evaluate", "loguru", "pytablewriter", "pytz", "sacrebleu")
TASK = """
task: digits
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  max_new_tokens: 4
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
UTILS = """
import base64, io
from PIL import Image

def doc_to_visual(doc):
    return [Image.open(io.BytesIO(base64.b64decode(doc["image"])))]
"""


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """An environment of its own: this one's packages, lmms-eval, and the project installed with its entry point."""
    folder = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin/python"
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([python, "-c", script], check=True, capture_output=True, text=True).stdout.strip()
    source = tmp_path / "source"
    source.mkdir()
    for name in ("eval", "llava_skip", "llava_skip_base"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    constraints = ["--constraint", ROOT / "constraints.txt"]
    steps = [[*pip, "--no-deps", "lmms-eval>=0.7,<0.8", source], [*pip, *constraints, *NEEDED]]
    for number, step in enumerate(steps):
        if number == 1:  # from here on this environment's packages count as installed
            shared = [place for place in sys.path if place.endswith("site-packages")]
            (Path(own) / "shared.pth").write_text("\n".join(shared))
        done = subprocess.run(step, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"lmms-eval cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    return python


@pytest.mark.slow
def test_a_task_of_lmms_eval_gets_the_answers_of_the_runner(
    environment: Path, saved: Path, tmp_path: Path, encoded_image: Callable[..., str]
) -> None:
    rows = [
        {"index": n, "question": f"Which{'?' * (n + 1)}", "image": encoded_image((60 * n, 9, 0)), "answer": "A"}
        for n in range(5)
    ]
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "utils.py").write_text(UTILS)
    (tasks / "digits.yaml").write_text(TASK.format(data=tasks / "data.jsonl"))
    command = [environment, "-m", "lmms_eval", "--model", "llava_skip", "--model_args", f"pretrained={saved}"]
    command += ["--tasks", "digits", "--include_path", tasks, "--batch_size", "2"]
    command += ["--output_path", tmp_path / "out", "--log_samples"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    variables.pop("PYTHONPATH", None)
    done = subprocess.run([str(word) for word in command], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    (samples,) = (tmp_path / "out").rglob("*samples_digits.jsonl")
    answered = [json.loads(line) for line in samples.read_text().splitlines()]
    from eval.answering.generate import Generator, numerics
    from eval.answering.models import check_model
    from eval.reading.images import ImageSource

    generator = Generator(check_model(saved), numerics())
    expected = [generator.answer([r["question"]], [(ImageSource("", r["image"]),)], 4)[0] for r in rows]
    found = {line["doc_id"]: line["filtered_resps"] for line in answered}
    assert [found[n] for n in range(5)] == expected
    (results,) = (tmp_path / "out").rglob("*results.json")
    assert "digits" in json.loads(results.read_text())["results"]
