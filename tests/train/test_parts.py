import pytest
from transformers import Trainer

from tests.support.small_models import SKIP, small_model
from train.arguments import PARTS, ModelArguments, RunArguments
from train.recipe.lora import add_lora, check_targets
from train.recipe.parts import check_groups, choose_trained, count_parameters, freeze_unused, parameter_groups, part_of


def decays(model):
    return Trainer.get_decay_parameter_names(None, model)


def groups_of(model, rates=None):
    return parameter_groups(model, decays(model), rates or {}, 1e-3, 0.1)


def trainable(model):
    return {part for part, (_, count) in count_parameters(model).items() if count}


@pytest.mark.parametrize("architecture", ["sv-llava", "sv-llava-hd", "sv-cos"])
@pytest.mark.parametrize("parts", [PARTS, ("multi_modal_projector", "summary"), ("language_model",)])
@pytest.mark.parametrize("rates", [{}, {"vision_tower": 2e-6, "multi_modal_projector": 2e-5}])
def test_every_trained_parameter_is_in_exactly_one_group(architecture, parts, rates):
    model = small_model(architecture=architecture)
    choose_trained(model, parts)
    freeze_unused(model, model.config)
    groups = groups_of(model, rates)
    check_groups(model, groups)
    names = {id(p): name for name, p in model.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["lr"] == rates.get(part_of(name), 1e-3)
            assert (group["weight_decay"] == 0) == ("norm" in name or "bias" in name or "ln_" in name), name
    assert trainable(model) == set(parts)


def test_norms_are_optimised(tmp_path):
    model = small_model()
    held = {id(p) for group in groups_of(model) for p in group["params"]}
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    assert norms and all(id(p) in held for p in norms)


def test_a_parameter_in_no_group_or_in_two_is_an_error():
    model = small_model()
    groups = groups_of(model)
    lost = groups[1]["params"].pop()
    name = next(name for name, p in model.named_parameters() if p is lost)
    with pytest.raises(ValueError, match=rf"optimised exactly once.* these are not: 1 \({name} \(in 0 groups\)"):
        check_groups(model, groups)
    groups[0]["params"] += [lost, lost]
    with pytest.raises(ValueError, match=r"in 2 groups"):
        check_groups(model, groups)
    groups[0]["params"].pop()
    lost.requires_grad_(False)
    with pytest.raises(ValueError, match=r"in 1 groups"):
        check_groups(model, groups)


def test_the_base_rate_comes_first_and_the_order_stays_that_of_trainer():
    model = small_model()
    first = groups_of(model, {"vision_tower": 1e-6, "summary": 1.0})[0]
    assert first["lr"] == 1e-3 and first["weight_decay"] == 0.1
    names = decays(model)
    expected = [[p for n, p in model.named_parameters() if (n in names) == decay] for decay in (True, False)]
    for group, parameters in zip(groups_of(model), expected, strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in parameters]


def test_layers_after_the_features_are_frozen():
    model = small_model(SKIP)
    choose_trained(model, PARTS)
    freeze_unused(model, model.config)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen and all("post_layernorm" in name or ".layers.2." in name for name in frozen)


def test_lora_touches_the_language_model_alone():
    model = small_model()
    arguments = ModelArguments(model="m", lora_enable=True, lora_r=2)
    adapted = add_lora(model, arguments)
    check_groups(adapted, groups_of(adapted))
    factors = [name for name, _ in adapted.named_parameters() if ".lora_" in name]
    assert len(factors) == 3 * 7 * 2 and all(part_of(name) == "language_model" for name in factors)
    whole = [name for name, p in adapted.named_parameters() if p.requires_grad and ".lora_" not in name]
    assert {part_of(name) for name in whole} == {"multi_modal_projector", "summary"}
    assert not any("vision_tower" in name for name, p in adapted.named_parameters() if p.requires_grad)


def test_lora_targets_are_data():
    adapted = add_lora(small_model(), ModelArguments(model="m", lora_enable=True, lora_targets=["q_proj", "v_proj"]))
    factors = {name.split(".lora_")[0].rpartition(".")[2] for name, _ in adapted.named_parameters() if ".lora_" in name}
    assert factors == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match=r"\['query'\]; linear layers of the language model are .*q_proj"):
        check_targets(small_model(), ModelArguments(model="m", lora_enable=True, lora_targets=["query"]))


def test_a_tower_is_trained_with_lora_without_its_unused_layers():
    arguments = ModelArguments(model="m", lora_enable=True, train_parts=list(PARTS))
    adapted = add_lora(small_model(), arguments)
    freeze_unused(adapted, adapted.config)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad and part_of(name) == "vision_tower"}
    assert trained and not any("post_layernorm" in name or ".layers.2." in name for name in trained)
    check_groups(adapted, groups_of(adapted))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('{"tower": 1e-5}', r"unknown parts \['tower'\]"),
        ('{"vision_tower": 0}', "must be above 0"),
        ('{"vision_tower": "fast"}', "must be JSON"),
        ("2e-5", "must be JSON"),
        ("[", "must be JSON"),
    ],
)
def test_wrong_rates_are_refused(value, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        RunArguments(output_dir=str(tmp_path), use_cpu=True, learning_rates=value)


def test_rates_are_read(tmp_path):
    run = RunArguments(output_dir=str(tmp_path), use_cpu=True, learning_rates='{"vision_tower": 2e-6}')
    assert run.part_rates == {"vision_tower": 2e-6}
    assert RunArguments(output_dir=str(tmp_path), use_cpu=True).part_rates == {}
