"""Each layout is made here from its documented names; what is loaded must compute what its source computes."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from typer.testing import CliRunner

from llava_skip import AutoProcessor, LlavaSkipConfig, LlavaSkipForConditionalGeneration, SkipConfig
from llava_skip.checkpoints import detect_layout, export_llava_hf, load_checkpoint
from llava_skip.convert import convert
from llava_skip.vision.clip import resize_positions
from llava_skip_base.console import make_app
from tests.support.stand_ins import word_tokenizer

VOCABULARY = 100
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 4}
TEXT = {"vocab_size": VOCABULARY, "hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 3}
TEXT |= {"num_attention_heads": 5, "num_key_value_heads": 5, "max_position_embeddings": 256, "rms_norm_eps": 1e-5}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}


def loud(model):
    """Biases and norms that start at 0 and 1 would hide mistakes."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT),
        image_token_index=90,
        image_seq_length=16,
    )
    return loud(LlavaForConditionalGeneration(config))


@pytest.fixture
def tower(theirs, tmp_path):
    model = CLIPVisionModel(theirs.config.vision_config)
    model.load_state_dict(theirs.model.vision_tower.state_dict())
    model.save_pretrained(tmp_path / "tower")
    return tmp_path / "tower"


def original_config(**more):
    flat = {**TEXT, "model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "hidden_act": "silu"}
    flat |= {"mm_hidden_size": 16, "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2}
    flat |= {"mm_vision_select_feature": "patch", "mm_use_im_start_end": False, "image_aspect_ratio": "pad"}
    flat |= {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "use_mm_proj": True, "rope_theta": 10000.0}
    return flat | {"torch_dtype": "float16", "tokenizer_model_max_length": 2048} | more


def language_weights(model):
    weights = {f"model.{name}": t for name, t in model.model.language_model.state_dict().items()}
    return weights | {"lm_head.weight": model.lm_head.weight.data}


def projector_weights(model, prefix="model.mm_projector."):
    first, second = model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2
    layers = {"0": first, "2": second}
    return {f"{prefix}{n}.{k}": t for n, layer in layers.items() for k, t in layer.state_dict().items()}


def tower_weights(model, prefix="model.vision_tower.vision_tower.vision_model."):
    return {f"{prefix}{name}": t for name, t in model.model.vision_tower.state_dict().items()}


def original_weights(model):
    return language_weights(model) | projector_weights(model) | tower_weights(model)


def write(folder, config, weights, name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    copies = {key: tensor.clone().contiguous() for key, tensor in weights.items()}
    save_file(copies, folder / name) if name.endswith("safetensors") else torch.save(copies, folder / name)
    return folder


def write_shards(folder, config, weights, name):
    """Two shards and their index."""
    stem, ending = name.rsplit(".", 1)
    where = {key: f"{stem}-0000{1 + n % 2}-of-00002.{ending}" for n, key in enumerate(weights)}
    for shard in set(where.values()):
        write(folder, config, {key: weights[key] for key in weights if where[key] == shard}, shard)
    (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def logits_of(model):
    """Logits of the old vocabulary on an image between text."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(3, 80, (9,), generator=generator)
    side = model.config.vision_config.image_size
    rows = model.config.image_seq_length
    ids = torch.cat([words[:4], torch.full((rows,), model.config.image_token_id), words[4:]])[None]
    images = torch.randn(1, 3, side, side, generator=generator)
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=images, attention_mask=torch.ones_like(ids)).logits
    return logits[..., :VOCABULARY]


def assert_equal_and_saves(model, source, tmp_path):
    assert torch.allclose(logits_of(model), logits_of(source), atol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    again = load_checkpoint(tmp_path / "saved")
    assert again.load_report.layout == "native" and again.load_report.is_exact
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").eval()
    for other in (again, stock):
        weights = other.state_dict()
        assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
        # Not to the last bit: a matrix elsewhere in memory may be multiplied in another way.
        assert torch.allclose(logits_of(other), logits_of(model), atol=1e-5)


# ------------------------------------------------------------------------------------------------ LLaVA's own layout


@pytest.mark.parametrize(
    "form", ["model.safetensors", "pytorch_model.bin", "shards model.safetensors", "shards pytorch_model.bin"]
)
def test_original_with_its_tower(theirs, tower, tmp_path, form):
    config = original_config(mm_vision_tower=str(tower))
    weights = original_weights(theirs) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    make = write_shards if form.startswith("shards") else write
    model = load_checkpoint(make(tmp_path / "m", config, weights, form.split()[-1]))
    report = model.load_report
    assert report.layout == "original LLaVA"
    assert not report.fresh and not report.unused and not report.notes
    assert len(report.reshaped) == 2 and model.config.text_config.vocab_size == 128
    assert model.config.image_token_id == VOCABULARY
    assert model.generation_config.eos_token_id == 2
    assert_equal_and_saves(model, theirs, tmp_path)


def test_original_without_its_tower(theirs, tower, tmp_path):
    weights = language_weights(theirs) | projector_weights(theirs)
    named = write(tmp_path / "named", original_config(mm_vision_tower=str(tower)), weights)
    assert_equal_and_saves(load_checkpoint(named), theirs, tmp_path)
    unnamed = write(tmp_path / "unnamed", original_config(model_type="llava_llama"), weights)
    given = load_checkpoint(unnamed, vision_tower=str(tower))
    assert torch.allclose(logits_of(given), logits_of(theirs), atol=1e-5)
    assert any("vision tower of" in note for note in given.load_report.notes)


def test_sizes_are_the_files_own_and_never_defaults(theirs, tower, tmp_path):
    config = original_config(mm_vision_tower=str(tower))
    text = load_checkpoint(write(tmp_path / "m", config, original_weights(theirs))).config.text_config
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads) == (40, 3, 5)
    del config["num_hidden_layers"]
    with pytest.raises(ValueError, match=r"lacks \['num_hidden_layers'\]"):
        load_checkpoint(write(tmp_path / "m", config, original_weights(theirs)))


def test_tower_layers_after_the_features_may_be_missing(theirs, tower, tmp_path):
    unused = (
        "model.vision_tower.vision_tower.vision_model.encoder.layers.2.",
        "model.vision_tower.vision_tower.vision_model.post",
    )
    weights = {name: t for name, t in original_weights(theirs).items() if not name.startswith(unused)}
    model = load_checkpoint(write(tmp_path / "m", original_config(mm_vision_tower=str(tower)), weights))
    assert len(model.load_report.fresh) == 18
    assert torch.allclose(logits_of(model), logits_of(theirs), atol=1e-5)


def test_a_tower_that_is_no_folder_is_read_from_its_weights(tmp_path):
    torch.manual_seed(1)
    vision = CLIPVisionConfig(**{**VISION, "hidden_size": 128})  # two heads of 64
    source = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_index=90, image_seq_length=16)
    ).eval()
    model = load_checkpoint(write(tmp_path / "m", original_config(), original_weights(source)))
    assert model.config.vision_config.num_attention_heads == 2
    assert any("sizes are read from its weights" in note for note in model.load_report.notes)
    assert torch.allclose(logits_of(model), logits_of(source), atol=1e-5)


def test_linear_projector_is_expressed_exactly(theirs, tower, tmp_path):
    weight, bias = torch.randn(40, 16), torch.randn(40)
    weights = language_weights(theirs) | {"model.mm_projector.weight": weight, "model.mm_projector.bias": bias}
    config = original_config(mm_vision_tower=str(tower), mm_projector_type="linear")
    model = load_checkpoint(write(tmp_path / "m", config, weights))
    patches = torch.randn(2, 16, 16)
    assert torch.equal(model.model.multi_modal_projector(patches), torch.nn.functional.linear(patches, weight, bias))
    with pytest.raises(ValueError, match="mm_projector_type is 'mlp3x_gelu'"):
        load_checkpoint(write(tmp_path / "m", config | {"mm_projector_type": "mlp3x_gelu"}, original_weights(theirs)))


def test_a_larger_image_resizes_the_position_table(theirs, tower, tmp_path):
    weights = language_weights(theirs) | projector_weights(theirs)
    config = original_config(mm_vision_tower=str(tower), backbone_resolution=24)
    model = load_checkpoint(write(tmp_path / "m", config, weights))
    assert model.config.image_seq_length == 36
    assert any("17 -> 37 rows, bicubic" in line for line in model.load_report.reshaped)
    old, new = (m.model.vision_tower.embeddings.position_embedding.weight for m in (theirs, model))
    corners = [(1, 1), (4, 6), (13, 31), (16, 36)]  # aligned corners keep their values
    assert torch.equal(old[0], new[0]) and all(torch.allclose(old[a], new[b], atol=1e-5) for a, b in corners)
    assert torch.allclose(resize_positions(new, 36), new, atol=1e-6)


# ------------------------------------------------------------------------------------------------ the paper's layouts


def native_source(**fields):
    torch.manual_seed(2)
    config = LlavaSkipConfig(text_config=LlamaConfig(**TEXT), image_token_index=90, **fields)
    return loud(LlavaSkipForConditionalGeneration(config))


def test_skipping_checkpoint_of_the_paper(tower, tmp_path):
    skip = SkipConfig(5, 7)
    source = native_source(vision_config=CLIPVisionConfig(**VISION), skip=skip.to_dict())
    summary = source.model.summary
    ada = {"model.ada.0.weight": summary.norm.weight.data, "model.ada.0.bias": summary.norm.bias.data}
    ada |= {"model.ada.1.weight": summary.score.weight.data, "model.ada.1.bias": summary.score.bias.data}
    folder = write(tmp_path / "m", original_config(mm_vision_tower=str(tower)), original_weights(source) | ada)
    model = load_checkpoint(folder, skip=skip)
    assert not model.load_report.fresh and not model.load_report.unused
    assert_equal_and_saves(model, source, tmp_path)
    with pytest.raises(ValueError, match="name the preset"):
        load_checkpoint(folder)
    zipped = original_config(mm_vision_tower=str(tower), use_zip=True)
    inferred = load_checkpoint(write(tmp_path / "zip", zipped, original_weights(source) | ada))
    assert inferred.config.preset == "sv-llava-100" and "preset sv-llava-100" in str(inferred.load_report)
    dense = load_checkpoint(folder, preset="llava")
    assert sorted(dense.load_report.unused) == sorted(
        f"model.summary.{name}" for name in ("norm.weight", "norm.bias", "score.weight", "score.bias")
    )


def own_clip_weights(tower):
    """OpenAI's names, q, k and v fused."""
    at = "model.vision_tower."
    inside = tower.embeddings
    weights = {
        f"{at}conv1.weight": inside.patch_embedding.weight,
        f"{at}class_embedding": inside.class_embedding,
        f"{at}positional_embedding": inside.position_embedding.weight,
        f"{at}ln_pre.weight": tower.pre_layrnorm.weight,
        f"{at}ln_pre.bias": tower.pre_layrnorm.bias,
    }
    for number, layer in enumerate(tower.encoder.layers):
        block, attention = f"{at}transformer.resblocks.{number}.", layer.self_attn
        parts = {"attn.out_proj": attention.out_proj, "ln_1": layer.layer_norm1, "ln_2": layer.layer_norm2}
        parts |= {"mlp.c_fc": layer.mlp.fc1, "mlp.c_proj": layer.mlp.fc2}
        for kind in ("weight", "bias"):
            fused = [getattr(p, kind) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
            weights[f"{block}attn.in_proj_{kind}"] = torch.cat(fused)
            weights |= {f"{block}{name}.{kind}": getattr(module, kind) for name, module in parts.items()}
    return {name: tensor.detach() for name, tensor in weights.items()}


def resampler_weights(resampler):
    at = "model.mm_projector."
    weights = {}
    for key, scale in resampler.scales.items():
        window, queries = key.split("_")
        weights[f"{at}cls_token_{key}"] = scale.query.detach()
        for level, reader in scale.readers.items():
            name = f"{window}_{level}_{queries}"
            parts = {"attn": reader.attention, "ln": reader.mlp_norm, "mlp": reader.mlp}
            for part, module in parts.items():
                weights |= {f"{at}{part}_0_{name}.{k}": t for k, t in module.state_dict().items()}
    for part in ("ln_out", "out_proj"):
        weights |= {f"{at}{part}.{k}": t for k, t in getattr(resampler, part).state_dict().items()}
    return weights


@pytest.mark.parametrize(
    ("version", "windows", "queries"),
    [("v1_448_q1+16+4", (4, 1, 2), (1, 16, 4)), (None, (4, 2, 1), (1, 4, 16)), ("v1", (4, 2), (1, 4))],
)
def test_chain_of_sight_with_its_own_clip(tmp_path, version, windows, queries):
    vision = CLIPVisionConfig(**{**VISION, "hidden_size": 128})  # the own CLIP has heads of 64
    resampler = {"windows": windows, "queries": queries, "levels": (1, 2), "width": 64}
    source = native_source(vision_config=vision, front_end="cos", resampler=resampler, vision_feature_layer=-1)
    weights = language_weights(source) | resampler_weights(source.model.multi_modal_projector)
    weights |= own_clip_weights(source.model.vision_tower)
    config = original_config(mm_projector_type="cos", cos_config_version=version, backbone_resolution=-1)
    model = load_checkpoint(write(tmp_path / "m", config, weights))
    found = model.config.resampler_config
    assert (found.windows, found.queries, found.levels, found.level_offset) == (windows, queries, (1, 2), 1)
    assert not model.load_report.unused
    assert all("post_layernorm" in name for name in model.load_report.fresh)
    assert_equal_and_saves(model, source, tmp_path)


def test_chain_of_sight_on_transformers_clip_reads_one_block_earlier(tower, tmp_path):
    resampler = {"windows": (4, 2), "queries": (1, 4), "levels": (1, 2), "level_offset": 0, "width": 64}
    source = native_source(vision_config=CLIPVisionConfig(**VISION), front_end="cos", resampler=resampler)
    weights = language_weights(source) | resampler_weights(source.model.multi_modal_projector) | tower_weights(source)
    config = original_config(mm_vision_tower=str(tower), cos_config_version="v1", mm_projector_type="cos")
    model = load_checkpoint(write(tmp_path / "m", config, weights))
    assert model.config.resampler_config.hidden_states == (1, 2)
    assert torch.allclose(logits_of(model), logits_of(source), atol=1e-5)


# ------------------------------------------------------------------------------------------------ transformers' layouts


def hub_weights(model):
    weights = {f"language_model.model.{k}": t for k, t in model.model.language_model.state_dict().items()}
    weights |= tower_weights(model, "vision_tower.vision_model.")
    weights |= {f"multi_modal_projector.{k}": t for k, t in model.model.multi_modal_projector.state_dict().items()}
    return weights | {"language_model.lm_head.weight": model.lm_head.weight.data}


@pytest.mark.parametrize("layout", ["hub", "memory", "saved by transformers 5"])
def test_llava_hf(theirs, tmp_path, layout):
    weights = {"hub": hub_weights(theirs), "memory": theirs.state_dict()}.get(layout)
    if weights is None:
        theirs.save_pretrained(tmp_path / "m")
    else:
        write(tmp_path / "m", theirs.config.to_dict(), weights)
    model = load_checkpoint(tmp_path / "m")
    assert model.load_report.layout == "llava-hf" and model.load_report.is_exact
    assert model.config.image_token_id == 90
    assert_equal_and_saves(model, theirs, tmp_path)


def test_llava_next_gives_its_parts_and_lists_the_newline(theirs, tmp_path):
    config = theirs.config.to_dict() | {"model_type": "llava_next", "image_grid_pinpoints": [[336, 672]]}
    config |= {"architectures": ["LlavaNextForConditionalGeneration"]}
    weights = hub_weights(theirs) | {"image_newline": torch.randn(40)}
    model = load_checkpoint(write(tmp_path / "m", config, weights))
    assert model.load_report.unused == ["model.image_newline"]
    assert torch.allclose(logits_of(model), logits_of(theirs), atol=1e-5)


def test_a_dense_checkpoint_skips_at_once(theirs, tmp_path):
    folder = write(tmp_path / "m", theirs.config.to_dict(), hub_weights(theirs))
    model = load_checkpoint(folder, preset="sv-llava-256")
    assert model.config.skip_config == SkipConfig(7, 9)
    assert {name.rsplit(".", 2)[0] for name in model.load_report.fresh} == {"model.summary"}
    assert logits_of(model).isfinite().all()
    learned = load_checkpoint(folder, skip=SkipConfig(5, 7, summary_start="learned"))
    vectors = learned.model.summary.vectors
    assert vectors.isfinite().all() and 0.001 < vectors.abs().max() < 0.2
    hd = load_checkpoint(folder, preset="sv-llava-hd")
    assert hd.config.front_end == "hd" and hd.config.skip_config.retained == 16


def test_export_loads_in_transformers(theirs, tower, tmp_path):
    folder = write(tmp_path / "m", original_config(mm_vision_tower=str(tower)), original_weights(theirs))
    model = load_checkpoint(folder)
    export_llava_hf(model, tmp_path / "hf")
    names = set(load_file(tmp_path / "hf" / "model.safetensors"))
    assert {name for name in hub_weights(theirs)} == names
    exported, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.allclose(logits_of(exported.eval()), logits_of(theirs), atol=1e-5)
    with pytest.raises(ValueError, match="The model skips"):
        export_llava_hf(load_checkpoint(folder, preset="sv-llava-100"), tmp_path / "no")
    with pytest.raises(ValueError, match="front end is 'hd'"):
        export_llava_hf(load_checkpoint(folder, preset="llava-hd"), tmp_path / "no")


# ------------------------------------------------------------------------------------------------ parts on top


@pytest.fixture
def language(theirs, tmp_path):
    model = LlamaForCausalLM(LlamaConfig(**TEXT))
    model.model.load_state_dict(theirs.model.language_model.state_dict())
    model.lm_head.load_state_dict(theirs.lm_head.state_dict())
    model.save_pretrained(tmp_path / "language")
    return tmp_path / "language"


def test_a_language_model_and_a_tower(theirs, language, tower):
    model = load_checkpoint(language, preset="sv-llava-100", vision_tower=str(tower))
    assert {name.split(".")[1] for name in model.load_report.fresh} == {"multi_modal_projector", "summary"}
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        ours, stock = model(input_ids=ids).logits[..., :VOCABULARY], theirs(input_ids=ids).logits
    assert torch.allclose(ours, stock, atol=1e-5)
    with pytest.raises(ValueError, match="give vision_tower"):
        load_checkpoint(language)


def test_a_language_model_with_one_table(tower, tmp_path):
    torch.manual_seed(4)
    source = LlamaForCausalLM(LlamaConfig(**TEXT, tie_word_embeddings=True)).eval()
    source.save_pretrained(tmp_path / "tied")
    model = load_checkpoint(tmp_path / "tied", vision_tower=str(tower), dtype=None)
    assert model.lm_head.weight is model.get_input_embeddings().weight and model.dtype == torch.float32
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        ours = model(input_ids=ids).logits
        assert torch.allclose(ours[..., :VOCABULARY], source(input_ids=ids).logits, atol=1e-5)
    assert (ours.argmax(-1) < VOCABULARY).all()  # the new rows never win
    export_llava_hf(model, tmp_path / "hf")
    exported = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    assert torch.allclose(logits_of(exported), logits_of(model), atol=1e-5)


def test_a_language_model_gets_a_new_resampler(language, tower):
    with pytest.raises(ValueError, match="levels|windows"):  # the preset's resampler needs a larger tower
        load_checkpoint(language, preset="cos", vision_tower=str(tower))
    with pytest.raises(ValueError, match="Give preset or skip"):
        load_checkpoint(language, preset="cos", skip=SkipConfig(1, 1), vision_tower=str(tower))


def test_projector_file_over_a_language_model(theirs, language, tower, tmp_path):
    folder = tmp_path / "pretrain"
    weights = projector_weights(theirs) | {"model.embed_tokens.weight": torch.zeros(2, 2)}
    write(folder, original_config(mm_vision_tower=str(tower)), weights, "mm_projector.bin")
    model = load_checkpoint(language, projector=folder)
    assert model.load_report.unused == ["mm_projector.bin: model.embed_tokens.weight"]
    assert torch.allclose(logits_of(model), logits_of(theirs), atol=1e-5)


def test_lora_adapter_over_a_language_model(theirs, language, tower, tmp_path):
    folder = tmp_path / "llava-lora"
    wrapped = get_peft_model(
        LlamaForCausalLM.from_pretrained(language),
        LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    wrapped.save_pretrained(folder)
    trained = projector_weights(theirs, "base_model.model.model.mm_projector.")
    torch.save(trained, folder / "non_lora_trainables.bin")
    (folder / "config.json").write_text(json.dumps(original_config(mm_vision_tower=str(tower))))
    model = load_checkpoint(language, lora=folder)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        ours, stock, plain = (m(input_ids=ids).logits[..., :VOCABULARY] for m in (model, wrapped.eval(), theirs))
    assert torch.allclose(ours, stock, atol=1e-4) and not torch.allclose(ours, plain, atol=1e-2)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path / "saved")
    again = load_checkpoint(tmp_path / "saved")
    assert again.load_report.is_exact
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(
        model.model.multi_modal_projector.linear_2.weight, theirs.model.multi_modal_projector.linear_2.weight
    )
    for name, tensor in theirs.model.vision_tower.state_dict().items():  # bare target names must not reach the tower
        assert torch.equal(model.model.vision_tower.state_dict()[name], tensor)
    with pytest.raises(FileNotFoundError, match="give this folder as lora"):
        load_checkpoint(folder)


# ------------------------------------------------------------------------------------------------ what is refused


def test_missing_and_unknown_weights(theirs, tower, tmp_path):
    config, weights = original_config(mm_vision_tower=str(tower)), original_weights(theirs)
    listed = weights | {"model.something.weight": torch.ones(3)}
    model = load_checkpoint(write(tmp_path / "m", config, listed))
    assert model.load_report.unused == ["model.something.weight"] and "model.something.weight" in str(model.load_report)
    for name in ("model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.mm_projector.2.bias"):
        fewer = {key: t for key, t in weights.items() if key != name}
        with pytest.raises(ValueError, match="Missing: .'.*" + name.split("model.")[-1].split("projector.2.")[-1]):
            load_checkpoint(write(tmp_path / "m", config, fewer))
    more = weights | {"model.layers.0.self_attn.q_proj.bias": torch.ones(40)}
    with pytest.raises(ValueError, match=r"Unknown: \['model.language_model.layers.0.self_attn.q_proj.bias'\]"):
        load_checkpoint(write(tmp_path / "m", config, more))
    with pytest.raises(ValueError, match=r"is \(48, 40\), expected \(64, 40\)"):
        load_checkpoint(write(tmp_path / "m", config | {"intermediate_size": 64}, weights))


class Evil:
    def __reduce__(self):
        return (open, ("evil.txt", "w"))


def test_a_pickle_that_runs_code_is_refused(theirs, tower, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "m", original_config(mm_vision_tower=str(tower)), {}, "pytorch_model.bin")
    torch.save({"lm_head.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin is refused"):
        load_checkpoint(folder)
    assert not (tmp_path / "evil.txt").exists()


def test_layouts_are_recognised_before_model_type_is_looked_at():
    assert detect_layout(original_config()) == "original LLaVA"
    assert detect_layout(original_config(architectures=["LlamaForCausalLM"])) == "original LLaVA"
    assert detect_layout({"model_type": "llava_skip"}) == "native"
    assert detect_layout({**TEXT, "model_type": "llama"}) == "language model"
    for unknown in ({"model_type": "llava", "hidden_size": 8}, {"model_type": "bert"}, {}):
        with pytest.raises(ValueError, match="of no known layout"):
            detect_layout(unknown)


def test_a_tokenizer_that_cannot_be_read_is_named(theirs, tower, tmp_path, monkeypatch):
    folder = write(tmp_path / "m", original_config(mm_vision_tower=str(tower)), original_weights(theirs))
    (folder / "tokenizer.model").touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install sentencepiece"):
        load_checkpoint(folder)


def test_missing_files_are_named(theirs, tower, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"The model \./nowhere does not exist"):
        load_checkpoint("./nowhere")
    folder = write_shards(tmp_path / "m", original_config(), original_weights(theirs), "model.safetensors")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks the shards .'model-00002-of-00002.safetensors'"):
        load_checkpoint(folder)


# ------------------------------------------------------------------------------------------------ the command


def run(*arguments):
    return CliRunner().invoke(make_app(convert), [str(argument) for argument in arguments])


@pytest.mark.parametrize("target", ["native", "llava-hf"])
def test_convert(theirs, tower, tmp_path, target):
    folder = write(tmp_path / "m", original_config(mm_vision_tower=str(tower)), original_weights(theirs))
    word_tokenizer(folder, VOCABULARY)
    result = run(folder, tmp_path / "out", "--to", target, "--template", "v1", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert "layout original LLaVA" in result.output and "resized (2):" in result.output
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    assert torch.allclose(logits_of(model), logits_of(theirs), atol=1e-5)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id == VOCABULARY
    assert "<image>" in processor.tokenizer.decode(VOCABULARY) and processor.chat_template


def test_convert_says_what_is_wrong(tmp_path):
    result = run("./nowhere", tmp_path / "out")
    assert result.exit_code == 2 and "error: The model ./nowhere does not exist" in result.stderr
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    assert "is not empty" in run("./nowhere", tmp_path / "out").output
