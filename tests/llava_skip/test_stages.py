"""Rivals inside the decoder: each against the same written by hand, in a batch, in generation and in training."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, Qwen3Config

from llava_skip.flops import prefill_flops
from llava_skip.reduction import ReductionConfig, get_reduction
from llava_skip.reduction.cache import StagedCache
from llava_skip.reduction.running import cuts_of
from llava_skip_base.errors import UserError
from tests.support import by_hand
from tests.support.small_models import (
    IMAGE_TOKEN_ID,
    TEXT_SIZES,
    Sample,
    batch_of,
    images_of,
    mixed_samples,
    real_tokens,
    small_model,
)

# Text form -> the same by hand, of (model, embeddings, ids, length of the prompt).
METHODS = {
    "fastv:8": lambda m, x, ids, prompt: by_hand.fastv(m, x, ids, [prompt - 1], 1, 4),
    "fastv:kept=3,first_layer=2": lambda m, x, ids, prompt: by_hand.fastv(m, x, ids, [prompt - 1], 2, 3),
    "pyramiddrop": lambda m, x, ids, prompt: by_hand.pyramiddrop(m, x, ids, [prompt - 1], {1: 8, 2: 4}),
    "sparsevlm:9": lambda m, x, ids, prompt: by_hand.sparsevlm(m, x, ids, prompt, {0: 6, 1: 3}, False),
    "sparsevlm:kept=5+2,plus=1": lambda m, x, ids, prompt: by_hand.sparsevlm(m, x, ids, prompt, {0: 5, 1: 2}, True),
    "shortv:layers=0+2": lambda m, x, ids, prompt: by_hand.shortv(m, x, ids, (0, 2)),
}
DROPPING = [text for text in METHODS if not text.startswith("shortv")]
LOGITS = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "output_logits": True}
LOGITS |= {"return_dict_in_generate": True, "suppress_tokens": [IMAGE_TOKEN_ID]}
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
EACH = pytest.mark.parametrize("text", METHODS)


def reduced(text: str, **fields):
    model = small_model(**({"architecture": "llava"} | fields))
    model.set_reduction(ReductionConfig.parse(text))
    return model


@torch.no_grad()
def hand(model, text: str, sample: Sample, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Logits [T, V] by hand, NaN where a token is dropped; `ids` may go on after the prompt."""
    ids = sample.input_ids if ids is None else ids
    return METHODS[text](model, by_hand.embeddings_of(model, sample, ids), ids, len(sample.input_ids))


@EACH
@pytest.mark.parametrize("index", [0, 1, 3])
@torch.no_grad()
def test_it_is_what_its_description_says(text, index):
    model = reduced(text)
    sample = mixed_samples(model)[index]
    expected = hand(model, text, sample)
    logits, left = model(**sample.alone()).logits[0], ~expected.isnan().any(dim=1)
    torch.testing.assert_close(logits[left], expected[left], **CLOSE)
    assert not logits[~left].any() and bool(left.all()) == text.startswith("shortv")


@EACH
@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_a_sample_in_a_mixed_padded_batch_equals_the_sample_alone(text, side):
    model = reduced(text)
    samples = mixed_samples(model)
    alone = [model(**sample.alone()).logits[0] for sample in samples]
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        batch = batch_of(samples, side)
        together = model(**batch).logits
        for index in range(len(samples)):
            torch.testing.assert_close(real_tokens(together, batch, index), alone[index], **CLOSE)


@pytest.mark.parametrize("architecture", ["llava-hd", "cos"])
@pytest.mark.parametrize("text", ["fastv:6", "pyramiddrop", "sparsevlm:7", "shortv:1"])
@torch.no_grad()
def test_other_front_ends(text, architecture):
    model = reduced(text, architecture=architecture)
    samples = mixed_samples(model)
    batch = batch_of(samples, "left")
    outputs = model(**batch)
    torch.testing.assert_close(real_tokens(outputs.logits, batch, 1), model(**samples[1].alone()).logits[0], **CLOSE)
    if not text.startswith("shortv"):  # the share is that of every image, whatever its number of tokens
        images, cuts = int((samples[1].input_ids == IMAGE_TOKEN_ID).sum()), cuts_of(model.config)
        left = int((outputs.logits[1, batch["input_ids"][1] == IMAGE_TOKEN_ID] != 0).any(dim=1).sum())
        assert left == min(cuts[-1].count(images), images)


@torch.no_grad()
def test_norms_of_queries_and_keys_are_those_of_the_layer():
    text = Qwen3Config(**TEXT_SIZES, head_dim=12)
    for name in METHODS:
        model = small_model(architecture="llava")
        config = copy.deepcopy(model.config)
        config.text_config = text
        torch.manual_seed(3)
        model = type(model)(config).eval()
        model.set_reduction(ReductionConfig.parse(name))
        sample = mixed_samples(model)[3]
        expected = hand(model, name, sample)
        left = ~expected.isnan().any(dim=1)
        torch.testing.assert_close(model(**sample.alone()).logits[0][left], expected[left], **CLOSE)


@pytest.mark.parametrize(
    "text", ["fastv:16", "fastv:kept=16", "pyramiddrop:16", "sparsevlm:16", "pyramiddrop:shares=1+1"]
)
@torch.no_grad()
def test_keeping_everything_equals_the_dense_model_to_the_bit(text):
    model = small_model(architecture="llava")
    inputs = batch_of(mixed_samples(model), "left")
    dense = model(**inputs)
    model.set_reduction(ReductionConfig.parse(text))
    assert torch.equal(model(**inputs).logits, dense.logits) and cuts_of(model.config) == ()
    assert type(model(**inputs).past_key_values) is type(dense.past_key_values)


@EACH
@torch.no_grad()
def test_a_batch_without_images_is_the_dense_model_to_the_bit(text):
    model = small_model(architecture="llava")
    samples = [Sample(model, 0, (6,), seed=3), Sample(model, 0, (4,), seed=4)]
    inputs = batch_of(samples, "left")
    dense = model.generate(**inputs, **LOGITS)
    model.set_reduction(ReductionConfig.parse(text))
    ours = model.generate(**inputs, **LOGITS)
    assert torch.equal(torch.stack(ours.logits), torch.stack(dense.logits))


@EACH
@torch.no_grad()
def test_decoding_goes_on_from_what_the_prompt_has_kept(text):
    model = reduced(text)
    samples = mixed_samples(model)
    inputs = batch_of(samples, "left")
    cached = model.generate(**inputs, **LOGITS)
    logits = torch.stack(cached.logits, dim=1)
    again = torch.stack(model.generate(**inputs, **LOGITS, use_cache=False).logits, dim=1)
    torch.testing.assert_close(logits, again, **CLOSE)
    for index in (0, 1, 3):  # positions behind the cuts, too: by hand they are numbered as described
        ids = torch.cat([samples[index].input_ids, cached.sequences[index, -5:]])
        expected = hand(model, text, samples[index], ids)[len(samples[index].input_ids) - 1 : -1]
        torch.testing.assert_close(logits[index], expected, **CLOSE)


@EACH
def test_beams_keep_their_own_tokens(text):
    model = reduced(text)
    samples, options = (
        mixed_samples(model),
        {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "pad_token_id": 0},
    )
    together = model.generate(**batch_of(samples, "left"), **options)
    for index in (0, 3):
        alone = model.generate(**samples[index].alone(), **options, num_return_sequences=2)
        assert torch.equal(together[index, -4:], alone[0, -4:])


@EACH
@torch.no_grad()
def test_each_layer_stores_what_the_formula_says(text):
    model = reduced(text)
    samples = mixed_samples(model)
    reduction, words = model.config.reduction_config, 8
    rows = reduction.rule.layer_rows(reduction, model.config, 1)
    cache = model(**samples[0].alone()).past_key_values
    assert isinstance(cache, StagedCache) == (text in DROPPING)
    assert [layer.keys.shape[-2] for layer in cache.layers] == [row.cache + words for row in rows]
    assert cache.get_seq_length() == len(samples[0].input_ids)
    batch = batch_of(samples, "left")
    cache = model(**batch).past_key_values
    if text in DROPPING and "sparsevlm:9" not in text:  # merged tokens do not add up over images
        for layer, row in enumerate(rows):
            cut = max((start for start in cache.stored if start <= layer), default=None)
            mask = batch["attention_mask"].bool() if cut is None else cache.stored[cut].mask
            counts = [row.cache + 8, 2 * row.cache + 11, 6, 2 * row.cache + 7]
            assert mask.sum(dim=1).tolist() == counts, layer
            assert cache.layers[layer].keys.shape[-2] == mask.shape[1]


@EACH
@torch.no_grad()
def test_counted_flops_equal_the_formula(text):
    model = reduced(text)
    model.set_attn_implementation("eager")  # torch does not count its fused kernel for CPUs
    sample = mixed_samples(model)[0]
    inputs = sample.alone()
    encoded = model.get_image_features(inputs.pop("pixel_values"))
    reduction, config = model.config.reduction_config, model.config
    with FlopCounterMode(display=False) as counter:
        model(**inputs, mm_encoder_outputs={"image": encoded}, use_cache=False, logits_to_keep=1)
    asking = 1
    if text.startswith("sparsevlm"):
        embeddings = by_hand.embeddings_of(model, sample, sample.input_ids)
        asking = len(by_hand.raters_of(embeddings, sample.input_ids, len(sample.input_ids)))
    layers = reduction.rule.layer_rows(reduction, config, 1)
    expected = prefill_flops(config.text_config, layers, 8)
    expected += reduction.rule.extra_flops(reduction, config, 1, 8, behind=5, asking=asking)
    assert counter.get_total_flops() == expected


# --- training


def labels_of(inputs: dict, supervised: dict[int, list[int]]) -> torch.Tensor:
    """Labels [B, T], -100 but for the columns that are supervised of each sample."""
    labels = torch.full_like(inputs["input_ids"], -100)
    for sample, columns in supervised.items():
        labels[sample, columns] = inputs["input_ids"][sample, columns]
    return labels


@EACH
def test_a_training_step_reaches_what_the_dense_model_reaches(text):
    model = small_model(architecture="llava").train()
    inputs = batch_of(mixed_samples(model), "right")
    labels = inputs["input_ids"].masked_fill((inputs["input_ids"] >= 80) | (inputs["attention_mask"] == 0), -100)
    reached = []
    for reduction in (None, ReductionConfig.parse(text)):
        model.set_reduction(reduction)
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        reached.append({name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()})
    assert reached[0] == reached[1]
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.gradient_checkpointing_enable()
    model.zero_grad()
    model(**inputs, labels=labels).loss.backward()
    for name, gradient in plain.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-5, rtol=1e-4)


@EACH
def test_a_text_only_step_calls_the_same_modules_in_the_same_order(text):
    # ZeRO gathers a module's parameters when it is called, on all ranks at once.
    orders = []
    for num_images in (1, 0):
        model, called = reduced(text).train(), []
        for name, module in model.model.language_model.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(lambda *_, name=name, called=called: called.append(name))
        inputs = Sample(model, num_images, (3, 5) if num_images else (6,), seed=1).alone()
        loss = model(**inputs, labels=labels_of(inputs, {0: [-2, -1]})).loss
        loss.backward()
        orders.append(called)
    assert orders[0] == orders[1] and len(orders[0]) >= 21


@torch.no_grad()
def test_in_training_the_tokens_before_the_answers_ask():
    sample = mixed_samples(small_model(architecture="llava"))[0]  # 3 words, an image, 5 words
    ids = sample.input_ids
    supervised = [len(ids) - 4, len(ids) - 3, len(ids) - 1]  # two answers: of two tokens and of one
    asking = [len(ids) - 5, len(ids) - 2]
    expected = {
        "fastv:8": lambda m, x: by_hand.fastv(m, x, ids, asking[:1], 1, 4),
        "pyramiddrop": lambda m, x: by_hand.pyramiddrop(m, x, ids, asking, {1: 8, 2: 4}),
        "sparsevlm:kept=5+2,plus=1": lambda m, x: by_hand.sparsevlm(m, x, ids, asking[0] + 1, {0: 5, 1: 2}, True),
    }
    for text, by_description in expected.items():
        model = reduced(text)
        logits = by_description(model, by_hand.embeddings_of(model, sample, ids))
        inputs = sample.alone()
        loss = model(**inputs, labels=labels_of(inputs, {0: supervised})).loss
        targets = torch.nn.functional.cross_entropy(logits[[n - 1 for n in supervised]], ids[supervised])
        torch.testing.assert_close(loss, targets, **CLOSE)
        shifted = torch.nn.functional.pad(labels_of(inputs, {0: supervised})[:, 1:], (0, 1), value=-100)
        assert torch.equal(model(**inputs, shift_labels=shifted).loss, loss)


@pytest.mark.parametrize("text", DROPPING)
@torch.no_grad()
def test_the_last_image_token_gives_the_first_word_of_a_caption(text):
    model = reduced(text)
    sample = mixed_samples(model)[0]
    inputs, begin = sample.alone(), len(sample.input_ids) - 5
    supervised = labels_of(inputs, {0: list(range(begin, begin + 5))})
    logits = model(**inputs, labels=supervised).logits[0]
    is_image, is_left = sample.input_ids == IMAGE_TOKEN_ID, logits.any(dim=1)
    assert is_left[begin - 1] and (is_image & is_left).sum() < is_image.sum()
    prompt = inputs | {name: inputs[name][:, :begin] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(model(**prompt).logits[0, -1], logits[begin - 1], **CLOSE)


@torch.no_grad()
def test_pyramiddrop_drops_nothing_of_a_sample_without_an_answer():
    model = reduced("pyramiddrop")
    inputs = batch_of(mixed_samples(model), "right")
    logits = model(**inputs, labels=labels_of(inputs, {0: [20, 21]})).logits
    is_image, is_left = inputs["input_ids"] == IMAGE_TOKEN_ID, (logits != 0).any(dim=2)
    assert (is_image & is_left).sum(dim=1).tolist() == [4, 32, 0, 32]
    assert not model(**inputs, labels=labels_of(inputs, {})).loss


# --- caches and turns


@pytest.mark.parametrize("text", DROPPING)
def test_an_assistant_proposes_tokens(text):
    model = reduced(text)
    inputs = mixed_samples(model)[1].alone()
    expected = model.generate(**inputs, **LOGITS)
    proposed = model.generate(**inputs, **LOGITS, assistant_model=copy.deepcopy(model))
    assert torch.equal(proposed.sequences, expected.sequences)
    torch.testing.assert_close(torch.cat(proposed.logits), torch.cat(expected.logits), **CLOSE)


@pytest.mark.parametrize("text", DROPPING)
@torch.no_grad()
def test_tokens_behind_the_prompt_can_be_taken_back_and_no_others(text):
    model = reduced(text)
    inputs = batch_of(mixed_samples(model), "left")
    cache = model(**inputs).past_key_values
    more = torch.tensor([[5, 6, 7]] * 4)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], dim=1)
    once = model(input_ids=more, attention_mask=mask, past_key_values=cache).logits
    cache.crop(-3)
    assert torch.equal(model(input_ids=more, attention_mask=mask, past_key_values=cache).logits, once)
    with pytest.raises(UserError, match="The last 20 tokens cannot be taken back: only the last 5 came after"):
        cache.crop(-20)
    with pytest.raises(ValueError, match="as 0 or less; got 3"):
        cache.crop(3)
    cache.reset()
    assert cache.get_seq_length() == 0 and torch.equal(
        model(**inputs, past_key_values=cache).logits, model(**inputs).logits
    )


@pytest.mark.parametrize("text", DROPPING)
@torch.no_grad()
def test_a_second_turn_with_a_new_image_in_a_batch_equals_the_turn_alone(text):
    model = reduced(text)
    firsts, seconds = mixed_samples(model)[:2], [Sample(model, 1, (2, 4), seed=9), Sample(model, 0, (3,), seed=8)]
    batch, turn = batch_of(firsts, "left"), batch_of(seconds, "left")
    turn["attention_mask"] = torch.cat([batch["attention_mask"], turn["attention_mask"]], dim=1)
    positions = (turn["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    length = batch["input_ids"].shape[1]
    cache = model(**batch, position_ids=positions[:, :length]).past_key_values
    together = model(**turn, past_key_values=cache, position_ids=positions[:, length:]).logits[:, -1]
    for index, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
        cache = model(**first.alone()).past_key_values
        alone = model(input_ids=second.input_ids[None], **images_of([second]), past_key_values=cache).logits[0, -1]
        torch.testing.assert_close(together[index], alone, **CLOSE)


def test_what_cannot_be_done_is_refused_by_name():
    model = reduced("fastv:8")
    inputs = mixed_samples(model)[0].alone()
    length = inputs["input_ids"].shape[1]
    with pytest.raises(UserError, match="a DynamicCache has one length: leave"):
        model(**inputs, past_key_values=DynamicCache(config=model.config.text_config))
    with pytest.raises(UserError, match="a StaticCache has one length"):
        model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(UserError, match="give a 2-D attention_mask"):
        model(**inputs | {"attention_mask": torch.zeros(1, 1, length, length)})
    starts = torch.cat([torch.arange(9), torch.arange(length - 9)])[None]
    inputs.pop("attention_mask")
    with pytest.raises(UserError, match="several samples in one sequence"):
        model(**inputs, position_ids=starts, use_cache=False)
    with pytest.raises(UserError, match="a prompt cannot come in chunks: leave prefill_chunk_size"):
        model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=4)


@pytest.mark.parametrize(
    "text, message",
    [
        ("fastv", "give the mean, as fastv:128, or the number"),
        ("fastv:8,kept=4", "give the mean, as fastv:128, or the number"),
        ("fastv:5", "the 1 layers before the cut alone have a mean of 5.3 tokens; give at least 6"),
        ("fastv:17", "an image has 16 tokens: give at most 16"),
        ("fastv:kept=17", "kept is 17, an image has 16 tokens"),
        ("fastv:8,first_layer=3", "first_layer is 3, the language model has 3 layers"),
        ("pyramiddrop:8,shares=.5+.25+.125", "the shares follow from TOKENS"),
        ("pyramiddrop:shares=.25+.5+.125", "so they cannot rise"),
        ("pyramiddrop:shares=.5", "2 layers need as many shares"),
        (
            "pyramiddrop:5",
            "the layers before the first cut alone have more tokens than a mean of 5 allows; give at least 6",
        ),
        ("pyramiddrop:8,layers=1+3", "layers must rise and be from 1 to 2"),
        ("sparsevlm", "give the mean, as sparsevlm:192, or numbers"),
        ("sparsevlm:kept=4", "2 layers need as many numbers in kept"),
        ("sparsevlm:8,layers=2", "layers must rise and be from 0 to 1"),
        ("shortv", "give a number of layers, as shortv:8, or"),
        ("shortv:4", "the language model has 3 layers, 0 to 2"),
        ("shortv:layers=3", "the language model has 3 layers, 0 to 2"),
        ("shortv:layers=1+1", "a layer is named twice"),
        ("shortv:2,order=1", "order needs a number of layers, at most its own length"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(text, message):
    model = small_model(architecture="llava")
    with pytest.raises(UserError, match=message):
        model.set_reduction(ReductionConfig.parse(text))


def test_a_sliding_window_is_refused():
    with pytest.raises(UserError, match="attends in a sliding window of 8 tokens, which would count"):
        config = small_model(architecture="llava").config
        text = Qwen3Config(**TEXT_SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=0)
        type(config).from_dict(
            config.to_dict() | {"text_config": text.to_dict(), "reduction": {"method": "fastv", "tokens": 8}}
        )


# --- the published schedules, at 32 layers and 576 tokens


def left_at(text: str) -> list[int]:
    """What an image keeps behind each cut."""
    reduction = ReductionConfig.parse(text)
    return [(cut.layer, cut.kept) for cut in reduction.rule.cuts(reduction, 32, 576)]


def test_the_schedules_are_the_published_ones():
    assert [left_at(f"fastv:{mean}") for mean in (192, 128, 64)] == [[(2, 166)], [(2, 98)], [(2, 30)]]
    assert [left_at(f"fastv:{mean},first_layer=3") for mean in (192, 128, 64)] == [[(3, 152)], [(3, 82)], [(3, 11)]]
    assert left_at("pyramiddrop") == [(8, 288), (16, 144), (24, 72)] == left_at("pyramiddrop:270")
    for mean, ratio in ((192, 0.56), (128, 0.42), (64, 0.19)):
        layers, kept = zip(*left_at(f"pyramiddrop:{mean}"), strict=True)
        assert layers == (2, 8, 16) and kept[0] / 576 == pytest.approx(ratio, abs=0.01)
        assert kept[2] == pytest.approx(576 * (kept[0] / 576) ** 3, abs=2)
        used = (2 * 576 + 6 * kept[0] + 8 * kept[1] + 16 * kept[2]) / 32
        assert mean - 1 < used <= mean
    assert left_at("sparsevlm:192") == [(3, 300), (7, 200), (16, 110)]
    assert left_at("sparsevlm:64,plus=1") == [(3, 66), (7, 34), (16, 20)]
    config = small_model(architecture="llava").config  # 3 layers, 16 tokens
    assert [get_reduction("shortv").tokens_for(budget, config) for budget in (1, 5, 10, 16)] == [3, 2, 1, 1]
    reduction = ReductionConfig.parse("shortv:3")
    assert reduction.rule.frozen(reduction, 32) == (31, 30, 29)
    reduction = ReductionConfig.parse("shortv:2,order=5+3+1")
    assert reduction.rule.frozen(reduction, 32) == (5, 3)
