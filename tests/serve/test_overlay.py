"""What a model did with an image, as HTML: counts, drawings and groups, for each kind of model."""

import base64
import io
import re

import numpy
import pytest
from PIL import Image

from llava_skip import LlavaSkipForConditionalGeneration, LlavaSkipProcessor, SkipConfig
from llava_skip.pictures import OUTLINE
from llava_skip.reduction import ReductionConfig
from serve.conversation import Picture
from serve.loading import Loaded
from serve.overlay import counts_of, overlay, thumbnail
from serve.sessions import Model, Side
from tests.support.conversations import byte_tokenizer, random_image
from tests.support.small_models import small_config

HOSTILE = '<img src=x onerror="alert(1)">&.png'


def side_of(tmp_path, architecture: str, reduction: str | None = None) -> Side:
    config = small_config(None, architecture, vocab_size=400)
    config.image_token_index = 3
    if reduction is not None:
        config.reduction = ReductionConfig.parse(reduction).to_dict()
    model = LlavaSkipForConditionalGeneration(config)
    loaded = Loaded.of(tmp_path, model, LlavaSkipProcessor.for_config(config, byte_tokenizer(), "v1"))
    return Side(Model("<b>model</b>", loaded))


def seen(side: Side, *sizes: tuple[int, int]) -> str:
    """The overlay of a first question with images of these sizes, and of a second one without."""
    side.conversation.waiting = [Picture(HOSTILE, b"", random_image(*size, seed=1)) for size in sizes]
    side.conversation.ask("What is this?").answer = "So."
    side.conversation.ask("And?").answer = "So."
    return overlay(side)


def drawings(html: str) -> dict[str, Image.Image]:
    figure = r'<figure data-panel="(\w+)"[^>]*>\s*<div class="drawn"><img src="data:image/webp;base64,([^"]+)"'
    found = re.findall(figure, html)
    return {kind: Image.open(io.BytesIO(base64.b64decode(data))) for kind, data in found}


@pytest.mark.parametrize("architecture", ["llava", "sv-llava", "sv-llava-hd", "sv-cos"])
def test_every_part_of_an_image_is_drawn_and_counted(tmp_path, architecture):
    side = side_of(tmp_path, architecture)
    html, config = seen(side, (40, 20)), side.model.loaded.model.config
    skip = config.skip_config
    crops = len(side.answerer.processed(side.conversation.pictures[0])["pixel_values"])
    drawn = drawings(html)
    wide = drawn["image" if skip is None else "retained"]
    parts, panels = config.visual_tokens(crops), len(drawn)
    assert html.count("<rect") == parts * panels and f'viewBox="0 0 {wide.width} {wide.height}"' in html
    retained, tokens = (parts, parts) if skip is None else (skip.retained, skip.retained + skip.skipped)
    assert (html.count("<title>"), html.count("<title>retained")) == (tokens * panels, retained * panels)
    counts = [config.image_length(crops)] * 3 if skip is None else [skip.length, skip.num_kept, skip.num_kept]
    assert re.findall(r"data-count=\"\w+\">([\d,.]+)<", html) == [f"{count:,}" for count in counts]
    if skip is not None:
        shares = [float(share) for share in re.findall(r"([\d.]+)% of summary 1", html.split("</svg>")[0])]
        assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares))
        outlined = (abs(numpy.asarray(wide.convert("RGB"), dtype=int) - OUTLINE).max(axis=-1) < 60).sum()
        assert outlined >= 8 * skip.retained


def test_a_rival_is_drawn_without_groups_of_its_own(tmp_path):
    html = seen(side_of(tmp_path, "llava", "grid:4"), (40, 20))
    assert list(drawings(html)) == ["kept"] and "4 enter the language model as they are" in html
    assert html.count(">retained<") == 4 and "not kept as it is" in html


def test_a_method_inside_the_decoder_is_not_called_dense(tmp_path):
    page = seen(side_of(tmp_path, "llava", "fastv:9,first_layer=1"), (40, 20))
    assert "fastv drops some between its layers" in page and "dense" not in page and "all of them retained" not in page


def test_images_of_the_last_question_that_had_some_are_shown(tmp_path):
    side = side_of(tmp_path, "sv-llava")
    assert overlay(side) == ""
    seen(side, (40, 20))
    html = seen(side, (30, 30), (20, 40))
    assert re.findall(r"image (\d+):", html) == ["2", "3"]


def test_no_name_is_markup(tmp_path):
    html = seen(side_of(tmp_path, "sv-llava"), (40, 20))
    assert "<b>model" not in html and "&lt;b&gt;model" in html
    assert "<img src=x" not in html and "&lt;img src=x onerror=&#34;alert(1)&#34;&gt;&amp;.png" in html


def test_layers_that_differ_are_counted_as_their_mean(tmp_path):
    config = small_config(SkipConfig(2, 4, layers=(0,), forget_cache=False))
    counts, layers = counts_of(config, 1), config.text_config.num_hidden_layers
    assert counts.attention == counts.cache == 8 and counts.ffn == (4 + 8 * (layers - 1)) / layers


def test_a_thumbnail_is_small_and_of_a_format_that_browsers_show():
    small = Image.open(io.BytesIO(thumbnail(Picture("x.tiff", b"", Image.new("RGB", (2000, 100), "teal")))))
    assert small.format == "WEBP" and small.size == (320, 16)
