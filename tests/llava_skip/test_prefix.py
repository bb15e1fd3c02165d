"""Vectors before a prompt, as prompt tuning puts them there, do not move its images."""

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import DynamicCache, LlavaForConditionalGeneration

from llava_skip import SkipConfig
from llava_skip.checkpoints import export_llava_hf
from llava_skip.routing import skipped_tokens
from tests.support.small_models import IMAGE_TOKEN_ID, SKIP, batch_of, images_of, mixed_samples, small_model

NUM_PREFIX = 4
LOGITS = {
    "max_new_tokens": 5,
    "do_sample": False,
    "pad_token_id": 0,
    "suppress_tokens": [IMAGE_TOKEN_ID],
    "output_logits": True,
    "return_dict_in_generate": True,
}
VIRTUAL = {
    "task_type": "CAUSAL_LM",
    "num_virtual_tokens": NUM_PREFIX,
    "num_layers": 3,
    "token_dim": 32,
    "num_attention_heads": 4,
    "num_transformer_submodules": 1,
}
models = pytest.mark.parametrize(
    "skip", [None, SKIP, SkipConfig(5, 7, text_sees_skipped=False)], ids=["dense", "skipping", "hidden from text"]
)


@torch.no_grad()
def plain_logits(model, prefix: torch.Tensor, sample, sequence: torch.Tensor) -> torch.Tensor:
    """Logits [new tokens, V] of one forward over prefix, prompt and the generated tokens of `sequence`."""
    length, skip = NUM_PREFIX + len(sequence), model.config.skip_config
    embeddings = torch.cat([prefix, model.get_input_embeddings()(sequence)])[None]
    prompt = NUM_PREFIX + len(sample.input_ids)
    mask = torch.ones(length, length).tril().bool()
    if skip is not None:
        is_image = torch.cat([torch.zeros(NUM_PREFIX, dtype=torch.bool), sequence == IMAGE_TOKEN_ID])
        skipped = skipped_tokens(is_image[None], skip)[0]
        unseen = torch.arange(length) >= prompt if skip.text_sees_skipped else ~is_image
        mask &= ~(unseen[:, None] & skipped[None, :])  # one image: its own tokens see all of it
    mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)[None, None]
    configured = model.config.skip
    model.config.skip = None if skip is None else SKIP.to_dict()  # the mask above says all that text may see
    outputs = model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False, **images_of([sample]))
    model.config.skip = configured
    return outputs.logits[0, prompt - 1 : -1]


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@models
@pytest.mark.parametrize("with_ids", [False, True], ids=["embeddings", "embeddings and ids"])
@pytest.mark.parametrize("way", [{}, {"cache_implementation": "static"}, {"past_key_values": DynamicCache}], ids=str)
def test_embeddings_with_a_prefix(skip, with_ids, way):
    model = small_model(skip)
    sample, prefix = mixed_samples(model)[0], torch.randn(NUM_PREFIX, 32)
    embeddings = torch.cat([prefix, model.get_input_embeddings()(sample.input_ids)])[None]
    ids = {"input_ids": sample.input_ids[None]} if with_ids else {}
    way = {name: value() if callable(value) else value for name, value in way.items()}
    outputs = model.generate(inputs_embeds=embeddings, **ids, **images_of([sample]), **LOGITS, **way)
    sequence = torch.cat([sample.input_ids, outputs.sequences[0, -5:]])
    assert_near(torch.cat(outputs.logits), plain_logits(model, prefix, sample, sequence))


@models
@pytest.mark.parametrize(
    "way",
    [
        {},
        {"use_cache": False},
        {"past_key_values": DynamicCache},
        {"prefill_chunk_size": 5},
        {"prefill_chunk_size": 11, "past_key_values": DynamicCache},
    ],
    ids=str,
)
def test_prompt_tuning(skip, way):
    model = small_model(skip)
    sample = mixed_samples(model)[0]
    tuned = get_peft_model(model, PromptTuningConfig(**VIRTUAL)).eval()
    way = {name: value() if callable(value) else value for name, value in way.items()}
    outputs = tuned.generate(**sample.alone(), **LOGITS, **way)
    expected = plain_logits(model, tuned.get_prompt(1)[0], sample, outputs.sequences[0])
    assert_near(torch.cat(outputs.logits), expected)


@models
def test_prompt_tuning_of_beams_in_a_batch(skip):
    model = small_model(skip)
    tuned = get_peft_model(model, PromptTuningConfig(**VIRTUAL)).eval()
    samples = mixed_samples(model)[1], mixed_samples(model)[3]
    together = tuned.generate(**batch_of(samples, "left"), **LOGITS, num_beams=2).sequences[:, -5:]
    # peft takes no positions, so padding moves a shorter sample: only the longest one equals itself alone.
    longest = max(range(2), key=lambda index: len(samples[index].input_ids))
    alone = tuned.generate(**samples[longest].alone(), **LOGITS, num_beams=2).sequences[:, -5:]
    assert torch.equal(together[longest], alone[0])


@models
def test_a_prefix_in_the_cache(skip):
    model = small_model(skip)
    sample = mixed_samples(model)[0]
    tuned = get_peft_model(model, PrefixTuningConfig(**VIRTUAL)).eval()
    outputs = tuned.generate(**sample.alone(), **LOGITS)
    with torch.no_grad():
        expected = tuned(**sample.alone()).logits[0, -1]
    assert_near(outputs.logits[0][0], expected)


@pytest.mark.parametrize("way", [{}, {"prefill_chunk_size": 7}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_a_dense_model_is_tuned_as_stock_llava(tmp_path, kind, way):
    model = small_model(None)
    export_llava_hf(model, tmp_path)
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    torch.manual_seed(4)
    tuned, theirs = (get_peft_model(one.eval(), kind(**VIRTUAL)).eval() for one in (model, stock))
    theirs.load_state_dict(
        {name: value for name, value in tuned.state_dict().items() if "prompt_encoder" in name}, strict=False
    )
    assert torch.equal(tuned.get_prompt_embedding_to_save("default"), theirs.get_prompt_embedding_to_save("default"))
    for sample in mixed_samples(model):
        ours = tuned.generate(**sample.alone(), **LOGITS, **way)
        theirs_way = {} if "prefill_chunk_size" in way else way  # theirs cannot with images
        expected = theirs.generate(**sample.alone(), **LOGITS, **theirs_way)
        assert torch.equal(ours.sequences, expected.sequences)
        assert_near(torch.stack(ours.logits), torch.stack(expected.logits))


@models
@pytest.mark.parametrize("way", [{"prefill_chunk_size": 6}, {"past_key_values": None, "use_cache": True}], ids=str)
def test_a_prefix_in_the_cache_with_options(skip, way):
    model = small_model(skip)
    sample = mixed_samples(model)[1]
    tuned = get_peft_model(model, PrefixTuningConfig(**VIRTUAL)).eval()
    outputs, expected = (tuned.generate(**sample.alone(), **LOGITS, **options) for options in (way, {}))
    assert torch.equal(outputs.sequences, expected.sequences)
    assert_near(torch.cat(outputs.logits), torch.cat(expected.logits))


@torch.no_grad()
def test_what_does_not_fit_the_tokens_of_a_forward_is_refused():
    model = small_model()
    sample = mixed_samples(model)[0].alone()
    is_image = sample["input_ids"] == IMAGE_TOKEN_ID
    with pytest.raises(ValueError, match="prompt_images and the tokens of this forward differ in 2 positions"):
        model(**sample, prompt_images=is_image.roll(1, dims=1))
    with pytest.raises(ValueError, match=r"prompt_images has 23 columns, and this forward sees only 22 tokens"):
        model(**sample, prompt_images=torch.nn.functional.pad(is_image, (1, 0)))
    with pytest.raises(ValueError, match="attention_mask has 22 columns for a prompt of 23 tokens"):
        model.generate(sample["input_ids"].repeat(1, 2)[:, :23], attention_mask=sample["attention_mask"])
