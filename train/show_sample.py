"""Show a sample as training sees it: learnt text in colour, and its pictures with the retained tokens outlined.

    python -m train.show_sample 12 --data train.json --images images --preset sv-llava-256

The number is the sample's place in the epoch, before shuffling; the other arguments are those of train.train. Patches
are outlined where the class token of the model picks them, so a new model's are chosen by chance.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from llava_skip.configuration import IGNORE_INDEX, LlavaSkipConfig
from llava_skip.errors import UserError
from llava_skip.modeling import LlavaSkipForConditionalGeneration
from llava_skip.processing import LlavaSkipProcessor
from llava_skip.vision.front_end import Box
from train.arguments import DataArguments, ModelArguments
from train.command_line import read_command_line
from train.data import ConversationDataset, load_records
from train.recipe.model import build_model, prepare

USER_ERROR = 2
LEARNT, NOT_LEARNT = "bold green", "dim"
OUTLINE = (255, 60, 60)
SHOWN_SIDE = 448
"""Pictures are drawn at least this large, in pixels."""


@dataclass
class ShowArguments:
    """Where the pictures go."""

    output: str = field(default="sample", metadata={"help": "Folder of the PNGs."})


def coloured(sample: dict, processor: LlavaSkipProcessor) -> Text:
    """The sample's text, what is learnt in colour, a picture's rows as their number."""
    text = Text()
    pairs = zip(sample["input_ids"], sample["labels"], strict=True)
    picture = processor.image_token_id
    for (learnt, is_picture), run in groupby(pairs, lambda pair: (pair[1] != IGNORE_INDEX, pair[0] == picture)):
        tokens = [token for token, _ in run]
        shown = f"[{len(tokens)} rows of pictures]" if is_picture else processor.tokenizer.decode(tokens)
        text.append(shown, style="magenta" if is_picture else LEARNT if learnt else NOT_LEARNT)
    return text


@torch.no_grad()
def retained_boxes(model: LlavaSkipForConditionalGeneration, crops: Tensor) -> tuple[list[Box], str]:
    """What of a picture is retained, as boxes in pixels of its first crop, and that in words.

    Args:
        model: whose choice is shown.
        crops: [crops, 3, side, side] of one picture; the first is the picture, or its thumbnail.
    """
    config: LlavaSkipConfig = model.config
    if config.skip is None:
        return [], f"dense: all {config.visual_tokens(len(crops))} tokens take the whole decoder"
    return model.model.front_end.retained_boxes(model.model, crops)


def draw(crops: Tensor, boxes: list[Box], processor: LlavaSkipProcessor) -> Image.Image:
    """The crops [crops, 3, side, side] of a picture side by side as the tower sees them, boxes on the first."""
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    pixels = ((crops * std + mean).clamp(0, 1) * 255).round().byte().permute(2, 0, 3, 1).flatten(1, 2)
    scale = max(1, -(-SHOWN_SIDE // crops.shape[-1]))
    size = (pixels.shape[1] * scale, pixels.shape[0] * scale)
    picture = Image.fromarray(pixels.numpy()).resize(size, Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(picture)
    for box in boxes:
        x, y, right, bottom = (place * scale for place in box)
        pen.rectangle((x, y, right - 1, bottom - 1), outline=OUTLINE, width=2)
    return picture


def show(index: int, model_arguments: ModelArguments, data: DataArguments, output: Path) -> None:
    """Print sample `index` and save its pictures.

    Raises:
        UserError: no such sample, or see the message.
    """
    records = load_records(data.data, data.images)
    if not 0 <= index < len(records):
        raise UserError(f"There is no sample {index}: the set has {len(records)}, counted from 0.")
    config, processor = prepare(model_arguments)
    sample = ConversationDataset(records, processor, data.max_length)[index]
    row = records.row(index)
    record = records.record(row)
    console = Console()
    console.rule(records.describe(row, record))
    console.print(coloured(sample, processor))
    table = Table(show_header=False)
    learnt = sum(label != IGNORE_INDEX for label in sample["labels"][1:])
    table.add_row("rows", f"{len(sample['input_ids'])}")
    table.add_row("learnt", f"{learnt}")
    table.add_row(f"cut by --max_length {data.max_length}", f"{sample['truncated']}")
    if record["images"]:
        model = build_model(model_arguments, config, torch.float32)
        pixels = torch.stack([torch.as_tensor(crop) for crop in sample["pixel_values"]])
        counts = torch.as_tensor(sample.get("crop_counts", [1] * len(pixels))).tolist()
        output.mkdir(parents=True, exist_ok=True)
        for number, crops in enumerate(pixels.split(counts)):
            boxes, words = retained_boxes(model, crops)
            path = output / f"{index}-{number}.png"
            draw(crops, boxes, processor).save(path)
            table.add_row(str(path), words)
    console.print(table)


def main() -> None:
    """Show a sample; a user's mistake is one message and exit code 2."""
    try:
        if not sys.argv[1:] or not sys.argv[1].isdecimal():
            raise UserError("Name the sample first: python -m train.show_sample 0 --data ...")
        model, data, own = read_command_line((ModelArguments, DataArguments, ShowArguments), sys.argv[2:])
        show(int(sys.argv[1]), model, data, Path(own.output))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(USER_ERROR) from None


if __name__ == "__main__":
    main()
