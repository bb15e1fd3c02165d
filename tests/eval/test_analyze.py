"""`llava-skip analyze` end to end on tiny files: every layout and front end, one image and several."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from eval.study.analysis.page import Section, write_page, write_tables
from eval.study.analyze import PARTS, run
from llava_skip import LlavaSkipForConditionalGeneration, LlavaSkipProcessor
from llava_skip.checkpoints import export_llava_hf
from llava_skip.reduction import ReductionConfig
from llava_skip_base.console import make_app
from tests.support.small_models import small_config

PICTURES_OF = {"llava": 1, "sv-llava": 4, "sv-llava-hd": 4, "cos": 1, "sv-cos": 4}
"""Architecture -> pictures of an image: as it is, or retained, merged, and two summaries."""


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """A training file whose records have one image, two of different shapes, and none."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, size in enumerate([(16, 16), (40, 16), (20, 33)]):
        generator = torch.Generator().manual_seed(number)
        pixels = torch.randint(0, 255, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    turns = [("human", "What?\n<image>"), ("gpt", "A cat"), ("human", "And?"), ("gpt", "No")]
    rows = [
        {"id": "one", "image": "0.png", "conversations": turns},
        {"id": "two", "image": ["1.png", "2.png"], "conversations": [("human", "<image><image>Which?"), ("gpt", "B")]},
        {"id": "none", "conversations": [("human", "How?"), ("gpt", "So")]},
    ]
    for row in rows:
        row["conversations"] = [{"from": who, "value": text} for who, text in row["conversations"]]
    path = tmp_path / "records.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts take most of the time, and are the same for every model."""
    for part in PARTS.values():
        monkeypatch.setattr(part, "draw", lambda result, folder: [])


def tiny(saved: Path, architecture: str) -> tuple[LlavaSkipForConditionalGeneration, LlavaSkipProcessor]:
    words = AutoTokenizer.from_pretrained(saved)
    config = small_config(architecture=architecture, vocab_size=len(words), eos_token_id=words.eos_token_id)
    config.image_token_index = words.convert_tokens_to_ids("<image>")
    torch.manual_seed(2)
    model = LlavaSkipForConditionalGeneration(config).eval()
    return model, LlavaSkipProcessor.for_config(config, words, "v1")


def native(saved: Path, architecture: str, folder: Path) -> Path:
    for part in tiny(saved, architecture):
        part.save_pretrained(folder)
    return folder


def llava_hf(saved: Path, folder: Path) -> Path:
    model, processor = tiny(saved, "llava")
    export_llava_hf(model, folder, processor)
    return folder


def papers(saved: Path, folder: Path) -> Path:
    """The paper's layout: LLaVA's names and the summary layer, the tower among the weights, no chat template."""
    model, processor = tiny(saved, "sv-llava")
    language, projector = model.model.language_model, model.model.multi_modal_projector
    groups = {
        "model.": language,
        "model.mm_projector.0.": projector.linear_1,
        "model.mm_projector.2.": projector.linear_2,
        "model.vision_tower.vision_tower.vision_model.": model.model.vision_tower,
        "model.ada.0.": model.model.summary.norm,
        "model.ada.1.": model.model.summary.score,
    }
    weights = {f"{at}{name}": t.clone() for at, part in groups.items() for name, t in part.state_dict().items()}
    folder.mkdir()
    save_file(weights | {"lm_head.weight": model.lm_head.weight.data.clone()}, folder / "model.safetensors")
    text = {k: v for k, v in model.config.text_config.to_dict().items() if k not in ("model_type", "architectures")}
    flat = {"model_type": "llava_llama", "mm_vision_tower": "openai/clip", "mm_projector_type": "mlp2x_gelu"}
    (folder / "config.json").write_text(json.dumps({**text, **flat, "mm_vision_select_layer": -2, "use_zip": True}))
    processor.tokenizer.chat_template = None
    processor.tokenizer.save_pretrained(folder)
    return folder


def analyze(*arguments: object) -> tuple[int, str]:
    """Exit code, and what is printed."""
    result = CliRunner().invoke(make_app(run), [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output + (result.stderr or "")


def check_page(folder: Path, pictures: int, parts: tuple[str, ...] = tuple(PARTS)) -> dict:
    """Every file that the page names is there; the result."""
    page = (folder / "index.html").read_text()
    images = re.findall(r'<img src="([^"]+)"', page)
    assert images and all((folder / name).is_file() for name in images)
    assert len([name for name in images if name.startswith("pictures/")]) == pictures
    result = json.loads((folder / "results.json").read_text())
    assert len(result["model"]["sha256"]) == 64 and result["versions"]["torch"] and result["samples"] == 3
    assert set(result["parts"]) == set(parts)
    for name in parts:
        headings, rows = PARTS[name].table(result["parts"][name])
        assert rows and all(len(row) == len(headings) for row in rows)
    tables = (folder / "tables.md").read_text()
    assert all(PARTS[name].TITLE in tables and PARTS[name].TITLE in page for name in parts)
    return result


@pytest.mark.parametrize("architecture", PICTURES_OF)
def test_every_front_end(saved, records, tmp_path, no_charts, architecture):
    model = native(saved, architecture, tmp_path / "model")
    options = ("--data", records, "--images", tmp_path / "images", "--output", tmp_path / "out")
    code, _ = analyze(model, *options, "--parts", "updates,layers,samples")
    result = check_page(tmp_path / "out", 3 * PICTURES_OF[architecture], ("updates", "layers"))
    assert code == 0 and result["model"]["layout"] == "native"
    assert result["parts"]["layers"]["kl_answers"]["frozen"][0]["n"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("architecture", PICTURES_OF)
def test_the_error_of_every_front_end(saved, records, tmp_path, no_charts, architecture):
    model = native(saved, architecture, tmp_path / "model")
    options = ("--data", records, "--images", tmp_path / "images", "--output", tmp_path / "out", "--parts", "error")
    code, _ = analyze(model, *options)
    error = json.loads((tmp_path / "out" / "results.json").read_text())["parts"]["error"]
    assert code == 0 and error["samples"] == 2 and error["violations"] == {"one_layer": 0, "local": 0, "global": 0}
    assert error["skipping"] == ("of the checkpoint" if architecture.startswith("sv-") else "all image tokens")
    assert error["kl_answers"]["n"] and all(row["skipped"]["measured"]["q50"] > 0 for row in error["layers"])


def test_the_llava_hf_layout(saved, records, tmp_path, no_charts):
    folder = llava_hf(saved, tmp_path / "hf")
    options = ("--data", records, "--images", tmp_path / "images", "--output", tmp_path / "out", "--template", "v1")
    code, _ = analyze(folder, *options, "--parts", "updates,samples")
    result = check_page(tmp_path / "out", 3 * PICTURES_OF["llava"], ("updates",))
    assert code == 0 and result["model"]["layout"] == "llava-hf" and result["model"]["skip"] is None


@pytest.mark.parametrize("charts", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_llava_hf_and_the_papers_layout_side_by_side(saved, records, tmp_path, request, charts):
    if not charts:
        request.getfixturevalue("no_charts")
    hf, paper = llava_hf(saved, tmp_path / "hf"), papers(saved, tmp_path / "paper")
    options = ("--data", records, "--images", tmp_path / "images", "--output", tmp_path / "out", "--template", "v1")
    parts = tuple(PARTS) if charts else ("updates", "layers")  # the bounds take long
    code, output = analyze(paper, *options, "--compare", hf, "--parts", ",".join([*parts, "samples"]))
    assert code == 0 and "give the same answer to" in output
    # The preset of the paper's file is scaled to 16 patches: three retained, four skipped.
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.png")]
    assert len(sizes) == 7 * charts and min(sizes, default=10_000) >= 10_000
    result = check_page(tmp_path / "out", 3 * (PICTURES_OF["llava"] + PICTURES_OF["sv-llava"]), parts)
    assert result["model"]["layout"] == "original LLaVA" and result["model"]["preset"] == "sv-llava-100"
    assert [shown["model"] for shown in result["shown"][0]["shown"]] == ["paper", "hf"]
    assert result["agreement"]["questions"] == 3
    error = result["parts"].get("error")
    assert (error is not None) == charts
    if charts:
        assert error["skipping"] == "of the checkpoint" and error["kl_answers"]["n"] and error["left_out"] is None


def test_questions_of_a_benchmark(saved, mmbench_rows, write_tsv, tmp_path):
    data, model = write_tsv(mmbench_rows), native(saved, "sv-llava", tmp_path / "model")
    options = ("--samples", 2, "--parts", "layers", "--output", tmp_path / "out")
    code, output = analyze(model, "--benchmark", "mmbench", "--data", data, *options)
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert code == 0 and result["ids"] == ["mmbench/7", "mmbench/1000007"] and list(result["parts"]) == ["layers"]
    charts = list((tmp_path / "out").glob("*.png"))
    assert len(charts) == 2 and all(chart.stat().st_size > 10_000 for chart in charts)
    assert "ShortV" in output and not result["shown"]
    # What the model itself answers follows the question.
    assert result["parts"]["layers"]["kl_answers"]["ffn"][0]["n"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "figure"], "Unknown: 1 (figure)"),
        (["--parts", ","], "--parts is ','; expected some of updates"),
        (["--samples", "0"], "--samples is 0"),
        (["--images", "."], "--images goes with --data"),
        (["--data", "nowhere.json"], "no such file"),
        (["--compare", "nowhere"], "does not exist"),
        (["--parts", "updates", "--compare", "MODEL"], "add samples to --parts"),
        (["--data", "other.json"], "1 (1) of 2 records"),
    ],
)
def test_mistakes_are_one_message(model_folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    good = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]}
    bad = {"image": "x.png", "conversations": good["conversations"]}
    Path("other.json").write_text(json.dumps([good, bad]))
    code, output = analyze(model_folder, *(str(model_folder) if a == "MODEL" else a for a in arguments))
    assert code == 2 and message in output and "Traceback" not in output


def test_a_rival_between_the_layers_is_refused_and_can_be_compared_with(saved, records, tmp_path, no_charts):
    dense, rival = (native(saved, "llava", tmp_path / name) for name in ("dense", "rival"))
    config = json.loads((rival / "config.json").read_text())
    config["reduction"] = ReductionConfig.parse("fastv:8").to_dict()
    (rival / "config.json").write_text(json.dumps(config))
    options = ("--data", records, "--images", tmp_path / "images", "--output", tmp_path / "out", "--parts", "samples")
    code, output = analyze(rival, *options)
    assert code == 2 and "fastv:8" in output and "between the decoder's layers" in output
    code, output = analyze(dense, *options, "--compare", rival)
    assert code == 0 and "dense and rival give the same answer to" in output


def test_nothing_that_comes_from_files_is_markup(tmp_path):
    hostile = "<script>alert('x')</script> | $x_1$ **b**"
    section = Section("part", hostile, {hostile: hostile}, [f"{hostile}.png"], ([hostile], [[hostile]]), [hostile])
    shown = {"model": hostile, "answer": hostile, "pictures": [{"file": f"{hostile}.png", "caption": hostile}]}
    sample = {"id": hostile, "prompt": hostile, "gold": hostile, "flipped": True, "shown": [shown]}
    write_page(tmp_path, hostile, [(hostile, hostile)], [section], [sample], hostile)
    page = (tmp_path / "index.html").read_text()
    own = page.replace('<script>\naddEventListener("error"', "")
    assert "<script>" not in own and page.count("&lt;script&gt;") >= 10
    own = Section("part", "title", {hostile: hostile}, [], ([hostile], [[hostile]]), [hostile])
    write_tables(tmp_path, hostile, [(hostile, hostile)], [own])
    assert "<script>" not in (tmp_path / "tables.md").read_text()
