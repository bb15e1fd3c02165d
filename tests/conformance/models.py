"""Goldens of whole models: the language model on given visual tokens, and pixels to answers."""

from __future__ import annotations

from math import ceil, sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, DynamicCache, LlamaConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llava_skip.checkpoints import load_weights, native_name
from llava_skip.checkpoints.names import EMBEDDING
from llava_skip.configuration import IGNORE_INDEX, LlavaSkipConfig, SkipConfig
from llava_skip.modeling import LlavaSkipForConditionalGeneration
from llava_skip.tokens import retained_order
from tests.conformance.goldens import (
    Comparison,
    Golden,
    close,
    close_gradient,
    gradient_names,
    largest_gradient,
    same,
)
from tests.conformance.parts import drop_class_token, resampler_config, resampler_weights
from tests.conformance.variants import output_order, skip_of

ORIGINAL_IMAGE_TOKEN = -200


def check_language_weights(golden: Golden) -> list[Comparison]:
    """The weights fit a model of their configuration, name by name."""
    build_model(golden, SkipConfig(retained=1, skipped=1))
    return [Comparison(f"{len(golden.tensors)} tensors fit", 0.0, 0.0)]


def check_vision_weights(golden: Golden) -> list[Comparison]:
    """The tower's and projector's weights fit a model of their configuration, name by name."""
    width = golden.tensors["model.mm_projector.2.weight"].shape[0]
    text = LlamaConfig(hidden_size=width, intermediate_size=width, num_hidden_layers=1, num_attention_heads=1)
    model = LlavaSkipForConditionalGeneration(
        LlavaSkipConfig(vision_config=CLIPVisionConfig(**golden.entry["clip"]), text_config=text)
    )
    weights = {native_name(name): tensor for name, tensor in golden.tensors.items()}
    load_weights(model, weights, may_miss=("model.language_model.", "lm_head.", *_UNUSED_BY_THE_TOWER))
    return [Comparison(f"{len(weights)} tensors fit", 0.0, 0.0)]


# The features come from an inner layer, so files may leave out what follows it.
_UNUSED_BY_THE_TOWER = ("model.vision_tower.post_layernorm.",)


def build_model(golden: Golden, skip: SkipConfig) -> LlavaSkipForConditionalGeneration:
    """A float32 model of a file's `config`, with its front end and its weights.

    Goldens use every id for text, so the embedding table gets one more row, for the image token.
    """
    config, tensors = golden.entry["config"], golden.tensors
    language = tensors if "lm_head.weight" in tensors else golden.folder.weights_for(golden, "lm_head.weight", "config")
    weights = {native_name(name): tensor for name, tensor in language.items()}
    if skip.summary_start != "pooled" or not skip.spans:
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("model.summary.")}
    if "final_im_query" in tensors:
        weights["model.summary.vectors"] = tensors["final_im_query"][0]
    front_end = _front_end(golden, skip)
    vocabulary = config["vocab_size"]
    model = LlavaSkipForConditionalGeneration(
        LlavaSkipConfig(
            text_config=LlamaConfig(**config), image_token_index=vocabulary, skip=skip.to_dict(), **front_end.fields
        )
    ).eval()
    load_weights(model, weights | front_end.weights, front_end.may_miss)
    table = model.get_input_embeddings().weight.detach()
    model.set_input_embeddings(nn.Embedding.from_pretrained(nn.functional.pad(table, (0, 0, 0, 1)), freeze=False))
    model.generation_config.eos_token_id = None
    return model


class _FrontEnd(NamedTuple):
    """What a model's front end needs: fields of its configuration, weights, and prefixes of weights without values."""

    fields: dict[str, Any]
    weights: dict[str, Tensor]
    may_miss: list[str]


def _front_end(golden: Golden, skip: SkipConfig) -> _FrontEnd:
    tower, projector = "model.vision_tower.", "model.multi_modal_projector."
    if "pixel_values" in golden.names():
        weights = golden.folder.weights_for(golden, "model.mm_projector.0.weight", "clip")
        fields: dict[str, Any] = {"vision_config": CLIPVisionConfig(**golden.entry["clip"])}
        if golden.entry.get("hd_num"):
            fields |= {"front_end": "hd", "pad_pictures": False}
        return _FrontEnd(fields, {native_name(n): t for n, t in weights.items()}, list(_UNUSED_BY_THE_TOWER))
    if any(name.startswith("feat.") for name in golden.names()):
        source = golden.folder.resampler_for(golden)
        sizes = source.resampler
        clip = _small_clip(sizes["tokens_per_side"], sizes["context_dim"], max(sizes["seq_feat_levels"]) + 1)
        fields = {"vision_config": clip, "front_end": "cos", "resampler": resampler_config(source).to_dict()}
        return _FrontEnd(fields, {projector + n: t for n, t in resampler_weights(source).items()}, [tower])
    side = ceil(sqrt(skip.retained + skip.skipped + 1))
    return _FrontEnd({"vision_config": _small_clip(side)}, {}, [tower, projector])


def _small_clip(side: int, width: int = 4, layers: int = 2) -> CLIPVisionConfig:
    """A tower that is never run, of side x side patches."""
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4,
        num_hidden_layers=layers,
        num_attention_heads=1,
        image_size=side,
        patch_size=1,
    )


def check_language_model(golden: Golden) -> list[Comparison]:
    """Visual tokens between a prefix and a suffix -> states, keys, logits, loss, gradients, greedy decode."""
    entry, t = golden.entry, golden.tensors
    skip = skip_of(entry, t)
    model = build_model(golden, skip)
    features = t["image_features"].requires_grad_()
    with torch.no_grad():
        block = model.model.assemble(features)
    middle = torch.full((features.shape[0], block.shape[1]), model.config.image_token_id)
    input_ids = torch.cat([t["prefix_ids"], middle, t["suffix_ids"]], dim=1)
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": t.get("attention_mask")}
    order = output_order(entry, skip)
    results = _check_states(golden, model, inputs | {"mm_encoder_outputs": _encoded(block)}, order)
    results += _check_generation(golden, model, inputs | {"mm_encoder_outputs": _encoded(block)})
    if "loss" in t:
        block = model.model.assemble(features)
        results += _check_loss(golden, model, inputs | {"mm_encoder_outputs": _encoded(block)}, t["labels"])
        results.append(close_gradient("gradient of the visual tokens", features.grad, t["grad.image_features"]))
    return results


def check_text_only(golden: Golden) -> list[Comparison]:
    """A batch without images: a plain language model, and gradients of zero for the weights of the image path."""
    t = golden.tensors
    model = build_model(golden, SkipConfig(retained=1, skipped=1))
    inputs = {"input_ids": t["input_ids"], "attention_mask": t["attention_mask"]}
    with torch.no_grad():
        logits = model(**inputs).logits
    return [_close_logits(golden, logits, t["attention_mask"]), *_check_loss(golden, model, inputs, t["labels"])]


def check_end_to_end(golden: Golden) -> list[Comparison]:
    """Pixels or features, and ids with one sentinel an image -> tokens, logits, loss, gradients, greedy decode."""
    entry, t = golden.entry, golden.tensors
    model = build_model(golden, skip_of(_with_coarse(golden), t))
    skip = model.config.skip_config
    input_ids, attention_mask, labels = _expand(model, t["input_ids"], t["attention_mask"], t["labels"])
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    results = [
        same("expanded mask", attention_mask, t["expanded_attention_mask"]),
        same("expanded labels", labels, t["expanded_labels"]),
        *_check_tower(golden, model),
    ]
    with torch.no_grad():
        outputs = model(**inputs, **_images(golden, model))
    block = torch.as_tensor(outputs.image_hidden_states).unflatten(0, (-1, skip.length))
    tokens = block[:, [index for index in range(skip.length) if index not in skip.summary_positions]]
    expected = t["skip_argument_features"]
    results.append(close("visual tokens", tokens[:, -expected.shape[1] :], expected))
    order = output_order(entry | {"length": input_ids.shape[1]}, skip)
    results.append(_close_logits(golden, _reorder(outputs.logits, order), attention_mask))
    results += _check_loss(golden, model, inputs | _images(golden, model), labels)
    return results + _check_generation(golden, model, inputs | _images(golden, model))


def _with_coarse(golden: Golden) -> dict[str, Any]:
    """The entry, with the first scale of a resampler as the coarse tokens that the first summary leaves out."""
    if "pixel_values" in golden.names():
        return golden.entry
    return golden.entry | {"coarse": golden.folder.resampler_for(golden).resampler["n_query"][0]}


def _images(golden: Golden, model: LlavaSkipForConditionalGeneration) -> dict[str, Any]:
    t = golden.tensors
    if "pixel_values" not in t:
        features = [drop_class_token(t[f"feat.block_{level}"]) for level in model.config.resampler_config.levels]
        block = model.model.block(model.model.multi_modal_projector(features))
        return {"mm_encoder_outputs": _encoded(block)}
    crop_counts = golden.entry.get("hd_num")
    return {"pixel_values": t["pixel_values"]} | ({"crop_counts": torch.tensor(crop_counts)} if crop_counts else {})


def _check_tower(golden: Golden, model: LlavaSkipForConditionalGeneration) -> list[Comparison]:
    t, config = golden.tensors, model.config
    if "tower_features" not in t:
        return []
    with torch.no_grad():
        states, scores = model.model.vision_tower(t["pixel_values"], config.vision_feature_layer, rank=True)
    if "retained_patches" not in t:
        return [close("tower features", states[:, 1:], t["tower_features"])]
    order = retained_order(scores, golden.entry["retained"])
    features = states[:, 1:].gather(1, order.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
    return [
        same("retained patches", order[:, : golden.entry["retained"]], t["retained_patches"]),
        close("tower features", features, t["tower_features"]),
    ]


def _check_states(golden: Golden, model: Any, inputs: dict[str, Any], order: Tensor) -> list[Comparison]:
    """Logits, and the states after each layer and the keys and values where the file holds them."""
    t, entry = golden.tensors, golden.entry
    states: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda *a: states.append(a[-1])) for layer in model.model.language_model.layers
    ]
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        logits = model(**inputs, past_key_values=cache, use_cache=True).logits
    for hook in hooks:
        hook.remove()
    results = [_close_logits(golden, _reorder(logits, order), inputs["attention_mask"])]
    attention_order = entry.get("orders", {}).get("attn_order")
    for index, (layer, state) in enumerate(zip(cache.layers, states, strict=True)):
        for stream in ("main", "skip"):
            if (name := f"layer{index}.{stream}") in t:
                positions = [attention_order.index(token) for token in entry["orders"][f"{stream}_order"]]
                results.append(close(name, state[:, positions], t[name]))
        for name, stored in ((f"kv.layer{index}.key", layer.keys), (f"kv.layer{index}.value", layer.values)):
            if name in t:
                results.append(close(name, stored, t[name]))
    return results


def _check_loss(golden: Golden, model: Any, inputs: dict[str, Any], labels: Tensor) -> list[Comparison]:
    t = golden.tensors
    model.train()
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    model.eval()
    parameters = dict(model.named_parameters())
    results = [close("loss", loss, t["loss"])]
    whole = largest_gradient(t)
    for name in gradient_names(t):
        gradient, expected = parameters[native_name(name)].grad, t[f"grad.{name}"]
        if native_name(name) == EMBEDDING and gradient is not None:
            gradient = gradient[: golden.entry["config"]["vocab_size"]]  # without the row of the image token
        results.append(close_gradient(f"gradient of {name}", gradient, expected, whole))
    for name in golden.entry.get("params_with_zero_grad", ()):
        parameter = parameters[native_name(name)]
        results.append(close_gradient(f"zero gradient of {name}", parameter.grad, torch.zeros_like(parameter), whole))
    return results


def _check_generation(golden: Golden, model: Any, inputs: dict[str, Any]) -> list[Comparison]:
    t = golden.tensors
    if "gen_tokens" not in t:
        return []
    steps, length = len(t["gen_tokens"]), inputs["input_ids"].shape[1]
    if inputs["attention_mask"] is None:  # otherwise generate would take the id 0 in the text for padding
        inputs = inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])}
    options = {"max_new_tokens": steps, "do_sample": False, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    generated = model.generate(**inputs, **options)
    return [
        same("greedy tokens", generated.sequences[0, length:], t["gen_tokens"]),
        close("logits of the greedy tokens", torch.cat(generated.logits), t["gen_logits"]),
    ]


def _expand(model: Any, ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and labels [B, T] with the image tokens of an image instead of each sentinel."""
    repeats = torch.where(ids == ORIGINAL_IMAGE_TOKEN, model.config.image_seq_length, 1)

    def expand(tensor: Tensor) -> Tensor:
        return torch.stack([sample.repeat_interleave(times) for sample, times in zip(tensor, repeats, strict=True)])

    expanded = expand(ids)
    is_image = expanded == ORIGINAL_IMAGE_TOKEN
    return (
        expanded.masked_fill(is_image, model.config.image_token_id),
        expand(mask),
        expand(labels).masked_fill(is_image, IGNORE_INDEX),
    )


def _encoded(block: Tensor) -> dict[str, BaseModelOutputWithPooling]:
    return {"image": BaseModelOutputWithPooling(pooler_output=block)}


def _reorder(logits: Tensor, order: Tensor) -> Tensor:
    """Logits [B, T, V] in another order; -1 gives zeros."""
    return logits[:, order.clamp(min=0)].masked_fill((order < 0)[None, :, None], 0.0)


def _close_logits(golden: Golden, logits: Tensor, mask: Tensor | None) -> Comparison:
    """Logits of the tokens that are not padding."""
    expected = golden.tensors["logits"]
    if mask is None:
        return close("logits", logits, expected)
    return close("logits", logits[mask.bool()], expected[mask.bool()])
