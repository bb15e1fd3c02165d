"""Default folders, in a checkout, with LLAVA_SKIP_HOME, and of an installed copy; from any current folder."""

import importlib.util
import shutil
from pathlib import Path

import pytest

from llava_skip_base import paths

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.delenv(paths.HOME_VARIABLE, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def installed(tmp_path):
    """The module in a package that was copied to a folder without setup.py."""
    file = tmp_path / "site-packages" / "llava_skip" / "paths.py"
    file.parent.mkdir(parents=True)
    (tmp_path / "site-packages" / "playground").mkdir()
    shutil.copy(paths.__file__, file)
    spec = importlib.util.spec_from_file_location("installed_paths", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_in_a_checkout():
    assert paths.checkout() == paths.home() == ROOT
    assert paths.embedded_data() == ROOT / "playground" / "data" / "digits"
    assert paths.embedded_tokenizer() == paths.embedded_data() / "tokenizer"
    assert paths.embedded_benchmarks() == paths.embedded_data() / "eval"
    assert (paths.checkpoints(), paths.results()) == (ROOT / "checkpoints", ROOT / "results")


@pytest.mark.parametrize("name", ["~/home", "home", "/absolute/home"])
def test_another_home(installed, monkeypatch, tmp_path, elsewhere, name):
    home = {"~/home": tmp_path / "user" / "home", "home": elsewhere / "home"}.get(name, Path(name))
    monkeypatch.setenv(paths.HOME_VARIABLE, name)
    for module in (paths, installed):
        assert module.home() == home
        assert module.embedded_data() == home / "playground" / "data" / "digits"
        assert (module.checkpoints(), module.results()) == (home / "checkpoints", home / "results")


def test_an_installed_copy(installed, monkeypatch, tmp_path, elsewhere):
    assert installed.checkout() is None and installed.home() == elsewhere
    assert (installed.checkpoints(), installed.results()) == (elsewhere / "checkpoints", elsewhere / "results")
    assert installed.embedded_data() == tmp_path / "user" / ".cache" / "llava-skip" / "digits"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert installed.embedded_data() == tmp_path / "cache" / "llava-skip" / "digits"


def test_paths_are_shown_from_the_current_folder(elsewhere, tmp_path):
    assert paths.shown(elsewhere / "a" / "b") == paths.shown(Path("a/b")) == "a/b"
    assert paths.shown(tmp_path) == str(tmp_path)
