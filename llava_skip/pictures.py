"""What becomes of an image's parts, drawn over the image: retained, merged into which token, weighed by the summaries.

Shapes: P visual tokens of an image before merging, R retained, S skipped.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from llava_skip.modeling import LlavaSkipModel
from llava_skip.tokens import merge_choices, merge_tokens
from llava_skip.vision.front_end import Place
from llava_skip.vision.view import View

OUTLINE = (255, 60, 60)
SHOWN_SIDE = 448
"""A crop is drawn at least this large, in pixels."""
SAME = 1e-3
"""Relative distance up to which a rival's row counts as a visual token as it was: other batches round differently."""
_HEAT = (255, 40, 0)
_GOLDEN = 0.618034
"""Turns of the hue from one target to the next, by which neighbours in number differ most."""


@dataclass(frozen=True)
class ImageParts:
    """What becomes of each part of an image.

    Attributes:
        places: [P] where each visual token looks, the retained first.
        tokens: [P] the token, of the R + S before the summaries are put in, that it is or is merged into; -1 for one
            that a rival method drops, or mixes with others in its own way.
        keeps: [P] whether it stays itself: it is retained, or others are merged into it.
        retained: R; P for a dense model; for a rival method, how many visual tokens enter the decoder as they are.
        summaries: of each summary, what it weighs: [R + S] shares that sum to 1, 0 outside of its span. Empty without
            summaries, or where they are learned vectors.
    """

    places: list[Place]
    tokens: list[int]
    keeps: list[bool]
    retained: int
    summaries: list[list[float]]

    def heat(self, summary: int) -> list[float]:
        """[P] the share of each part in a summary; a token's share is split evenly over what is merged in it."""
        weights, count = self.summaries[summary], [0] * len(self.summaries[summary])
        for token in self.tokens:
            count[token] += 1
        return [weights[token] / count[token] for token in self.tokens]


@torch.no_grad()
def image_parts(model: LlavaSkipModel, crops: Tensor) -> ImageParts:
    """What a model makes of the parts of one image.

    Args:
        model: `LlavaSkipForConditionalGeneration.model`.
        crops: [crops, 3, side, side] of one image, on the model's device.

    Raises:
        UserError: the front end does not know where its tokens look.
    """
    places, skip = model.front_end.places(model, crops), model.config.skip_config
    if skip is None and model.config.reduction is None:
        return ImageParts(places, list(range(len(places))), [True] * len(places), len(places), [])
    modules = model.vision_tower, model.multi_modal_projector
    (group,) = model.front_end.encode(*modules, crops, [len(crops)], model.config)
    if skip is None:
        return _kept_parts(places, View(model.front_end, *modules, crops, model.config).tokens, group.tokens)
    kept, others = group.tokens.tensor_split([skip.retained], dim=1)
    tokens, keeps = list(range(skip.retained)), [True] * skip.retained
    if others.shape[1] == skip.skipped:  # nothing is merged, and the order stays
        tokens, keeps = list(range(len(places))), [True] * len(places)
    else:
        _, order, target = merge_choices(others, skip.skipped)
        merged = order.shape[1] - skip.skipped
        into = [*target[0].tolist(), *range(skip.skipped)]
        of_part = dict(zip(order[0].tolist(), into, strict=True))
        stays = set(order[0, merged:].tolist())
        tokens += [skip.retained + of_part[part] for part in range(others.shape[1])]
        keeps += [part in stays for part in range(others.shape[1])]
    block = torch.cat([kept, merge_tokens(others, skip.skipped)], dim=1)
    return ImageParts(places, tokens, keeps, skip.retained, _summary_weights(model, block))


def _kept_parts(places: list[Place], tokens: Tensor, rows: Tensor) -> ImageParts:
    """Which visual tokens of an image [crops, P, D] are among the rows [1, T, D] that enter the language model."""
    every, entering = tokens.flatten(0, 1).float(), rows[0].float()
    nearest = torch.cdist(every, entering, compute_mode="donot_use_mm_for_euclid_dist").amin(dim=1)
    is_kept = (nearest <= SAME * every.norm(dim=1)).tolist()
    order = sorted(range(len(places)), key=lambda part: not is_kept[part])
    count = sum(is_kept)
    own = [*range(count), *[-1] * (len(places) - count)]
    return ImageParts([places[part] for part in order], own, [part >= 0 for part in own], count, [])


def _summary_weights(model: LlavaSkipModel, tokens: Tensor) -> list[list[float]]:
    """What each summary weighs of the R + S tokens [1, R + S, D]."""
    skip, layer = model.config.skip_config, model.summary
    if skip is None or layer is None or layer.vectors is not None:
        return []
    found = []
    for first, end in skip.spans:
        weights = torch.zeros(tokens.shape[1])
        weights[first:end] = layer.weights(tokens[:, first:end])[0, :, 0].float().cpu()
        found.append(weights.tolist())
    return found


# ------------------------------------------------------------------------------------------------------------- drawing


@dataclass(frozen=True)
class Panel:
    """A drawing of what becomes of an image's parts.

    Attributes:
        kind: `image` (dense), `kept` (a rival method), `retained`, `merged`, or `summary1`, `summary2`, ...
        caption: a line for people.
        picture: the drawing, over the image as the tower sees it.
    """

    kind: str
    caption: str
    picture: Image.Image


def draw_panels(crops: Tensor, parts: ImageParts, image_processor: Any) -> list[Panel]:
    """Everything that is drawn of an image.

    Args:
        crops: [crops, 3, side, side] of the image.
        parts: what becomes of its parts.
        image_processor: whose mean and scale the crops have.
    """
    image, scale = crops_image(crops, image_processor)
    place = image, scale, crops.shape[-1], parts
    total, tokens = len(parts.places), max(parts.tokens) + 1
    if parts.retained == total:
        return [Panel("image", f"all {total} visual tokens enter the language model", image)]
    if -1 in parts.tokens:
        caption = f"framed: {parts.retained} of {total} visual tokens stay as they are"
        return [Panel("kept", caption, draw_retained(*place))]
    panels = [Panel("retained", f"retained, framed: {parts.retained} of {total} visual tokens", draw_retained(*place))]
    if tokens < total:
        caption = f"merged: the others become {tokens - parts.retained}, one colour each; white frame: kept"
        panels.append(Panel("merged", caption, draw_merges(*place)))
    for number, weights in enumerate(parts.summaries):
        about = f"of {sum(map(bool, weights))} tokens, the more it weighs the redder; the largest share is"
        caption = f"summary {number + 1}, {about} {max(weights):.1%}"
        panels.append(Panel(f"summary{number + 1}", caption, draw_heat(*place, number)))
    return panels


def crops_image(crops: Tensor, image_processor: Any) -> tuple[Image.Image, int]:
    """The crops [crops, 3, side, side] of an image side by side as the tower sees them; pixels for each of theirs."""
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (image_processor.image_mean, image_processor.image_std)
    )
    pixels = crops.float().cpu() * std + mean
    pixels = (pixels.clamp(0, 1) * 255).round().byte().permute(2, 0, 3, 1).flatten(1, 2)
    scale = max(1, -(-SHOWN_SIDE // crops.shape[-1]))
    size = (pixels.shape[1] * scale, pixels.shape[0] * scale)
    return Image.fromarray(pixels.numpy()).resize(size, Image.Resampling.NEAREST), scale


def draw_retained(image: Image.Image, scale: int, side: int, parts: ImageParts) -> Image.Image:
    """What is not retained is dimmed, and what is retained outlined.

    Args:
        image: of `crops_image`, with its `scale`.
        scale: pixels for each of the crops'.
        side: of a crop, in its own pixels.
        parts: what becomes of the parts.
    """
    dimmed = Image.blend(image, Image.new("RGB", image.size), 0.65)
    boxes = [place_box(place, scale, side) for place in parts.places[: parts.retained]]
    for box in boxes:
        dimmed.paste(image.crop(box), box[:2])
    pen = ImageDraw.Draw(dimmed)
    for x, y, right, bottom in boxes:
        pen.rectangle((x, y, right - 1, bottom - 1), outline=OUTLINE, width=1)
    return dimmed


def draw_merges(image: Image.Image, scale: int, side: int, parts: ImageParts) -> Image.Image:
    """Every part that is not retained in the colour of its token; a white frame is around the part that keeps it.

    Arguments as those of `draw_retained`.
    """
    colours = [_colour(token) for token in range(max(parts.tokens) + 1)]
    shown = range(parts.retained, len(parts.places))
    boxes = [place_box(parts.places[part], scale, side) for part in shown]
    drawn = _tinted(image, boxes, [colours[parts.tokens[part]] for part in shown], [0.6] * len(boxes))
    pen = ImageDraw.Draw(drawn)
    for part, (x, y, right, bottom) in zip(shown, boxes, strict=True):
        if parts.keeps[part]:
            pen.rectangle((x, y, right - 1, bottom - 1), outline=(255, 255, 255), width=max(1, scale // 4))
    return drawn


def draw_heat(image: Image.Image, scale: int, side: int, parts: ImageParts, summary: int) -> Image.Image:
    """What a summary weighs, the largest share in full red, over the image in gray.

    Where several parts share a box (chain of sight's scales), the latest one is seen. Arguments as those of
    `draw_retained`, and the number of the summary.
    """
    heat = parts.heat(summary)
    most = max(heat) or 1.0
    chosen = [part for part, share in enumerate(heat) if share > 0]
    boxes = [place_box(parts.places[part], scale, side) for part in chosen]
    gray = image.convert("L").convert("RGB")
    return _tinted(gray, boxes, [_HEAT] * len(boxes), [0.85 * heat[part] / most for part in chosen])


def place_box(place: Place, scale: int, side: int) -> tuple[int, int, int, int]:
    """A place as a box of the image of `crops_image`; arguments as those of `draw_retained`."""
    left, top, right, bottom = (value * scale for value in place.box)
    offset = place.crop * side * scale
    return left + offset, top, right + offset, bottom


def _colour(number: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(number * _GOLDEN % 1, 0.75, (1.0, 0.75)[number % 2])
    return round(255 * red), round(255 * green), round(255 * blue)


def _tinted(
    image: Image.Image,
    boxes: Sequence[tuple[int, int, int, int]],
    colours: Sequence[tuple[int, int, int]],
    strengths: Sequence[float],
) -> Image.Image:
    """The image with each box mixed with a colour, from 0 (none of it) to 1."""
    tint, mask = image.copy(), Image.new("L", image.size)
    for box, colour, strength in zip(boxes, colours, strengths, strict=True):
        tint.paste(colour, box)
        mask.paste(round(255 * strength), box)
    return Image.composite(tint, image, mask)
