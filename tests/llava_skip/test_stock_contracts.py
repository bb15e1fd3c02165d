"""What transformers' own tests ask of a model, held against stock LLaVA: arguments, outputs, attributes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration, LlavaModel

from llava_skip import LlavaSkipForConditionalGeneration, LlavaSkipModel
from tests.support.small_models import ARCHITECTURES, IMAGE_TOKEN_ID, batch_of, images_of, mixed_samples, small_model
from tests.support.stock import stock_twin

ROOT = Path(__file__).parents[2]
FEATURES = ["last_hidden_state", "pooler_output", "hidden_states", "attentions"]
every_architecture = pytest.mark.parametrize("model", ARCHITECTURES, indirect=True)


@pytest.fixture
def model(request):
    return small_model(architecture=request.param)


@pytest.fixture
def dense():
    return small_model(architecture="llava")


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def labels_of(inputs: dict) -> torch.Tensor:
    unsupervised = (inputs["input_ids"] >= IMAGE_TOKEN_ID) | (inputs["attention_mask"] == 0)
    return inputs["input_ids"].masked_fill(unsupervised, -100)


# --- the classes


CLASSES = [(LlavaSkipForConditionalGeneration, LlavaForConditionalGeneration), (LlavaSkipModel, LlavaModel)]


@pytest.mark.parametrize(("ours", "stock"), CLASSES)
def test_the_class_has_what_the_stock_class_has(ours, stock):
    different = {"config_class", "_no_split_modules"}  # ours has more modules
    for name in dir(stock):
        if name.startswith("__"):
            continue
        value = getattr(stock, name)
        assert hasattr(ours, name), name
        if not callable(value) and not isinstance(value, property) and name not in different:
            assert getattr(ours, name) == value, name


def test_each_tensor_is_cut_as_in_the_stock_model(dense):
    assert dense.tp_plan == stock_twin(dense).tp_plan != {}


@pytest.mark.slow
def test_two_processes_that_share_a_model_give_its_logits(tmp_path):
    models = {name: small_model(architecture=name) for name in ARCHITECTURES if name != "cos"}
    for name, model in models.items():
        model.save_pretrained(tmp_path / "models" / name)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = ["-m", "tests.support.tensor_parallel", str(tmp_path / "models"), str(tmp_path / "results.pt")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command, *arguments], cwd=ROOT, env=environment, check=True, timeout=300)
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    assert results.keys() == models.keys()
    for name, model in models.items():
        inputs = batch_of(mixed_samples(model), "left")
        assert results[name]["shape"] == (16, 32)  # half of the heads
        with torch.no_grad():
            assert_near(results[name]["logits"], (stock_twin(model) if name == "llava" else model)(**inputs).logits)
        expected = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert torch.equal(results[name]["tokens"], expected)


@torch.no_grad()
def test_the_mask_of_the_images_is_that_of_the_stock_model(dense):
    twin, inputs = stock_twin(dense), batch_of(mixed_samples(dense), "left")
    features = torch.cat(list(dense.get_image_features(**images_of(mixed_samples(dense))).pooler_output))[None]
    embeddings = dense.get_input_embeddings()(inputs["input_ids"])
    for ids in (inputs["input_ids"], None):
        masks = [one.model.get_placeholder_mask(ids, embeddings, features) for one in (dense, twin)]
        assert torch.equal(*masks) and masks[0].any()
        with pytest.raises(ValueError, match="image tokens"):
            dense.model.get_placeholder_mask(ids, embeddings, features[:, 1:])


# --- arguments


@every_architecture
@pytest.mark.parametrize("name", ["image_sizes", "pixel_value", "interpolate_pos_encoding"])
def test_arguments_that_nothing_reads_are_refused_by_name(model, name):
    inputs, arguments = mixed_samples(model)[0].alone(), {name: torch.tensor([[16, 16]])}
    for call in (model, model.model, model.generate):
        with pytest.raises(ValueError, match=name):
            call(**inputs, **arguments)
    with pytest.raises(ValueError, match=name):
        model.get_image_features(**images_of(mixed_samples(model)[:1]), **arguments)


@torch.no_grad()
def test_arguments_that_say_nothing_new_are_taken(dense):
    inputs = mixed_samples(dense)[0].alone()
    expected = dense(**inputs).logits
    zeros = torch.zeros_like(inputs["input_ids"])
    assert torch.equal(dense(**inputs, token_type_ids=zeros, unknown=None).logits, expected)
    assert torch.equal(dense(**inputs, vision_feature_layer=-2).logits, expected)


@torch.no_grad()
def test_another_layer_of_the_tower_is_honoured(dense):
    twin, inputs = stock_twin(dense), mixed_samples(dense)[1].alone()
    images = images_of(mixed_samples(dense)[1:2])
    layer = {"vision_feature_layer": -1}
    assert_near(dense(**inputs, **layer).logits, twin(**inputs, **layer).logits)
    assert not torch.allclose(dense(**inputs).logits, twin(**inputs, **layer).logits, atol=1e-3)
    features = torch.stack(twin.get_image_features(**images, **layer).pooler_output)
    assert_near(dense.get_image_features(**images, **layer).pooler_output, features)
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    logits = (torch.cat(one.generate(**inputs, **layer, **options).logits) for one in (dense, twin))
    assert_near(*logits)


@torch.no_grad()
def test_another_selection_is_honoured_where_it_fits(dense):
    images = images_of(mixed_samples(dense)[1:2])
    full = {"vision_feature_select_strategy": "full"}
    expected = torch.stack(stock_twin(dense).get_image_features(**images, **full).pooler_output)
    assert expected.shape[1] == 17
    assert_near(dense.get_image_features(**images, **full).pooler_output, expected)
    skipping = small_model(architecture="sv-llava")
    with pytest.raises(ValueError, match="set vision_feature_select_strategy to 'default'"):
        skipping.get_image_features(**images, **full)
    with pytest.raises(ValueError, match="vision_feature_layer must be one number"):
        dense.get_image_features(**images, vision_feature_layer=[-1, -2])


@pytest.mark.parametrize("model", ["sv-llava", "sv-llava-hd"], indirect=True)
@torch.no_grad()
def test_a_skipping_model_ranks_by_the_layer_that_is_asked_for(model):
    inputs = mixed_samples(model)[1].alone()
    asked = model(**inputs, vision_feature_layer=-1).logits
    assert not torch.allclose(asked, model(**inputs).logits, atol=1e-3)
    model.config.vision_feature_layer = -1
    assert torch.equal(asked, model(**inputs).logits)


@torch.no_grad()
def test_a_front_end_with_its_own_layers_refuses_another():
    model = small_model(architecture="cos")
    with pytest.raises(ValueError, match="'cos' has its own choice of layers: leave out vision_feature_layer"):
        model(**mixed_samples(model)[0].alone(), vision_feature_layer=-1)


# --- outputs


@every_architecture
@torch.no_grad()
def test_image_features_have_what_the_tower_gives(model):
    model.set_attn_implementation("eager")
    images = images_of(mixed_samples(model)[1:2])
    outputs = model.get_image_features(**images, output_hidden_states=True, output_attentions=True)
    assert list(outputs) == FEATURES
    expected = model.model.vision_tower.outputs(images["pixel_values"], output_hidden_states=True)
    assert torch.equal(outputs.last_hidden_state, expected.last_hidden_state)
    assert len(outputs.hidden_states) == 4 and len(outputs.attentions) == 3
    assert list(model.get_image_features(**images)) == FEATURES[:2]
    assert isinstance(model.get_image_features(**images, return_dict=False), tuple)
    if model.config.front_end == "llava" and model.config.skip is None:
        stock = stock_twin(model)
        stock.set_attn_implementation("eager")
        theirs = stock.get_image_features(**images, output_hidden_states=True, output_attentions=True)
        assert_near(outputs.last_hidden_state, theirs.last_hidden_state)
        assert_near(torch.stack(list(outputs.pooler_output)), torch.stack(list(theirs.pooler_output)))
        for name in FEATURES[2:]:
            assert_near(torch.stack(outputs[name]), torch.stack(theirs[name]))


@every_architecture
def test_a_forward_does_not_run_the_layers_after_the_features(model):
    last, runs = model.model.vision_tower.encoder.layers[-1], []
    last.register_forward_hook(lambda *_: runs.append(1))
    inputs = mixed_samples(model)[0].alone()
    model(**inputs)
    model.generate(**inputs, max_new_tokens=2, do_sample=False, num_beams=2, pad_token_id=0)
    assert not runs
    model.get_image_features(**images_of(mixed_samples(model)[:1]))
    assert runs


@every_architecture
def test_shifted_labels_are_the_labels_of_the_next_token(model):
    inputs = batch_of(mixed_samples(model), "right")
    labels = labels_of(inputs)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    expected = model(**inputs, labels=labels)
    for given in ({"shift_labels": shifted}, {"shift_labels": shifted, "labels": labels.roll(2, dims=1)}):
        outputs = model(**inputs, **given)
        torch.testing.assert_close(outputs.loss, expected.loss)
        assert torch.equal(outputs.logits, expected.logits)
    total = model(**inputs, shift_labels=shifted, num_items_in_batch=torch.tensor(7)).loss
    torch.testing.assert_close(total * 7, expected.loss * (shifted != -100).sum())


def test_losses_are_those_of_the_stock_model(dense):
    inputs, twin = batch_of(mixed_samples(dense), "right"), stock_twin(dense)
    labels = labels_of(inputs)
    for given in (
        {"labels": labels},
        {"labels": labels, "num_items_in_batch": torch.tensor(7)},
        {"labels": labels, "shift_labels": torch.nn.functional.pad(labels[:, 2:], (0, 2), value=-100)},
    ):
        torch.testing.assert_close(dense(**inputs, **given).loss, twin(**inputs, **given).loss)


# --- embeddings that hold the images already


@every_architecture
@torch.no_grad()
def test_embeddings_with_the_images_in_them_are_routed_by_the_ids(model):
    samples = [mixed_samples(model)[index] for index in (0, 1, 2)]
    inputs = batch_of(samples, "left")
    is_image = inputs["input_ids"] == IMAGE_TOKEN_ID
    blocks = torch.cat(list(model.get_image_features(**images_of(samples)).pooler_output))
    merged = model.get_input_embeddings()(inputs["input_ids"]).masked_scatter(is_image[..., None], blocks)
    given = {"inputs_embeds": merged, "attention_mask": inputs["attention_mask"]}
    assert_near(model(**given, prompt_images=is_image).logits, model(**inputs).logits)
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    options |= {"pad_token_id": 0}
    expected = torch.cat(model.generate(**inputs, **options).logits)
    for way in ({}, {"cache_implementation": "static"}):
        outputs = model.generate(input_ids=inputs["input_ids"], **given, **options, **way)
        assert_near(torch.cat(outputs.logits), expected)


@torch.no_grad()
def test_ids_and_embeddings_must_agree_on_the_images():
    model = small_model()
    inputs = mixed_samples(model)[0].alone()
    embeddings = model.get_input_embeddings()(inputs["input_ids"].roll(1, dims=1))
    with pytest.raises(ValueError, match="image tokens of input_ids and inputs_embeds differ in 2 positions"):
        model.generate(**inputs, inputs_embeds=embeddings, max_new_tokens=1)


# --- turns


@every_architecture
@torch.no_grad()
def test_a_second_turn_needs_the_whole_mask(model):
    sample = mixed_samples(model)[0]
    cache = model(**sample.alone(), use_cache=True).past_key_values
    seen, more = len(sample.input_ids), torch.tensor([[5, 6, 7]])
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"the whole mask"):
            call(input_ids=more, attention_mask=torch.ones_like(more), past_key_values=cache)
    with pytest.raises(ValueError, match=rf"has 3 columns for {seen} tokens in the cache and 3 new ones"):
        model(input_ids=more, attention_mask=torch.ones_like(more), past_key_values=cache)
    whole = torch.ones(1, seen + 3, dtype=torch.long)
    one = model(input_ids=more, attention_mask=whole, past_key_values=cache).logits
    cache.crop(-3)
    assert_near(model(input_ids=more, past_key_values=cache).logits, one)


@torch.no_grad()
def test_a_part_of_an_image_needs_the_whole_prompt():
    model = small_model()
    sample = mixed_samples(model)[0]
    rows = model.get_image_features(sample.pixel_values)
    cache = model(**sample.alone()).past_key_values
    cache.crop(-8)  # the image's last three tokens too
    rows.pooler_output = rows.pooler_output[:, -3:]
    given = {"input_ids": sample.input_ids[None, -8:], "mm_encoder_outputs": {"image": rows}, "past_key_values": cache}
    with pytest.raises(ValueError, match="a part of an image, whose block is 14 tokens"):
        model(**given)
    model(**given, prompt_images=sample.input_ids[None] == IMAGE_TOKEN_ID)
