"""What users of transformers expect of any model: adapters, speculative decoding, compilation, every attention."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText, BitsAndBytesConfig, LlamaForCausalLM
from transformers.generation import CompileConfig

from llava_skip import LlavaSkipForConditionalGeneration, LlavaSkipModel, SkipConfig
from llava_skip.counts import count_batch
from tests.support.small_models import (
    ARCHITECTURES,
    IMAGE_TOKEN_ID,
    batch_of,
    images_of,
    mixed_samples,
    small_config,
    small_model,
)

OPTIONS = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
LOGITS = {**OPTIONS, "suppress_tokens": [IMAGE_TOKEN_ID], "output_logits": True, "return_dict_in_generate": True}
SKIPPING = [name for name in ARCHITECTURES if name.startswith("sv-")]
LAYERS = [f"model.language_model.layers.{index}" for index in range(3)]
IMAGE_PATH = ["model.vision_tower", "model.multi_modal_projector", "model.summary"]

every_architecture = pytest.mark.parametrize("model", ARCHITECTURES, indirect=True)


@pytest.fixture(params=SKIPPING)
def model(request):
    return small_model(architecture=request.param)


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_lora_on_the_language_model_alone(model):
    inputs = mixed_samples(model)[0].alone()
    before = model.generate(**inputs, **OPTIONS)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj|up_proj)"))
    adapted.train()
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= IMAGE_TOKEN_ID, -100)
    adapted(**inputs, labels=labels).loss.backward()
    trainable = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 3 * 3 and all("language_model" in name for name in trainable)
    assert all(gradient.any() for name, gradient in trainable.items() if "lora_B" in name)
    assert torch.equal(adapted.eval().generate(**inputs, **OPTIONS), before)  # B starts at zero


def test_a_text_assistant_and_prompt_lookup_give_the_same_text(model):
    inputs = mixed_samples(model)[0].alone()
    expected = model.generate(**inputs, **OPTIONS)
    torch.manual_seed(0)
    assistant = LlamaForCausalLM(model.config.text_config).eval()
    assert torch.equal(model.generate(**inputs, **OPTIONS, assistant_model=assistant), expected)
    # The prompt has many image tokens, which lookup proposes as if they were text.
    assert torch.equal(model.generate(**inputs, **OPTIONS, prompt_lookup_num_tokens=3), expected)


def test_an_image_that_is_missing_after_a_prompt_is_an_error(model):
    sample = mixed_samples(model)[0]
    cache = model(**sample.alone(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="the images fill 0"):
        model(input_ids=sample.input_ids[None], past_key_values=cache)


def test_the_vocabulary_can_grow(model):
    inputs = mixed_samples(model)[0].alone()
    before = model(**inputs).logits
    model.resize_token_embeddings(128)
    after = model(**inputs).logits
    assert after.shape[-1] == model.config.text_config.vocab_size == 128
    torch.testing.assert_close(after[..., :100], before)


@torch.no_grad()
@pytest.mark.slow
def test_flex_attention_agrees_with_sdpa(model):
    batch = batch_of(mixed_samples(model), "right")
    real = batch["attention_mask"].bool()
    expected = model(**batch).logits[real]
    model.set_attn_implementation("flex_attention")
    torch.testing.assert_close(model(**batch).logits[real], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_hidden_states_and_attentions_of_every_layer(model):
    model.set_attn_implementation("eager")
    inputs = mixed_samples(model)[0].alone()
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    layers, length = model.config.text_config.num_hidden_layers, inputs["input_ids"].shape[1]
    assert len(outputs.hidden_states) == layers + 1 and len(outputs.attentions) == layers
    assert outputs.attentions[0].shape[-2:] == (length, length)


@pytest.mark.slow
def test_compiled_decoding_gives_the_same_text():
    model = small_model(architecture="sv-llava")
    inputs = mixed_samples(model)[0].alone()
    expected = model.generate(**inputs, **OPTIONS)
    model.forward = torch.compile(model.forward)
    assert torch.equal(model.generate(**inputs, **OPTIONS), expected)


def test_a_static_cache_compiles_the_decode_step_as_one_graph(model):
    inputs = batch_of(mixed_samples(model), "left")
    expected = torch.stack(model.generate(**inputs, **LOGITS).logits)
    compiled = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compiled._compile_all_devices = True  # transformers compiles for accelerators alone, otherwise
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    outputs = model.generate(**inputs, **LOGITS, cache_implementation="static", compile_config=compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert_near(torch.stack(outputs.logits), expected)


@pytest.mark.slow
def test_compiled_training_gives_the_same_gradients(model):
    inputs = batch_of(mixed_samples(model), "right")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= IMAGE_TOKEN_ID, -100)
    model.train()(**inputs, labels=labels).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    counts = count_batch(model.config, inputs | {"labels": labels})
    torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs, labels=labels, counts=counts).loss.backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            assert_near(parameter.grad, expected[name])


@every_architecture
@torch.no_grad()
def test_outputs_are_tuples_where_asked_for(model):
    inputs = mixed_samples(model)[0].alone()
    outputs = model(**inputs)
    assert torch.equal(model(**inputs, return_dict=False)[0], outputs.logits)
    assert torch.equal(model.model(**inputs, return_dict=False)[0], model.model(**inputs).last_hidden_state)
    images = images_of(mixed_samples(model)[:1])
    blocks = model.get_image_features(**images).pooler_output
    assert torch.equal(model.get_image_features(**images, return_dict=False)[1], blocks)
    model.config.return_dict = False
    assert torch.equal(model(**inputs)[0], outputs.logits)


@every_architecture
@torch.no_grad()
def test_loaded_weights_in_fresh_memory_compute_the_same_bits(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    for parameter in loaded.parameters():  # they lie in the file as mapped, on any boundary, and products sum otherwise
        parameter.data = parameter.data.clone()
    inputs = mixed_samples(model)[1].alone()
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@every_architecture
def test_weights_load_with_and_without_a_head(model, tmp_path):
    model.save_pretrained(tmp_path / "head")
    base = AutoModel.from_pretrained(tmp_path / "head")
    assert type(base) is LlavaSkipModel
    base.save_pretrained(tmp_path / "base")
    whole, report = LlavaSkipForConditionalGeneration.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert set(report["missing_keys"]) == {"lm_head.weight"}
    for name, weight in model.model.state_dict().items():
        assert torch.equal(weight, base.state_dict()[name]) and torch.equal(weight, whole.model.state_dict()[name])


@pytest.mark.parametrize(
    "skip", [SkipConfig(6, 5, summary_start="learned"), SkipConfig(6, 5)], ids=["learned", "pooled"]
)
def test_weights_that_a_checkpoint_lacks_are_drawn(skip, tmp_path):
    dense = small_model(architecture="cos")
    dense.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = {name: tensor for name, tensor in load_file(file).items() if not name.endswith(".query")}
    save_file(weights, file, metadata={"format": "pt"})
    config = copy.deepcopy(dense.config)
    config.skip = skip.to_dict()
    loaded = LlavaSkipForConditionalGeneration.from_pretrained(tmp_path, config=config)
    fresh = {name: p for name, p in loaded.named_parameters() if name not in weights}
    assert {name.rsplit(".", 1)[-1] for name in fresh} >= {"query"}
    drawn = [p for name, p in fresh.items() if name.endswith((".query", ".vectors", "score.weight"))]
    assert len(drawn) == 3 and all(0.01 < parameter.std() < 0.4 for parameter in drawn)


@pytest.mark.parametrize("tied", [True, False])
@every_architecture
@torch.no_grad()
def test_heads_stay_tied_or_untied_through_growing_saving_and_loading(model, tied, tmp_path):
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    model = LlavaSkipForConditionalGeneration(config).eval()
    inputs = mixed_samples(model)[1].alone()
    before = model(**inputs).logits
    model.resize_token_embeddings(120)
    model.save_pretrained(tmp_path)
    loaded = LlavaSkipForConditionalGeneration.from_pretrained(tmp_path).eval()
    for one in (model, loaded):
        assert (one.lm_head.weight is one.get_input_embeddings().weight) == tied
        assert one.config.text_config.vocab_size == one.lm_head.out_features == 120
        assert_near(one(**inputs).logits[..., :100], before)


@every_architecture
def test_gradients_of_hidden_states_and_attentions(model):
    model.set_attn_implementation("eager")
    outputs = model(**mixed_samples(model)[0].alone(), output_hidden_states=True, output_attentions=True)
    kept = [*outputs.hidden_states[:-1], *outputs.attentions]
    for tensor in kept:
        tensor.retain_grad()
    outputs.logits[0, -1, 0].backward()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in kept)


@every_architecture
def test_generation_from_embeddings(model):
    inputs = mixed_samples(model)[1].alone()
    expected = model.generate(**inputs, **LOGITS)
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    for options in ({}, {"cache_implementation": "static"}):
        outputs = model.generate(**inputs, **LOGITS, **options)
        assert torch.equal(outputs.sequences, expected.sequences[:, -6:])
        assert_near(torch.cat(outputs.logits), torch.cat(expected.logits))


@pytest.mark.parametrize("again", [False, True], ids=["ids alone", "images given again"])
@every_architecture
def test_generation_goes_on_after_a_cache(model, again):
    inputs = mixed_samples(model)[3].alone()
    expected = model.generate(**inputs, **LOGITS)
    start = model.generate(**inputs, **LOGITS | {"max_new_tokens": 2})
    more = {"input_ids": start.sequences, "past_key_values": copy.deepcopy(start.past_key_values)}
    images = images_of([mixed_samples(model)[3]]) if again else {}
    rest = model.generate(**more, **images, **LOGITS | {"max_new_tokens": 4})
    assert torch.equal(rest.sequences, expected.sequences)
    assert_near(torch.cat(rest.logits), torch.cat(expected.logits[2:]))


@every_architecture
@torch.no_grad()
def test_positions_make_up_for_padding(model):
    sample = mixed_samples(model)[0]
    batch = batch_of([sample, mixed_samples(model)[1]], "left")
    positions = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    padded = model(**batch, position_ids=positions).logits[0, -1]
    assert_near(padded, model(**sample.alone()).logits[0, -1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@every_architecture
def test_half_precision_is_loaded_generated_with_and_near_full(model, dtype, tmp_path):
    inputs = mixed_samples(model)[0].alone()
    expected = torch.stack(model.generate(**inputs, **LOGITS).logits)
    model.save_pretrained(tmp_path)
    half = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=dtype).eval()
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    for options in ({}, {"use_cache": False}, {"prefill_chunk_size": 5}):
        first = half.generate(**inputs, **LOGITS, **options).logits[0]  # later tokens may go another way on a near tie
        assert (first.softmax(-1) - expected[0].softmax(-1)).abs().mean() < 0.003


def test_sampling_with_a_seed_is_the_same_whatever_the_cache(model):
    inputs = batch_of(mixed_samples(model), "left")
    texts = []
    for options in ({}, {}, {"cache_implementation": "static"}, {"prefill_chunk_size": 5}):
        torch.manual_seed(7)
        texts.append(model.generate(**inputs, **OPTIONS | {"do_sample": True}, **options))
    assert all(torch.equal(text, texts[0]) for text in texts)


def test_beams_are_the_same_whatever_the_cache(model):
    inputs = batch_of(mixed_samples(model), "left")
    expected = model.generate(**inputs, **OPTIONS, num_beams=3)
    for options in ({"cache_implementation": "static"}, {"use_cache": False}, {"prefill_chunk_size": 5}):
        assert torch.equal(model.generate(**inputs, **OPTIONS, num_beams=3, **options), expected)


@torch.no_grad()
def test_each_part_takes_the_attention_that_it_is_given(model, tmp_path):
    model.save_pretrained(tmp_path)
    chosen = {"text_config": "eager", "vision_config": "sdpa"}
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation=chosen).eval()
    parts = loaded.model.language_model, loaded.model.vision_tower
    assert [part.config._attn_implementation for part in parts] == ["eager", "sdpa"]
    inputs = mixed_samples(model)[0].alone()
    assert_near(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    "on_disk",
    [(), LAYERS[1:], IMAGE_PATH, ("model.language_model.embed_tokens", "lm_head")],
    ids=["none", "decoder", "image path", "ends"],
)
def test_a_device_map_does_not_change_results(model, on_disk, tmp_path):
    inputs = batch_of(mixed_samples(model), "left")
    expected = torch.stack(model.generate(**inputs, **LOGITS).logits)
    model.save_pretrained(tmp_path)
    ends = [f"model.language_model.{name}" for name in ("embed_tokens", "norm", "rotary_emb")]
    device_map = {part: "disk" if part in on_disk else "cpu" for part in (*IMAGE_PATH, *LAYERS, *ends, "lm_head")}
    placed = AutoModelForImageTextToText.from_pretrained(
        tmp_path, device_map=device_map if on_disk else "auto", offload_folder=tmp_path / "offload"
    )
    assert_near(torch.stack(placed.generate(**inputs, **LOGITS).logits), expected)
    assert_near(torch.stack(placed.generate(**inputs, **LOGITS, prefill_chunk_size=5).logits), expected)


def test_a_device_map_keeps_together_what_belongs_together(model):
    whole = {"ClipTower", type(model.model.multi_modal_projector).__name__, "SummaryLayer", "SkipLlamaDecoderLayer"}
    assert whole <= set(model._no_split_modules)


def test_qlora_of_the_language_model_alone(tmp_path):
    pytest.importorskip("bitsandbytes")
    model = LlavaSkipForConditionalGeneration(
        small_config(None, "sv-llava", vocab_size=128, hidden_size=256, intermediate_size=512)
    )
    model.save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=[*IMAGE_PATH, "lm_head"],
    )
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=quantization)
    linear = {name: type(module).__name__ for name, module in loaded.named_modules() if hasattr(module, "in_features")}
    assert {name for name, kind in linear.items() if kind == "Linear4bit"} == {
        n for n in linear if ".layers." in n and "language" in n
    }
    adapted = get_peft_model(
        prepare_model_for_kbit_training(loaded), LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|up_proj)")
    ).train()
    inputs = mixed_samples(model)[0].alone()
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= IMAGE_TOKEN_ID, -100)
    adapted(**inputs, labels=labels).loss.backward()
    trainable = [p.grad for name, p in adapted.named_parameters() if p.requires_grad and "lora_B" in name]
    assert len(trainable) == 2 * 3 and all(gradient.any() for gradient in trainable)
    assert adapted.eval().generate(**inputs, **OPTIONS).shape[1] == inputs["input_ids"].shape[1] + 6
