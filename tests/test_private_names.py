"""Private names of dependencies: each is listed with its reason, still exists, and is in use."""

import importlib
import importlib.util
import inspect
import warnings

import pytest
from torch import nn

from llava_skip.private_names import PRIVATE_NAMES, PrivateName
from tests.support.private_uses import PACKAGES, Use, is_private, overridden, overrides, sources, uses


def problem(entry: PrivateName) -> str | None:
    """Why the entry does not describe its dependency, or None."""
    path, rest = entry.name.split("."), []
    while path:
        try:
            owner = importlib.import_module(".".join(path))
            break
        except ModuleNotFoundError:
            rest.insert(0, path.pop())
    else:
        return "no such module"
    for name in rest[:-1]:
        owner = getattr(owner, name, None)
    if not hasattr(owner, rest[-1]):
        assigned = inspect.isclass(owner) and f"self.{rest[-1]}" in inspect.getsource(owner)
        return None if assigned and not entry.parameters else "no such name"
    if entry.parameters:
        known = inspect.signature(getattr(owner, rest[-1])).parameters
        if missing := [name for name in entry.parameters if name not in known]:
            return f"no parameter {', '.join(missing)}"
    return None


def is_installed(entry: PrivateName) -> bool:
    found = importlib.util.find_spec(entry.name.split(".")[0])
    return found is not None and found.origin is not None  # a folder of this name is no package


@pytest.mark.parametrize("entry", PRIVATE_NAMES, ids=lambda entry: entry.name)
def test_a_listed_name_exists_with_its_parameters_and_a_reason(entry):
    if entry.used_in == "serve.transformers_app":
        for package in ("fastapi", "openai", "uvicorn"):  # without them transformers' modules cannot be imported
            pytest.importorskip(package, reason="needs the extra [serve]")
    if not is_installed(entry):
        pytest.skip(f"{entry.name.split('.')[0]} has an environment of its own (make test-vllm)")
    assert problem(entry) is None
    assert len(entry.reason.split()) > 4


@pytest.mark.parametrize(
    ("name", "parameters", "expected"),
    [
        ("torch.nn.Module._apply", ("fn",), None),
        ("torch.nn.Module._apply", ("fun",), "no parameter fun"),
        ("torch.nn.Module._no_such_name", (), "no such name"),
        ("torch.nn.Module._parameters", (), None),  # assigned to an instance
        ("no_such_package.Thing._name", (), "no such module"),
    ],
)
def test_a_name_that_a_release_took_away_is_found(name, parameters, expected):
    assert problem(PrivateName(name, used_in="", reason="", parameters=parameters)) == expected


def listed(entries=PRIVATE_NAMES) -> set[tuple[str, str]]:
    """The private part of each name, and the module that uses it."""
    return {(next(filter(is_private, entry.name.split("."))), entry.used_in) for entry in entries}


def found() -> set[tuple[str, str]]:
    return {(use.name, use.module) for use in (*uses(sources()), *overrides())}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_other_private_name_is_used_or_overridden(package):
    assert sorted(use for use in found() - listed() if use[1].split(".")[0] == package) == []


def test_every_listed_name_is_used_where_the_list_says():
    assert sorted(listed(filter(is_installed, PRIVATE_NAMES)) - found()) == []


def test_uses_are_found_and_own_names_are_not():
    text = """
from package import _hidden
import package._inner
class Own(Base):
    def _mine(self):
        self._state = other._mine
        self.__dict__, named._asdict(), _
        return self._of_base + model._attribute + getattr(model, "_by_text") + super()._method()
"""
    names = {"_hidden", "_inner", "_of_base", "_attribute", "_by_text", "_method"}
    assert {use.name for use in uses({"module": text})} == names
    assert Use("_attribute", "module", 8) in uses({"module": text})


def test_overrides_are_found():
    class Own(nn.Module):
        def _apply(self, fn):
            return self

        def _mine(self):
            return self

    assert overridden(Own) == ["_apply"]


@pytest.mark.parametrize("module", ["llava_skip", "train.run", "eval.scoring.judge", "tests.test_private_names"])
@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
def test_a_deprecated_call_of_the_project_is_an_error(module, category):
    with pytest.raises(category):
        warnings.warn_explicit("old", category, "file.py", 1, module=module)
    warnings.warn_explicit("old", category, "file.py", 1, module="another.train")
