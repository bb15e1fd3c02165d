"""The model of an analysis: a checkpoint of any layout, with its processor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from eval.answering.models import SavedModel, check_model
from eval.answering.templates import check_template
from llava_skip.checkpoints import find_folder, load_checkpoint, load_tokenizer
from llava_skip.checkpoints.processor import load_processor
from llava_skip.modeling import LlavaSkipForConditionalGeneration
from llava_skip.processing import LlavaSkipProcessor
from llava_skip_base.console import hide_bars_in_files
from llava_skip_base.errors import UserError

if TYPE_CHECKING:
    from eval.answering.generate import Numerics

NATIVE = "native"


@dataclass
class Analysed:
    """A loaded model.

    Attributes:
        saved: its folder and files.
        layout: of its checkpoint.
        model: on the device, in evaluation mode.
        processor: of the model, with a chat template.
    """

    saved: SavedModel
    layout: str
    model: LlavaSkipForConditionalGeneration
    processor: Any

    def describe(self) -> dict[str, Any]:
        """Which model it is, for the result file."""
        config, skip = self.model.config, self.model.config.skip_config
        return {
            **self.saved.describe(),
            "layout": self.layout,
            "preset": config.preset,
            "front_end": config.front_end,
            "skip": None if skip is None else skip.to_dict(),
            "reduction": None if config.reduction_config is None else str(config.reduction_config),
            "language_model": config.text_config.model_type,
            "layers": config.text_config.num_hidden_layers,
            "width": config.text_config.hidden_size,
        }


def load_analysed(
    source: str,
    numerics: Numerics,
    preset: str | None = None,
    vision_tower: str | None = None,
    template: str | None = None,
) -> Analysed:
    """Load a checkpoint of any layout (docs/checkpoints.md) with its processor.

    Args:
        source: folder or hub name.
        numerics: device, number format and attention.
        preset: of the model that is analysed, where the checkpoint does not say it, or another one than its own.
        vision_tower: folder or hub name of the CLIP tower, if it is not where the checkpoint says.
        template: name of a conversation template, instead of the checkpoint's own.

    Raises:
        UserError: it is no whole model, or has no chat template.
    """
    folder = find_folder(source)
    saved = check_model(folder)
    hide_bars_in_files()
    model = load_checkpoint(
        source, preset, getattr(torch, numerics.dtype), vision_tower=vision_tower, attn_implementation=numerics.attn
    )
    layout = model.load_report.layout
    if layout == NATIVE and template is None and preset is None:
        processor = load_processor(folder)
    else:
        tokenizer = load_tokenizer(folder, model.config.text_config, add_image_token=True)
        processor = LlavaSkipProcessor.for_config(model.config, tokenizer, template)
    if not processor.chat_template:
        raise UserError(f"{source} has no chat template: name the one that it was trained with, --template NAME.")
    check_template(folder, processor, takes_images=True)
    return Analysed(saved, layout, model.to(numerics.device).eval(), processor)


def check_layers(saved: SavedModel) -> None:
    """Refuse a rival method that changes between the layers which tokens there are.

    Raises:
        UserError: the model has one.
    """
    reduction = None if saved.configuration is None else saved.configuration.reduction_config
    if reduction is not None and reduction.rule.in_decoder:
        raise UserError(
            f"{saved.folder} has the reduction {reduction}, which acts between the decoder's layers: the analysis "
            "follows the same tokens through all of them. Analyse the model without it; as --compare it can stay."
        )
