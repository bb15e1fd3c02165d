"""A saved folder works by itself, without `import llava_skip`, and again after it was saved again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, pipeline

from eval.answering.generate import Generator, Numerics
from eval.answering.models import check_model
from llava_skip import LlavaSkipConfig, LlavaSkipForConditionalGeneration, LlavaSkipProcessor
from llava_skip.checkpoints import export_llava_hf, load_checkpoint
from llava_skip.checkpoints.processor import load_processor
from llava_skip.folder_code import FILE
from llava_skip_base.files import read_json

ROOT = Path(__file__).parents[2]

_FORKED = """
import json, os, sys, traceback
import torch, transformers
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
from transformers import pipeline
import transformers.models.llava.modeling_llava, transformers.models.llama.modeling_llama
import transformers.pipelines.image_text_to_text

torch.set_num_threads(1)
folder, trust = sys.argv[1], {"trust_remote_code": True}

def saved_again(loaded):
    loaded.save_pretrained(f"{folder}-{name}")
    return type(loaded).__module__

def answer():
    chat = [{"role": "user", "content": [{"type": "image", "path": sys.argv[2]}, {"type": "text", "text": "What?"}]}]
    options = {"generate_kwargs": {"max_new_tokens": 3, "do_sample": False}, "return_full_text": False}
    return pipeline("image-text-to-text", model=folder, **trust)(text=chat, **options)[0]["generated_text"]

def not_installed():
    sys.modules["llava_skip"] = None
    AutoConfig.from_pretrained(folder, **trust)

LINES = {
    "AutoConfig": lambda: saved_again(AutoConfig.from_pretrained(folder, **trust)),
    "AutoModel": lambda: saved_again(AutoModel.from_pretrained(folder, **trust)),
    "AutoModelForImageTextToText": lambda: saved_again(AutoModelForImageTextToText.from_pretrained(folder, **trust)),
    "AutoModelForMultimodalLM": lambda: saved_again(AutoModelForMultimodalLM.from_pretrained(folder, **trust)),
    "AutoProcessor": lambda: saved_again(AutoProcessor.from_pretrained(folder, **trust)),
    "pipeline": answer,
    "not trusted": lambda: AutoConfig.from_pretrained(folder),
    "processor not trusted": lambda: type(AutoProcessor.from_pretrained(folder)).__name__,
    "not installed": not_installed,
}
for name, line in LINES.items():
    assert "llava_skip" not in sys.modules
    if not os.fork():  # a fresh copy of a process that has not imported the library
        try:
            told = line()
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
        print("\\n" + json.dumps([name, told, "llava_skip.modeling" in sys.modules]), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, saved):
    """A model's folder with the files that `save_pretrained` wrote, alone in its parent."""
    place = tmp_path_factory.mktemp("own") / "random"
    place.mkdir()
    for file in saved.iterdir():
        (place / file.name).symlink_to(file)
    return place


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    Image.new("RGB", (30, 20), "teal").save(path := tmp_path_factory.mktemp("image") / "one.png")
    return path


@pytest.fixture(scope="module")
def lines(folder, image, tmp_path_factory):
    """What each line gives, and whether it imported the library."""
    modules = {"HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules")), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _FORKED, str(folder), str(image)]
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | modules, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert result.returncode == 0, result.stderr
    told = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('["')]
    return {name: (text, imported) for name, text, imported in told}


@pytest.mark.parametrize(
    ("line", "module"),
    [
        ("AutoConfig", "llava_skip.configuration"),
        ("AutoModel", "llava_skip.modeling"),
        ("AutoModelForImageTextToText", "llava_skip.modeling"),
        ("AutoModelForMultimodalLM", "llava_skip.modeling"),
        ("AutoProcessor", "llava_skip.processing"),
    ],
)
def test_the_classes_are_the_librarys_and_saving_again_keeps_both(lines, folder, line, module):
    assert lines[line] == (module, True)
    again = folder.with_name(f"{folder.name}-{line}")
    config = "processor_config.json" if line == "AutoProcessor" else "config.json"
    assert read_json(again / config)["auto_map"] == read_json(folder / config)["auto_map"]
    assert [file.name for file in again.glob("*.py")] == [FILE]
    assert (again / FILE).read_bytes() == (folder / FILE).read_bytes()


def test_a_pipeline_answers_as_one_with_the_library_does(lines, folder, image):
    content = [{"type": "image", "path": str(image)}, {"type": "text", "text": "What?"}]
    answer = pipeline("image-text-to-text", model=str(folder))
    options = {"generate_kwargs": {"max_new_tokens": 3, "do_sample": False}, "return_full_text": False}
    expected = answer(text=[{"role": "user", "content": content}], **options)[0]["generated_text"]
    assert lines["pipeline"] == (expected, True) and expected


@pytest.mark.parametrize("use_diff", [True, False])
def test_a_configuration_names_its_classes_in_either_form(folder, tmp_path, use_diff):
    config = AutoConfig.from_pretrained(folder)
    config.to_json_file(tmp_path / "config.json", use_diff=use_diff)
    assert read_json(tmp_path / "config.json")["auto_map"] == read_json(folder / "config.json")["auto_map"]
    assert AutoConfig.from_pretrained(tmp_path) == config and (tmp_path / FILE).is_file()


def test_without_trust_nothing_of_the_folder_runs(lines):
    for line in ("not trusted", "processor not trusted"):
        text, imported = lines[line]
        assert "trust_remote_code=True" in text and not imported


def test_without_the_package_the_error_says_what_to_install(lines):
    assert lines["not installed"][0].startswith("ImportError: This folder holds a llava-skip model")
    assert "pip install . in a checkout" in lines["not installed"][0]
    assert "pip install llava" not in lines["not installed"][0]  # no registry has it


def test_with_the_library_a_folder_asks_nothing_and_none_of_its_code_runs(folder, tmp_path, monkeypatch):
    """Also if the code in it is another, as in a folder of somebody else."""
    for file in folder.iterdir():
        if file.name != FILE:
            (tmp_path / file.name).symlink_to(file.resolve())
    (tmp_path / FILE).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit('the code of a folder')\n")
    monkeypatch.setattr("builtins.input", lambda text: pytest.fail(f"asked: {text}"))
    for trust in ({}, {"trust_remote_code": True}):
        assert type(AutoConfig.from_pretrained(tmp_path, **trust)) is LlavaSkipConfig
        assert type(AutoProcessor.from_pretrained(tmp_path, **trust)) is LlavaSkipProcessor
        model = AutoModelForImageTextToText.from_pretrained(tmp_path, **trust)
        assert type(model) is LlavaSkipForConditionalGeneration
    load_checkpoint(tmp_path)
    Generator(check_model(tmp_path), Numerics("cpu", "float32"))
    assert not (tmp_path / "ran").exists()


def test_a_map_to_other_code_is_not_kept(folder, tmp_path):
    raw = read_json(folder / "config.json") | {"auto_map": {"AutoConfig": "theirs--evil.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = AutoConfig.from_pretrained(tmp_path)
    assert "auto_map" not in config.to_dict()
    config.save_pretrained(tmp_path / "again")
    assert read_json(tmp_path / "again/config.json")["auto_map"] == read_json(folder / "config.json")["auto_map"]


def test_a_folder_without_the_module_loads_as_before(folder, tmp_path):
    for file in folder.iterdir():
        if file.suffix != ".json" and file.name != FILE:
            (tmp_path / file.name).symlink_to(file.resolve())
    for file in folder.glob("*.json"):
        raw = read_json(file)
        raw.pop("auto_map", None)
        (tmp_path / file.name).write_text(json.dumps(raw))
    model, before = (AutoModelForImageTextToText.from_pretrained(path) for path in (tmp_path, folder))
    assert model.config == before.config
    assert all(map(torch.equal, model.state_dict().values(), before.state_dict().values()))
    assert load_processor(tmp_path).to_dict() == load_processor(folder).to_dict()


def test_an_export_for_transformers_own_llava_has_no_code(saved_dense, tmp_path):
    model = LlavaSkipForConditionalGeneration.from_pretrained(saved_dense)
    export_llava_hf(model, tmp_path, load_processor(saved_dense))
    assert list(tmp_path.glob("*.py")) == []
    assert [file.name for file in tmp_path.glob("*.json") if "auto_map" in file.read_text()] == []
