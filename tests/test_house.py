"""Rules of the whole tree: imports go one way, each module can be imported first, functions and files are short."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("llava_skip_base", "llava_skip", "train", "eval", "serve", "playground")
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
MODULES = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in FILES}
OPTIONAL = {
    "eval.lmms_plugin": "lmms_eval",
    "serve.page": "gradio",
    "serve.transformers_app": "fastapi",
    "eval.answering.vllm": "vllm",
    **{f"serve.vllm.{name}": "vllm" for name in ("config", "measure", "model", "processing", "prompts")},
}
"""Modules that need a package which is not installed with the project."""

# A package may import the ones behind it, and those that they may import.
LAYERS = {
    "llava_skip_base": (),
    "llava_skip": ("llava_skip_base",),
    "playground": ("llava_skip", "llava_skip_base"),
    "train": ("playground", "llava_skip", "llava_skip_base"),
    "eval": ("llava_skip", "llava_skip_base"),
    "serve": ("llava_skip", "llava_skip_base"),
}
"""Package -> the packages that it may import."""
ROOMS = {
    "train": ("train.data", "train.resilience", "train.recipe", "train.reporting", "train.planning"),
    "eval": ("eval.reading", "eval.scoring", "eval.benchmarks", "eval.answering", "eval.showing", "eval.study"),
}
"""Package -> its folders; none of them may import a program at the package's door."""


def imports(module: str, top_level: bool = False) -> set[str]:
    """The project's modules that a module imports; with `top_level`, without those inside functions or for types."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    nodes = tree.body if top_level else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if names <= MODULES.keys() else {node.module, *names}
    return {name for name in found if name in MODULES}


def room_of(module: str) -> str:
    """The folder of a module."""
    return module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]


def test_packages_import_one_way():
    wrong = [
        (module, other)
        for module in MODULES
        for other in imports(module)
        if (top := other.split(".")[0]) != (own := module.split(".")[0]) and top not in LAYERS[own]
    ]
    assert wrong == []


def test_no_circle_between_modules():
    graph = {module: imports(module, top_level=True) - {module} for module in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_folders_of_train_and_eval_import_no_program():
    programs = {module for module, file in MODULES.items() if "def main(" in file.read_text(encoding="utf-8")} - {
        "playground.data.build"
    }
    wrong = [
        (module, other)
        for package, rooms in ROOMS.items()
        for module in MODULES
        if any(module.startswith(f"{room}.") for room in rooms)
        for other in imports(module)
        if other in programs and other.startswith(f"{package}.") and room_of(other) == package
    ]
    assert wrong == []


def test_folders_of_train_import_modules_outside_them_for_types_only():
    wrong = [
        (module, other)
        for module in MODULES
        if any(module.startswith(f"{room}.") for room in ROOMS["train"])
        for other in imports(module, top_level=True)
        if room_of(other) == "train"
    ]
    assert wrong == []


def test_folders_of_train_and_eval_have_no_two_way_arrow():
    arrows = {
        (room_of(module), room_of(other))
        for module in MODULES
        if module.startswith(("train", "eval"))
        for other in imports(module, top_level=True)
        if room_of(module) != room_of(other)
    }
    rooms = {room for group in ROOMS.values() for room in group}
    assert [(a, b) for a, b in sorted(arrows) if (b, a) in arrows and a in rooms and b in rooms] == []


_IMPORT_EACH = """
import os, sys, importlib
running = 0
for name in sys.argv[1:]:
    if running == 2:
        os.wait()
        running -= 1
    running += 1
    child = os.fork()
    if not child:
        try:
            importlib.import_module(name)
        except BaseException as error:
            print(f"FAILED {name}: {type(error).__name__}: {error}", flush=True)
            os._exit(1)
        os._exit(0)
for _ in range(running):
    os.wait()
"""


@pytest.mark.slow
def test_every_module_can_be_imported_first():
    """Each in a fresh copy of one process, in which only packages of others are loaded."""
    loaded = "import torch, transformers, peft, datasets, accelerate, matplotlib, scipy.stats, setuptools, typer\n"
    loaded += "import rich.table, tenacity; from transformers import Trainer, LlavaForConditionalGeneration\n"
    names = [name for name in MODULES if name not in OPTIONAL and not name.endswith("__main__")]
    result = subprocess.run(
        [sys.executable, "-c", loaded + _IMPORT_EACH, *names], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert [line for line in result.stdout.splitlines() if line.startswith("FAILED")] == []


def test_training_needs_no_affinity_of_processes():
    """macOS has no `os.sched_getaffinity`."""
    program = "import os; del os.sched_getaffinity; import train.train, train.launch; from train.data import parallel"
    count = f"{program}; print(parallel.default_processes())"
    result = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0 and 1 <= int(result.stdout.split()[-1]) <= 8, result.stderr


def test_functions_and_files_are_short():
    long = [module for module, file in MODULES.items() if len(file.read_text(encoding="utf-8").splitlines()) > 400]
    for module, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno - node.lineno + 1 > 60:
                long.append(f"{module}.{node.name}")
    assert long == []


def test_a_front_end_is_named_nowhere_else():
    """Nothing compares the name of a front end: what differs between them is in their objects."""
    found = []
    for module, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            parts = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            if any(getattr(part, "attr", None) == "front_end" for part in parts):
                found += [f"{module}:{node.lineno}" for part in parts if isinstance(part, ast.Constant)]
    assert found == []
