"""Finds where the packages of the project use a private name of a dependency."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import sys
import textwrap
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("llava_skip_base", "llava_skip", "train", "eval", "serve", "playground")
DOCUMENTED = {"_abc_impl", "_asdict", "_exit", "_current_frames", "_fields", "_make", "_replace"}
"""Names of the standard library that it documents, or makes itself for each class."""


class Use(NamedTuple):
    """A private name, the module of the project that uses it, and the line (0: an override)."""

    name: str
    module: str
    line: int


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name.strip("_") != "" and name not in DOCUMENTED


def sources(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Name of a module -> its text."""
    root = Path(__file__).parents[2]
    files = (file for package in packages for file in sorted((root / package).rglob("*.py")))
    return {
        ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file.read_text("utf-8")
        for file in files
    }


def uses(texts: dict[str, str]) -> Iterator[Use]:
    """Private attributes and imports that no module of `texts` defines."""
    trees = {module: ast.parse(text) for module, text in texts.items()}
    own = {name for tree in trees.values() for name in _defined(tree)}
    for module, tree in trees.items():
        for node in ast.walk(tree):
            for name in _mentioned(node):
                if is_private(name) and name not in own:
                    yield Use(name, module, getattr(node, "lineno", 0))


def _defined(tree: ast.AST) -> Iterator[str]:
    """Names of functions, classes, variables and of attributes that are assigned to `self` or `cls`."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and _stores_self(node):
            yield node.attr


def _stores_self(node: ast.Attribute) -> bool:
    return isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def _mentioned(node: ast.AST) -> Iterator[str]:
    """Names that a node reads or writes of an object or a module."""
    if isinstance(node, ast.Attribute):
        yield node.attr
    elif isinstance(node, (ast.ImportFrom, ast.Import)):
        for alias in node.names:
            yield from alias.name.split(".")
        yield from (getattr(node, "module", None) or "").split(".")
    elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr", "delattr"):
        if len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
            yield str(node.args[1].value)


def overrides(packages: Iterable[str] = PACKAGES) -> Iterator[Use]:
    """Private names of a dependency's class that a class of the project has, too."""
    for module in _modules(packages):
        for owner in vars(module).values():
            if inspect.isclass(owner) and owner.__module__ == module.__name__:
                yield from (Use(name, module.__name__, 0) for name in overridden(owner))


def overridden(owner: type) -> list[str]:
    """Private names that a class, or its objects, have, and a base class of a third party too."""
    own, bases = [owner], []
    for base in owner.__mro__[1:]:
        (bases if _is_third_party(base.__module__.split(".")[0]) else own).append(base)
    # Not vars(owner): transformers keeps values of its own on classes.
    names = {*_written(owner), *(name for part in own for name in _assigned(part))}
    return sorted(name for name in names if is_private(name) and any(name in vars(base) for base in bases))


def _assigned(owner: type) -> frozenset[str]:
    """Attributes that the methods of a class of the project assign to `self`."""
    if owner.__module__.split(".")[0] not in PACKAGES:
        return frozenset()
    nodes = ast.walk(_tree(owner))
    return frozenset(node.attr for node in nodes if isinstance(node, ast.Attribute) and _stores_self(node))


def _written(owner: type) -> frozenset[str]:
    """Names of the functions and variables in the body of a class."""
    return frozenset(
        name for part in _tree(owner).body for body in getattr(part, "body", []) for name in _defined(body)
    )


@cache
def _tree(owner: type) -> ast.Module:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(owner)))
    except OSError:  # made by a decorator, as a NamedTuple
        return ast.Module([], [])


def _is_third_party(package: str) -> bool:
    return package not in (*PACKAGES, "tests") and package not in sys.stdlib_module_names


def _modules(packages: Iterable[str]) -> Iterator[object]:
    for package in packages:
        for info in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            if not info.name.endswith("__main__"):
                try:
                    yield importlib.import_module(info.name)
                except ImportError as error:  # of an optional package, as lmms_eval
                    if (error.name or "").split(".")[0] in PACKAGES:
                        raise
