"""Another folder of goldens, of which nothing is known but its index."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_skip.checkpoints import native_name
from tests.conformance import GoldenFolder, check_golden
from tests.conformance.__main__ import GOLDENS
from tests.conformance.goldens import close_gradient
from tests.conformance.models import _expand, _images, _with_coarse, build_model
from tests.conformance.variants import skip_of

EMBEDDING, BIAS = "grad.model.embed_tokens.weight", "grad.model.ada.1.bias"
WIDTHS = ("window_sizes", "n_query", "seq_feat_levels")


class Folder:
    """An index and its files."""

    def __init__(self, path: Path) -> None:
        self.path, self.index = path, {}

    def add(self, name: str, tensors: dict, **entry) -> None:
        shapes = {
            key: [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")] for key, tensor in tensors.items()
        }
        self.index[name] = entry | {"tensors": shapes}
        save_file(tensors, self.path / f"{name}.safetensors")
        self.write()

    def write(self) -> None:
        (self.path / "index.json").write_text(json.dumps(self.index))

    def check(self, name: str) -> list[str]:
        """What differs in a file."""
        comparisons = check_golden(GoldenFolder(self.path).files[name])
        assert comparisons
        return [comparison.what for comparison in comparisons if not comparison.passed]


def new_gradients(golden) -> dict[str, torch.Tensor]:
    """The gradients of the embedding table and of a bias that has none but for rounding."""
    t, model = golden.tensors, build_model(golden, skip_of(_with_coarse(golden), golden.tensors))
    ids, mask, labels = _expand(model, t["input_ids"], t["attention_mask"], t["labels"])
    model.train()(input_ids=ids, attention_mask=mask, labels=labels, **_images(golden, model)).loss.backward()
    parameters = dict(model.named_parameters())
    table = parameters[native_name(EMBEDDING.removeprefix("grad."))].grad
    assert len(table) == 129 and not table[128].any()
    bias = parameters[native_name(BIAS.removeprefix("grad."))].grad
    assert bias.abs().max() < 1e-7
    return {EMBEDDING: table[:128].clone(), BIAS: bias + 3e-9}


@pytest.fixture(params=["its entry", "the run's entry", "the index"])
def folder(tmp_path, request) -> Folder:
    """A run with a resampler, its weights in a file of their own, and other files of the same sizes."""
    index, second = json.loads((GOLDENS / "index.json").read_text()), Folder(tmp_path)
    sizes = {name: index["cos_resampler"][name] for name in WIDTHS}
    language = load_file(GOLDENS / "llm_weights.safetensors")
    for name, factor in (("words", 1), ("words_too", 2)):
        tensors = {key: tensor * factor for key, tensor in language.items()}
        second.add(name, tensors, config=index["llm_weights"]["config"])
    source = load_file(GOLDENS / "cos_resampler.safetensors")
    weights = {n.removeprefix("weight."): tensor for n, tensor in source.items() if n.startswith("weight.")}
    table = {"cos": sizes}
    in_entry = table if request.param == "its entry" else {}
    for name, factor in (("a_resampler", 2), ("eyes", 1), ("eyes_of_a_run", 2)):
        tensors = {f"model.mm_projector.{key}": tensor * factor for key, tensor in weights.items()}
        second.add(name, tensors, **(table if name != "eyes" else in_entry))
    golden = GoldenFolder(GOLDENS).files["e2e_C"]
    tensors = load_file(GOLDENS / "e2e_C.safetensors") | new_gradients(golden)
    entry = {name: value for name, value in index["e2e_C"].items() if name != "tensors"}
    entry["note_weights"] = "language model = words; vision = eyes"
    second.add("a_run", tensors, **entry, **(table if request.param == "the run's entry" else {}))
    if request.param == "the index":
        second.index["cos"] = sizes
        second.write()
    return second


def test_everything_is_read_from_the_index(folder):
    assert all(folder.check(name) == [] for name in GoldenFolder(folder.path).files)
    assert GoldenFolder(folder.path).unindexed() == []


@pytest.mark.parametrize("folder", ["its entry"], indirect=True)
def test_what_is_wrong_is_seen(folder):
    tensors = load_file(folder.path / "a_run.safetensors")
    wrong = tensors | {EMBEDDING: tensors[EMBEDDING].roll(1, dims=0), BIAS: tensors[BIAS] + 1e-5}
    save_file(wrong, folder.path / "a_run.safetensors")
    assert folder.check("a_run") == [f"gradient of {name.removeprefix('grad.')}" for name in (BIAS, EMBEDDING)]
    save_file(tensors, folder.path / "a_run.safetensors")
    folder.index["a_run"]["note_weights"] = "language model = words; vision = eyes_of_a_run"
    folder.write()
    assert "loss" in folder.check("a_run")
    folder.index["a_run"]["note_weights"] = "language model = words_too; vision = eyes"
    folder.write()
    assert "loss" in folder.check("a_run")
    for entry in folder.index.values():
        entry.pop("cos", None)
    folder.write()
    with pytest.raises(ValueError, match="no table `cos` with the sizes"):
        folder.check("eyes")


def test_small_gradients_are_measured_against_the_whole():
    zero, noise = torch.tensor([1e-9, -2e-9]), torch.tensor([-3e-9, 1e-9])
    assert close_gradient("a bias", noise, zero, whole=0.1).passed
    assert not close_gradient("a bias", noise, zero).passed
    assert not close_gradient("a bias", noise + 1e-6, zero, whole=0.1).passed
    assert not close_gradient("a weight", torch.tensor([1.0, 0.99]), torch.tensor([1.0, 1.0]), whole=1.0).passed
    assert close_gradient("zeros", torch.zeros(2), torch.zeros(2)).passed
    assert not close_gradient("of another shape", torch.zeros(3), torch.zeros(2)).passed
    assert not close_gradient("none", None, torch.zeros(2)).passed
