"""`--use_liger_kernel`: what is patched in the language model, and what is refused."""

import importlib
import re
import sys
from types import MethodType, ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import MistralConfig, Qwen2Config, Qwen3Config

from llava_skip_base.errors import UserError
from tests.support.interrupted import write_inputs
from tests.support.runs import train
from tests.support.small_models import SKIP, TEXT_SIZES, batch_of, mixed_samples, small_config, small_model
from train.recipe import liger
from train.recipe.liger import KINDS, check_liger, use_liger

TEXT_CONFIGS = {"mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
NORMS = ("input_layernorm", "post_attention_layernorm")


def model_of(kind, skip=SKIP):
    model = small_model(skip)
    if kind in TEXT_CONFIGS:
        torch.manual_seed(3)
        config = small_config(skip)
        options = {"sliding_window": None} if kind == "mistral" else {}
        config.text_config = TEXT_CONFIGS[kind](**TEXT_SIZES | options, head_dim=8)
        model = type(model)(config)
    return model.train()


def training_batch(model):
    batch = batch_of(mixed_samples(model), side="right")
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == model.config.image_token_id, -100)
    return batch | {"labels": labels.masked_fill(batch["attention_mask"] == 0, -100)}


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class StandIn(ModuleType):
    """The package's interface for a language model, in plain torch; keeps what was asked for and which modules ran."""

    def __init__(self):
        super().__init__("liger_kernel.transformers")
        self.given, self.ran = [], []
        for kind in KINDS:
            setattr(self, f"apply_liger_kernel_to_{kind}", self.apply)

    def apply(self, model, **given):
        self.given.append(given)
        kind = model.config.model_type
        home = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
        for name in [name for name in vars(home) if name.endswith("RMSNorm")]:
            setattr(home, name, nn.LayerNorm)  # as in the package, for models to come
        base = getattr(model, model.base_model_prefix, model)  # as in the package
        modules = {"norm": base.norm}
        for index, layer in enumerate(base.layers):
            modules |= {f"{index}.{name}": getattr(layer, name) for name in (*NORMS, "mlp")}
        for name, module in modules.items():
            module.__dict__["forward"] = MethodType(self.counted(name, type(module).forward), module)

    def counted(self, name, forward):
        def run(module, *args):
            self.ran.append(name)
            return forward(module, *args)

        return run

    def LigerFusedLinearCrossEntropyLoss(self, reduction, accum_dtype):  # noqa: N802 (the package's name)
        assert (reduction, accum_dtype) == ("sum", torch.float32)

        class Loss(nn.Module):
            def forward(_, weight, states, targets):
                self.ran.append("loss")
                return nn.functional.cross_entropy(states @ weight.T, targets, reduction=reduction)

        return Loss()


@pytest.fixture
def stand_in(monkeypatch):
    module = StandIn()
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    return module


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [SKIP, None], ids=["skipping", "dense"])
def test_every_norm_and_ffn_and_the_loss_run_patched(stand_in, kind, skip):
    model = model_of(kind, skip)
    batch = training_batch(model)
    expected = loss_and_gradients(model, batch)
    names = list(model.state_dict())
    run = SimpleNamespace(fp16=False, use_liger_kernel=True)
    use_liger(model, run)
    assert type(model_of(kind, skip).model.language_model.norm) is type(model.model.language_model.norm)
    assert run.use_liger_kernel is False and list(model.state_dict()) == names
    patched = {"rope": True, "rms_norm": True, "swiglu": True}
    assert stand_in.given == [patched | {"cross_entropy": False, "fused_linear_cross_entropy": False}]
    found = loss_and_gradients(model, batch)
    layers = range(model.config.text_config.num_hidden_layers)
    assert stand_in.ran == [*(f"{i}.{name}" for i in layers for name in (*NORMS, "mlp")), "norm", "loss"]
    assert torch.allclose(found[0], expected[0], rtol=1e-6) and found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5)


def test_float16_keeps_the_projects_own_loss(stand_in):
    model = model_of("llama")
    use_liger(model, SimpleNamespace(fp16=True, use_liger_kernel=True))
    model(**training_batch(model))
    assert "loss" not in stand_in.ran and "norm" in stand_in.ran


def run_on(device, on=True):
    return SimpleNamespace(use_liger_kernel=on, device=torch.device(device))


@pytest.mark.parametrize(
    ("device", "package", "kind", "message"),
    [
        ("cpu", True, {}, "is for CUDA and ROCm, and this run is on the cpu: leave it out"),
        ("cuda", False, {}, "needs a package: pip install '.[liger]' in a checkout"),
        ("cuda", True, {"hidden_act": "gelu"}, "for an FFN with silu, and this one has gelu"),
        ("cuda", True, {"model_type": "gemma"}, "of the types llama, mistral, qwen2, qwen3, not gemma"),
    ],
)
def test_what_the_kernels_do_not_fit_is_refused(monkeypatch, device, package, kind, message):
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: name if package else None)
    text = SimpleNamespace(**{"model_type": "llama", "hidden_act": "silu"} | kind)
    config = SimpleNamespace(text_config=text)
    with pytest.raises(UserError, match=re.escape(message)):
        check_liger(run_on(device), config)
    check_liger(run_on(device, on=False), config)


def test_a_run_on_a_cpu_is_refused_before_a_model_loads(tmp_path):
    with pytest.raises(UserError, match="this run is on the cpu: leave it out"):
        train(tmp_path / "run", *write_inputs(tmp_path), "--use_liger_kernel", "true")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def package(monkeypatch):
    """The real one, on a GPU; the names that it changes in transformers' modules come back."""
    if not torch.cuda.is_available():
        pytest.skip("its kernels need a GPU")
    package = pytest.importorskip("liger_kernel.transformers")
    for kind in KINDS:
        modeling = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
        for name in ("apply_rotary_pos_emb", *(n for n in vars(modeling) if n.endswith(("RMSNorm", "MLP")))):
            monkeypatch.setattr(modeling, name, getattr(modeling, name))
    return package


@pytest.mark.parametrize("kind", KINDS)
def test_the_packages_own_kernels_give_the_same_loss_and_gradients(package, kind):
    model = model_of(kind).to("cuda")
    batch = {name: value.to("cuda") for name, value in training_batch(model).items()}
    expected = loss_and_gradients(model, batch)
    use_liger(model, SimpleNamespace(fp16=False, use_liger_kernel=True))
    layer = model.model.language_model.layers[0]
    assert layer.mlp.forward.__func__ is package.LigerSwiGLUMLP.forward
    assert layer.input_layernorm.forward.__func__ is package.LigerRMSNorm.forward
    modeling = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    assert modeling.apply_rotary_pos_emb is package.liger_rotary_pos_emb
    found = loss_and_gradients(model, batch)
    assert torch.allclose(found[0], expected[0], rtol=1e-5)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-4)
