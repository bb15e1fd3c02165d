"""What a model did with an image, as HTML: the drawings of its parts over the image, and the counts of its tokens.

The HTML needs no script, no file and no server: its images are in it. Names and captions are escaped.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from functools import cache

from jinja2 import Environment, StrictUndefined, Template
from PIL import Image

from llava_skip.configuration import LlavaSkipConfig
from llava_skip.flops import image_rows
from llava_skip.pictures import ImageParts, draw_panels, image_parts, place_box
from llava_skip_base.texts import plain
from serve.conversation import Picture
from serve.sessions import Side

SMALL = 512 * 512
"""Pixels up to which a drawing is kept exactly."""
THUMBNAIL = 320
"""Longest side of an image in the conversation, in pixels."""

_COUNTED = {"in attention": "attention", "in the FFN": "ffn", "in the cache": "cache"}
_TEMPLATE = """\
{% for image in images %}
<section class="seen">
<h3>{{ image.model }}, image {{ image.number }}: {{ image.name }}</h3>
<p>{{ image.told }}</p>
<table class="counts">
<tr><th>tokens of the image</th>{% for name, _, _ in image.counts %}<th>{{ name }}</th>{% endfor %}</tr>
<tr><td>mean of the layers</td>
{% for _, kind, count in image.counts %}<td data-count="{{ kind }}">{{ count }}</td>{% endfor %}</tr>
</table>
<div class="panels">
{% for panel in image.panels %}
<figure data-panel="{{ panel.kind }}" style="flex-basis: {{ 15 * panel.wide }}rem">\
<div class="drawn"><img src="{{ panel.source }}" alt="{{ panel.caption }}">
<svg viewBox="0 0 {{ panel.width }} {{ panel.height }}">
{% for group in (image.groups | reverse if panel.kind in ("retained", "summary1") else image.groups) %}
<g><title>{{ group.about }}</title>{% for x, y, width, height in group.boxes %}\
<rect x="{{ x }}" y="{{ y }}" width="{{ width }}" height="{{ height }}"/>{% endfor %}</g>
{% endfor %}
</svg></div><figcaption>{{ panel.caption }}</figcaption></figure>
{% endfor %}
</div>
</section>
{% endfor %}
"""


@dataclass(frozen=True)
class Counts:
    """Tokens of an image in the language model, the means of its layers."""

    attention: float
    ffn: float
    cache: float


def counts_of(config: LlavaSkipConfig, crops: int) -> Counts:
    """Those of an image with so many crops, as `llava-skip costs` counts them."""
    layers = image_rows(config, crops)
    queries, ffn, kept = (sum(getattr(rows, name) for rows in layers) for name in ("queries", "ffn", "cache"))
    return Counts(queries / len(layers), ffn / len(layers), kept / len(layers))


def overlay(side: Side) -> str:
    """What the side's model did with the images of the last question that had some, as HTML; "" without any."""
    turns = [turn for turn in side.conversation.turns if turn.pictures]
    if not turns:
        return ""
    before = sum(len(turn.pictures) for turn in turns[:-1])
    seen = [_seen(side, picture, before + number) for number, picture in enumerate(turns[-1].pictures, start=1)]
    return _template().render(images=seen)


def _seen(side: Side, picture: Picture, number: int) -> dict[str, object]:
    """What the template shows of an image."""
    loaded = side.model.loaded
    crops = side.answerer.processed(picture)["pixel_values"]
    with side.model.lock:
        parts = image_parts(loaded.model.model, crops.to(loaded.model.device, loaded.model.dtype))
    counts = counts_of(loaded.model.config, len(crops))
    panels = draw_panels(crops, parts, loaded.processor.image_processor)
    return {
        "model": plain(side.model.name),
        "number": number,
        "name": plain(picture.name),
        "told": told(parts, getattr(loaded.model.config.reduction_config, "method", None)),
        "counts": [(name, kind, f"{getattr(counts, kind):,.10g}") for name, kind in _COUNTED.items()],
        "groups": _groups(parts, panels[0].picture.height // crops.shape[-1], crops.shape[-1]),
        "panels": [
            {
                "kind": p.kind,
                "caption": p.caption,
                "source": data_uri(p.picture),
                "width": p.picture.width,
                "height": p.picture.height,
                "wide": max(1, round(p.picture.width / p.picture.height / 2, 1)),
            }
            for p in panels
        ],
    }


def told(parts: ImageParts, method: str | None = None) -> str:
    """What becomes of an image's parts, in words; `method` is the reduction of the model."""
    total, tokens = len(parts.places), max(parts.tokens) + 1
    if parts.retained == total and method is not None:
        return f"{total:,} visual tokens enter the language model; {method} drops some between its layers."
    if parts.retained == total:
        return f"{total:,} visual tokens, all of them retained."
    if -1 in parts.tokens:
        return f"{total:,} visual tokens: {parts.retained:,} enter the language model as they are."
    others, skipped = total - parts.retained, tokens - parts.retained
    become = f"are merged into {skipped:,} skipped ones" if skipped < others else "are skipped, none of them merged"
    added = f"; summaries: {len(parts.summaries)}" if parts.summaries else ""
    return f"{total:,} visual tokens: {parts.retained:,} are retained, the other {others:,} {become}{added}."


def _groups(parts: ImageParts, scale: int, side: int) -> list[dict[str, object]]:
    """For each token its boxes on the drawings, and what is known of it: shown where the pointer is."""
    boxes: dict[int, list[tuple[int, int, int, int]]] = {}
    for place, token in zip(parts.places, parts.tokens, strict=True):
        left, top, right, bottom = place_box(place, scale, side)
        boxes.setdefault(token, []).append((left, top, right - left, bottom - top))
    return [{"about": _about(parts, token, len(own)), "boxes": own} for token, own in boxes.items()]


def _about(parts: ImageParts, token: int, merged: int) -> str:
    if token < 0:
        return "not kept as it is"
    found = ["retained" if token < parts.retained else "skipped", *([f"{merged} merged"] if merged > 1 else [])]
    shares = [(number, weights[token]) for number, weights in enumerate(parts.summaries, start=1)]
    return ", ".join([*found, *(f"{share:.1%} of summary {number}" for number, share in shares if share)])


def data_uri(image: Image.Image) -> str:
    """An image as an address that holds it."""
    return f"data:image/webp;base64,{base64.b64encode(webp(image)).decode()}"


def webp(image: Image.Image) -> bytes:
    """An image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=90, lossless=image.width * image.height <= SMALL)
    return buffer.getvalue()


def thumbnail(picture: Picture) -> bytes:
    """A small copy of an image, in a format that every browser shows, whatever its own format is."""
    small = picture.pixels.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return webp(small)


@cache
def _template() -> Template:
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(_TEMPLATE)
