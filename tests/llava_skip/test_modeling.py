import ast
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration

from llava_skip import LlavaSkipForConditionalGeneration, SkipConfig, modeling
from tests.support.small_models import IMAGE_TOKEN_ID, Sample, batch_of, mixed_samples, real_tokens, small_model

NOT_FORGETTING = SkipConfig(5, 7, forget_cache=False)


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_dense_equals_transformers_llava(side):
    ours = small_model(skip=None)
    entries = {k: v for k, v in ours.config.to_dict().items() if k not in ("skip", "model_type", "architectures")}
    theirs = LlavaForConditionalGeneration(LlavaConfig(**entries)).eval()
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not missing and not unexpected
    inputs = batch_of(mixed_samples(ours), side)
    real = inputs["attention_mask"].bool()
    assert torch.allclose(ours(**inputs).logits[real], theirs(**inputs).logits[real], atol=1e-5)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    if side == "left":
        assert torch.equal(ours.generate(**inputs, **options), theirs.generate(**inputs, **options))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_a_sample_in_a_mixed_padded_batch_equals_the_sample_alone(side, attention):
    model = small_model()
    model.set_attn_implementation(attention)
    samples = mixed_samples(model)
    inputs = batch_of(samples, side)
    logits = model(**inputs).logits
    for index, sample in enumerate(samples):
        alone = model(**sample.alone()).logits[0]
        assert torch.allclose(real_tokens(logits, inputs, index), alone, atol=1e-5), f"sample {index}"


@pytest.mark.parametrize("skip", [None, SkipConfig(5, 7), NOT_FORGETTING])
def test_generation_in_a_batch_equals_generation_alone(skip):
    model = small_model(skip)
    samples = mixed_samples(model)
    options = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    together = model.generate(**batch_of(samples, "left"), **options)
    for index, sample in enumerate(samples):
        alone = model.generate(**sample.alone(), **options)
        assert torch.equal(together[index, -7:], alone[0, -7:]), f"sample {index}"


def visible(model, input_ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """4-D mask of one full forward [1, 1, T, T]: causal, and tokens after the prompt do not see skipped ones."""
    from llava_skip.routing import skipped_tokens

    length = input_ids.shape[1]
    skipped = skipped_tokens(input_ids == IMAGE_TOKEN_ID, model.config.skip_config)[0]
    seen = torch.ones(length, length).tril().bool()
    seen[prompt:] &= ~skipped
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]


@torch.no_grad()
def test_forgetting_decode_equals_one_forward_that_may_not_see_skipped_tokens():
    model = small_model()
    for sample in mixed_samples(model):
        prompt = len(sample.input_ids)
        generated = model.generate(
            **sample.alone(),
            max_new_tokens=6,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            suppress_tokens=[IMAGE_TOKEN_ID],
        )
        everything = sample.alone() | {"input_ids": generated.sequences, "attention_mask": None}
        everything["attention_mask"] = visible(model, generated.sequences, prompt)
        logits = model(**everything, use_cache=False).logits[0, prompt - 1 : -1]
        assert torch.allclose(torch.cat(generated.logits), logits, atol=1e-5)


@torch.no_grad()
def test_without_forgetting_it_is_the_plain_cached_decode():
    keeping = small_model(NOT_FORGETTING)
    forgetting = small_model()
    sample = mixed_samples(keeping)[1]
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached = keeping.generate(**sample.alone(), **options)
    uncached = keeping.generate(**sample.alone(), **options, use_cache=False)
    assert torch.allclose(torch.cat(cached.logits), torch.cat(uncached.logits), atol=1e-5)
    forgotten = forgetting.generate(**sample.alone(), **options)
    assert torch.equal(forgotten.logits[0], cached.logits[0])  # the first token still sees all tokens
    assert not torch.allclose(forgotten.logits[1], cached.logits[1], atol=1e-3)


@pytest.mark.parametrize("skip", [None, SkipConfig(5, 7)])
def test_beam_search_of_one_beam_is_greedy_and_beams_find_no_worse(skip):
    model = small_model(skip)
    inputs = batch_of(mixed_samples(model), "left")
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    greedy = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, num_beams=1), greedy)
    beams = model.generate(**inputs, **options, num_beams=4, return_dict_in_generate=True, output_scores=True)
    for index, sample in enumerate(mixed_samples(model)):  # images must stay with their sample
        alone = model.generate(**sample.alone(), **options, num_beams=4, return_dict_in_generate=True)
        assert torch.equal(beams.sequences[index, -5:], alone.sequences[0, -5:]), f"sample {index}"


def test_sampling_is_repeatable():
    model = small_model()
    inputs = batch_of(mixed_samples(model), "left")
    options = {"max_new_tokens": 8, "do_sample": True, "temperature": 1.5, "pad_token_id": 0}
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(model.generate(**inputs, **options))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_several_returned_sequences_keep_their_images():
    model = small_model()
    sample = mixed_samples(model)[1]
    options = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    three = model.generate(**sample.alone(), **options, num_return_sequences=3)
    one = model.generate(**sample.alone(), **options)
    assert torch.equal(three[0], one[0])


def test_loss_is_that_of_the_supervised_tokens():
    model = small_model()
    inputs = batch_of(mixed_samples(model), "right")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_TOKEN_ID, -100)
    labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    with torch.no_grad():
        outputs = model(**inputs, labels=labels)
        logits = model(**inputs).logits
        expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        both = model(**inputs, labels=labels, logits_to_keep=0)
        total = model(**inputs, labels=labels, num_items_in_batch=torch.tensor(10)).loss
        in_training = model.train()(**inputs, labels=labels)
    assert in_training.logits is None
    assert torch.allclose(outputs.loss, expected, atol=1e-6)
    assert torch.equal(in_training.loss, outputs.loss)
    assert torch.equal(both.logits, logits) and torch.equal(outputs.logits, logits)
    assert torch.allclose(total * 10, expected * (labels[:, 1:] != -100).sum(), atol=1e-4)


def test_a_batch_without_any_label_has_a_loss_of_zero():
    model = small_model().train()
    inputs = mixed_samples(model)[0].alone()
    loss = model(**inputs, labels=torch.full_like(inputs["input_ids"], -100)).loss
    loss.backward()
    assert loss.item() == 0


def gradients(model, inputs, labels):
    model.zero_grad()
    model(**inputs, labels=labels).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_gives_the_same_gradients():
    model = small_model().train()
    inputs = batch_of(mixed_samples(model), "right")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_TOKEN_ID, -100)
    plain = gradients(model, inputs, labels)
    model.gradient_checkpointing_enable()
    calls = []
    checkpointed_layer = model.model.language_model.layers[1].mlp
    checkpointed_layer.register_forward_hook(lambda *_: calls.append(1))
    again = gradients(model, inputs, labels)
    assert len(calls) == 2  # once forward, once again for backward
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert torch.allclose(gradient, again[name], atol=1e-6), name


def test_text_only_training_reaches_every_parameter_that_images_reach():
    model = small_model().train()
    samples = mixed_samples(model)
    with_images = samples[0].alone()
    text = samples[2].alone()
    reached = gradients(model, with_images, with_images["input_ids"]).keys()
    zeros = gradients(model, text, text["input_ids"])
    assert zeros.keys() == reached
    for name, gradient in zeros.items():
        if "language_model" not in name and "lm_head" not in name:
            assert gradient.abs().max() == 0, name


def test_save_and_load_round_trip(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert isinstance(loaded, LlavaSkipForConditionalGeneration)
    inputs = mixed_samples(model)[1].alone()
    with torch.no_grad():
        # Memory alignment decides the order of sums on a CPU: the last digits may differ.
        assert torch.allclose(model(**inputs).logits, loaded(**inputs).logits, atol=1e-5)


def test_inputs_embeds_stand_in_for_ids():
    model = small_model()
    inputs = mixed_samples(model)[1].alone()
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    with torch.no_grad():
        expected = model(**inputs).logits
        inputs.pop("input_ids")
        assert torch.allclose(model(**inputs, inputs_embeds=embeddings).logits, expected, atol=1e-6)


def test_images_and_image_tokens_must_fit():
    model = small_model()
    inputs = mixed_samples(model)[0].alone()
    with pytest.raises(ValueError, match=r"has 14 image tokens, the images fill 28 \(14 an image\)"):
        model(**inputs | {"pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)})
    inputs.pop("pixel_values")
    with pytest.raises(ValueError, match="has 14 image tokens, the images fill 0"):
        model(**inputs)


def test_wrong_image_size_is_refused():
    model = small_model()
    with pytest.raises(ValueError, match=r"\(20, 20\) pixels, the vision tower takes \(16, 16\)"):
        model.get_image_features(torch.zeros(1, 3, 20, 20))


def test_second_turn_with_a_new_image_on_a_filled_cache():
    model = small_model(NOT_FORGETTING)
    first, second = Sample(model, 1, (3, 5), seed=1), Sample(model, 1, (2, 4), seed=9)
    with torch.no_grad():
        cache = model(**first.alone()).past_key_values
        continued = model(input_ids=second.input_ids[None], pixel_values=second.pixel_values, past_key_values=cache)
        whole = model(
            input_ids=torch.cat([first.input_ids, second.input_ids])[None],
            pixel_values=torch.cat([first.pixel_values, second.pixel_values]),
        )
    assert torch.allclose(continued.logits[0], whole.logits[0, len(first.input_ids) :], atol=1e-5)


@torch.no_grad()
def test_the_skip_entry_is_parsed_once_and_again_only_if_it_changes(monkeypatch):
    parsed = []
    from_dict = SkipConfig.from_dict
    monkeypatch.setattr(SkipConfig, "from_dict", lambda data: parsed.append(data) or from_dict(data))
    model = small_model(SkipConfig(4, 6))  # no other test has these numbers
    sample = Sample(model, 1, (3, 5), seed=1)
    once = model(**sample.alone()).logits
    model.generate(**sample.alone(), max_new_tokens=3, do_sample=False)
    assert len(parsed) == 1
    model.config.skip["ffn_head"] = 2
    again = model(**sample.alone()).logits
    assert len(parsed) == 2 and not torch.allclose(once, again, atol=1e-3)


def test_no_function_of_the_model_is_long():
    tree = ast.parse(Path(modeling.__file__).read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert len(functions) > 10
    assert [f.name for f in functions if f.end_lineno - f.lineno + 1 > 40] == []


def test_gradients_come_in_one_order_with_and_without_images():
    # ZeRO adds gradients up in the order in which they come: ranks of another order would add unlike parameters.
    orders = []
    for num_images in (1, 0):
        model = small_model().train()
        order: list[str] = []
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name, order=order: order.append(name))
        inputs = Sample(model, num_images, (3, 5) if num_images else (6,), seed=1).alone()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        orders.append(order)
    assert orders[0] == orders[1] and len(orders[0]) > 50
