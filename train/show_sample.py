"""Show a sample as training sees it: supervised text in colour, and its images with the retained patches outlined.

    python -m train.show_sample 12 --data train.json --images images --preset sv-llava-256

The number is the sample's index in the epoch, before shuffling; the other arguments are those of train.train. If the
class token of the model chooses the patches, those of a new model are random.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from rich.text import Text
from torch import Tensor

from llava_skip.configuration import IGNORE_INDEX, LlavaSkipConfig
from llava_skip.modeling import LlavaSkipForConditionalGeneration
from llava_skip.pictures import OUTLINE, crops_image
from llava_skip.processing import LlavaSkipProcessor
from llava_skip.vision.front_end import Box
from llava_skip_base.console import make_table, one_message, output_console, print_text
from llava_skip_base.errors import UserError
from llava_skip_base.paths import shown
from llava_skip_base.texts import plain
from train.arguments import DataArguments, ModelArguments
from train.command_line import read_command_line
from train.data import ConversationDataset, load_records
from train.recipe.model import build_model, prepare

SUPERVISED, NOT_SUPERVISED, IMAGE = "bold green", "dim", "magenta"
"""Styles of the text."""


@dataclass
class ShowArguments:
    """Where the images go."""

    output: str = field(default="sample", metadata={"help": "Folder of the PNGs."})


def coloured(sample: dict, processor: LlavaSkipProcessor) -> Text:
    """The sample's text, in colour where it is supervised; image tokens as their number."""
    text = Text()
    pairs = zip(sample["input_ids"], sample["labels"], strict=True)
    image = processor.image_token_id
    for (supervised, is_image), run in groupby(pairs, lambda pair: (pair[1] != IGNORE_INDEX, pair[0] == image)):
        tokens = [token for token, _ in run]
        words = f"[{len(tokens)} image tokens]" if is_image else processor.tokenizer.decode(tokens)
        text.append(plain(words), style=IMAGE if is_image else SUPERVISED if supervised else NOT_SUPERVISED)
    return text


@torch.no_grad()
def retained_boxes(model: LlavaSkipForConditionalGeneration, crops: Tensor) -> tuple[list[Box], str]:
    """What of an image is retained, as boxes in pixels of its first crop, and in words.

    Args:
        model: whose choice is shown.
        crops: [crops, 3, side, side] of one image; the first is the image, or its thumbnail.
    """
    config: LlavaSkipConfig = model.config
    if config.reduction is not None:
        return [], f"{config.reduction_config}: {config.image_length(len(crops))} tokens enter the language model"
    if config.skip is None:
        return [], f"dense: all {config.visual_tokens(len(crops))} tokens take the whole decoder"
    return model.model.front_end.retained_boxes(model.model, crops)


def draw(crops: Tensor, boxes: list[Box], processor: LlavaSkipProcessor) -> Image.Image:
    """The crops [crops, 3, side, side] of an image side by side as the tower sees them, boxes on the first."""
    drawn, scale = crops_image(crops, processor.image_processor)
    pen = ImageDraw.Draw(drawn)
    for box in boxes:
        x, y, right, bottom = (side * scale for side in box)
        pen.rectangle((x, y, right - 1, bottom - 1), outline=OUTLINE, width=2)
    return drawn


def show(index: int, model_arguments: ModelArguments, data: DataArguments, output: Path) -> None:
    """Print sample `index` and save its images.

    Raises:
        UserError: no such sample, or see the message.
    """
    records = load_records(data.data, data.images)
    if not 0 <= index < len(records):
        raise UserError(f"There is no sample {index}: the set has {len(records)}, counted from 0.")
    config, processor = prepare(model_arguments)
    sample = ConversationDataset(records, processor, data.max_length)[index]
    rows: list[tuple[Any, Any]] = [
        ("tokens", len(sample["input_ids"])),
        ("supervised", sum(label != IGNORE_INDEX for label in sample["labels"][1:])),
        (f"cut by --max_length {data.max_length}", sample["truncated"]),
    ]
    drawn = []
    if "pixel_values" in sample:
        model = build_model(model_arguments, config, torch.float32)
        pixels = torch.stack([torch.as_tensor(crop) for crop in sample["pixel_values"]])
        counts = torch.as_tensor(sample.get("crop_counts", [1] * len(pixels))).tolist()
        output.mkdir(parents=True, exist_ok=True)
        for number, crops in enumerate(pixels.split(counts)):
            boxes, words = retained_boxes(model, crops)
            drawn.append(output / f"{index}-{number}.png")
            draw(crops, boxes, processor).save(drawn[-1])
            rows.append((drawn[-1], words))
    console = output_console()
    console.rule(Text(plain(sample["record_id"])))
    console.print(coloured(sample, processor))
    console.print(make_table(None, ("", ""), rows))
    if drawn:
        print_text(f"Open {shown(drawn[0])} to see the image as the model does.")
    else:
        print_text("llava-skip train with the same arguments trains on it.")


def main() -> None:
    """Show a sample; a user's mistake is one message and exit code 2."""
    with one_message():
        if sys.argv[1:2] in (["--help"], ["-h"]):
            read_command_line((ModelArguments, DataArguments, ShowArguments), sys.argv[1:])
        if not sys.argv[1:] or not sys.argv[1].isdecimal():
            raise UserError("Name the sample first: llava-skip show-sample 0 --data ...")
        model, data, own = read_command_line((ModelArguments, DataArguments, ShowArguments), sys.argv[2:])
        show(int(sys.argv[1]), model, data, Path(own.output).expanduser())


if __name__ == "__main__":
    main()
