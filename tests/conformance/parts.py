"""Goldens of single parts: class-attention selection, merging, summaries."""

from __future__ import annotations

from math import isqrt

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llava_skip.checkpoints import native_name
from llava_skip.tokens import SummaryLayer, merge_choices, merge_tokens, retained_first, retained_order
from llava_skip.vision.resampler import ChainOfSightResampler, ResamplerConfig
from llava_skip.vision.square import resize_padded
from llava_skip.vision.tiling import PADDING_COLOUR, TilingImageProcessorPil, choose_grid, cut_tiles
from tests.conformance.goldens import Comparison, Golden, close, close_gradient, largest_gradient, same


def check_selection(golden: Golden) -> list[Comparison]:
    """`cls_attention` over class token and patches -> the kept patches, the others, and the reordered states."""
    results = []
    for case, (entry, t) in golden.cases().items():
        scores, keep = t["cls_attention"].sum(dim=1)[:, 1:], entry["retained"]
        order = retained_order(scores, keep)
        results += [
            same(f"{case} retained patches", order[:, :keep], t["retained_patches"]),
            same(f"{case} other patches", order[:, keep:], t["other_patches"]),
            close(f"{case} output", retained_first(t["hidden_states"][:, 1:], scores, keep), t["out"]),
        ]
    return results


def check_merge(golden: Golden) -> list[Comparison]:
    """Tokens -> centrality, order, targets, merged tokens and their gradient; with ties only the set of tokens."""
    results = []
    for case, (entry, t) in golden.cases().items():
        x = t["x"].requires_grad_()
        out = merge_tokens(x, entry["keep"])
        expected = t["out"].reshape(out.shape)
        if entry["ties"]:
            results.append(close(f"{case} set of tokens", _sorted_tokens(out), _sorted_tokens(expected)))
            continue
        centrality, order, target = merge_choices(x, entry["keep"])
        results += [
            close(f"{case} centrality", centrality, t["centrality"]),
            same(f"{case} order", order, t["order"]),
            same(f"{case} targets", target, t["dst_index"]),
            close(f"{case} output", out, expected),
        ]
        if "grad_x" in t:
            (gradient,) = torch.autograd.grad((out * t["grad_weight"].reshape(out.shape)).sum(), x)
            results.append(close_gradient(f"{case} gradient", gradient, t["grad_x"]))
    return results


def check_summary(golden: Golden) -> list[Comparison]:
    """Groups of tokens -> softmax weights and the pooled vector of both summaries."""
    results = []
    for case, (entry, t) in golden.cases().items():
        layer = SummaryLayer(t["image_features"].shape[-1])
        layer.norm.eps = entry.get("layernorm_eps", layer.norm.eps)
        layer.load_state_dict({_summary_name(n): v for n, v in t.items() if n.startswith("ada.")})
        for number in (1, 2):
            first, end = entry[f"q{number}_rows"]
            group = t["image_features"][:, first:end]
            results += [
                close(f"{case} weights {number}", layer.weights(group).squeeze(-1), t[f"weights{number}"]),
                close(f"{case} summary {number}", layer(group), t[f"q{number}"]),
            ]
    return results


def check_resampler(golden: Golden) -> list[Comparison]:
    """Features of each level -> the queries of all scales, and gradients of features and weights."""
    t = golden.tensors
    config = resampler_config(golden)
    module = _build_resampler(golden)
    features = [t[f"feat.block_{level}"].requires_grad_() for level in config.levels]
    out = module([drop_class_token(level) for level in features])
    results = [close("output", out, t["out"])]
    (out * t["grad_weight"]).sum().backward()
    whole = largest_gradient(t)
    for level, feature in zip(config.levels, features, strict=True):
        results.append(close_gradient(f"gradient of level {level}", feature.grad, t[f"grad.feat.block_{level}"], whole))
    parameters = dict(module.named_parameters())
    for name in (name.removeprefix("grad.weight.") for name in t if name.startswith("grad.weight.")):
        gradient = parameters[resampler_name(name)].grad
        results.append(close_gradient(f"gradient of {name}", gradient, t[f"grad.weight.{name}"], whole))
    return results


def check_resampler_weights(golden: Golden) -> list[Comparison]:
    """The weights fit a resampler of the sizes in the index, name by name."""
    _build_resampler(golden)
    return [Comparison(f"{len(golden.tensors)} tensors fit", 0.0, 0.0)]


def _build_resampler(golden: Golden) -> ChainOfSightResampler:
    sizes = golden.resampler
    module = ChainOfSightResampler(resampler_config(golden), sizes["context_dim"], sizes["llm_dim"])
    module.load_state_dict(resampler_weights(golden))
    return module


def resampler_config(golden: Golden) -> ResamplerConfig:
    """The configuration of a resampler golden; its features are named by level and given as they are."""
    entry = golden.resampler
    return ResamplerConfig(
        windows=entry["window_sizes"],
        queries=entry["n_query"],
        levels=entry["seq_feat_levels"],
        level_offset=0,
        width=entry["out_dim"],
    )


def resampler_weights(golden: Golden) -> dict[str, Tensor]:
    """Its weights under the names of `ChainOfSightResampler`."""
    starts = ("weight.", "model.mm_projector.")
    weights = {n.removeprefix(start): t for n, t in golden.tensors.items() for start in starts if n.startswith(start)}
    return {resampler_name(name): tensor for name, tensor in weights.items()}


def resampler_name(original: str) -> str:
    """The name in `ChainOfSightResampler` of a weight of the paper's code."""
    return native_name(f"model.mm_projector.{original}").removeprefix("model.multi_modal_projector.")


def drop_class_token(features: Tensor) -> Tensor:
    """[N, P or 1 + P, C] -> [N, P, C]: a square number of tokens has no class token (method, section 1 C)."""
    tokens = features.shape[1]
    return features if isqrt(tokens) ** 2 == tokens else features[:, 1:]


def check_tiles(golden: Golden) -> list[Comparison]:
    """An image -> its padded square, its crops (exactly), and the normalised crops."""
    results = []
    for case, (entry, t) in golden.cases().items():
        image = Image.fromarray(t["image"].to(torch.uint8).numpy())
        side, most = entry["patch"], entry["hd_num"]
        grid = choose_grid(*image.size, most, side)
        crops = np.stack([np.asarray(crop) for crop in cut_tiles(image, most, side)])
        processor = TilingImageProcessorPil(most, crop_size={"height": side, "width": side}, do_pad=False)
        values = processor(image, return_tensors="pt")["pixel_values"]
        square = resize_padded(image, max(image.size), PADDING_COLOUR, Image.Resampling.LANCZOS)
        results += [
            same(f"{case} grid", torch.tensor(grid), torch.tensor([entry["columns"], entry["rows"]])),
            same(f"{case} square", torch.from_numpy(np.array(square)), t["padded_square"]),
            same(f"{case} crops", torch.from_numpy(crops), t["crops"]),
            close(f"{case} pixel values", values, t["pixel_values"]),
        ]
    return results


def _summary_name(original: str) -> str:
    return original.replace("ada.0.", "norm.").replace("ada.1.", "score.")


def _sorted_tokens(tokens: Tensor) -> Tensor:
    """Tokens [B, N, C] of each sample in lexicographic order, rounded first so that noise does not reorder them."""
    return torch.tensor([sorted(sample.detach().round(decimals=5).tolist()) for sample in tokens])
