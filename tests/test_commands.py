"""The one command, from a folder that has modules of the same names as the project's."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from llava_skip_base.command import PROGRAMS, main

ROOT = Path(__file__).parents[1]


@pytest.fixture
def elsewhere(tmp_path):
    """A user's folder with `train.py`, `eval/` and `tests/` of its own."""
    (tmp_path / "train.py").write_text("raise RuntimeError('the file of the user')\n")
    for name in ("eval", "tests", "serve", "playground"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the folder of the user')\n")
    return tmp_path


def run(folder: Path, *words: str, path: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(path), "COLUMNS": "200", **variables}
    command = [sys.executable, "-m", "llava_skip", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


def test_the_command_lists_every_program(elsewhere):
    result = run(elsewhere)
    assert result.returncode == 0
    for name, program in PROGRAMS.items():
        assert f"  {name} " in result.stdout and program.summary in result.stdout


def test_every_program_has_a_main():
    assert [name for name, program in PROGRAMS.items() if not callable(import_module(program.module).main)] == []


def test_a_misspelt_program_is_one_message(elsewhere):
    result = run(elsewhere, "validate_dat")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: there is no program 'validate-dat'. Did you mean validate-data?")


@pytest.mark.parametrize("name", ["score", "data"])
def test_help_from_another_folder(elsewhere, name):
    result = run(elsewhere, name, "--help")
    assert result.returncode == 0, result.stderr
    assert f"llava-skip {name}" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_help_of_every_program(elsewhere, name):
    result = run(elsewhere, name, "--help")
    assert result.returncode == 0, result.stderr
    assert "--" in result.stdout and "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "validate-data", "convert", "eval", "conformance"])
def test_an_unknown_option_is_one_message(elsewhere, name):
    result = run(elsewhere, name, "--no-such-option", "1")
    assert result.returncode == 2, result.stderr
    assert "no-such-option" in result.stderr.replace("_", "-") and "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The project as `pip install .` installs it, without its requirements."""
    folder = tmp_path_factory.mktemp("installed")
    source, target = folder / "source", folder / "site"
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in files:
        if name.startswith(("llava_skip", "train", "eval", "serve", "playground", "setup.py", "pyproject", "README")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--target", str(target), str(source)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options], check=True)
    return target


@pytest.mark.slow
def test_the_installed_command_trains_and_evaluates(installed, elsewhere):
    home = {"LLAVA_SKIP_HOME": str(elsewhere / "home"), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def command(*words: str) -> str:
        script = [sys.executable, str(installed / "bin" / "llava-skip"), *words]
        environment = {**os.environ, "PYTHONPATH": str(installed), **home}
        result = subprocess.run(script, capture_output=True, text=True, cwd=elsewhere, env=environment)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
        return result.stdout

    assert "validate-data" in command("--help")
    command("train", "--recipe", "embedded", "--max_steps", "2", "--output_dir", "run")
    assert (elsewhere / "run" / "train_result.json").is_file()
    command("eval", "--model", "run", "--benchmarks", "mmstar", "--limit", "2", "--output", "scores")
    assert (elsewhere / "scores" / "mmstar" / "run" / "results.json").is_file()


def test_ctrl_c_while_the_libraries_are_imported_is_no_traceback(monkeypatch):
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["llava-skip", "chat"])
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.setattr("llava_skip_base.command.import_module", interrupted)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
