"""Command line that converts a checkpoint of any known layout: `llava-skip convert SOURCE OUTPUT`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer

from llava_skip.checkpoints import export_llava_hf, find_folder, has_tokenizer, load_checkpoint, load_tokenizer
from llava_skip.checkpoints.front_end import with_new_front_end
from llava_skip.ends import learn_ends
from llava_skip.model_card import CardFacts, write_card
from llava_skip.modeling import LlavaSkipForConditionalGeneration
from llava_skip.presets import preset_config
from llava_skip.processing import LlavaSkipProcessor
from llava_skip.reduction import ReductionConfig
from llava_skip_base.console import hide_bars_in_files, print_next, print_text, program
from llava_skip_base.errors import UserError


class Target(str, Enum):
    """Layouts that are written."""

    native = "native"
    llava_hf = "llava-hf"


class Precision(str, Enum):
    """Types of the weights that are written."""

    same = "same"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The torch type; None keeps the type that the weights have."""
        return None if self is Precision.same else getattr(torch, self.value)


def new_folder(output: Path) -> Path:
    """The folder to write to, with `~` expanded.

    Raises:
        UserError: there is something in it.
    """
    folder = output.expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{output} is not empty: name a new folder.")
    return folder


def _check_new_projector(size: str | None, preset: str | None, rival: ReductionConfig | None) -> None:
    if size is None:
        return
    if preset is None or rival is not None:
        raise UserError("--new-projector goes with --preset, which says which front end, and without --reduction.")
    preset_config(preset, size)  # both are known


def _write(
    model: LlavaSkipForConditionalGeneration, source: str, output: Path, template: str | None, to: Target
) -> bool:
    """Write the model, and its processor if the source has a tokenizer; whether it has."""
    processor = None
    if has_tokenizer(folder := find_folder(source)):
        tokenizer = load_tokenizer(folder, model.config.text_config, add_image_token=True)
        processor = LlavaSkipProcessor.for_config(model.config, tokenizer, template)
        learn_ends(model, processor)
    if to is Target.llava_hf:
        export_llava_hf(model, output, processor)
        return processor is not None
    model.save_pretrained(output)
    if processor is not None:
        processor.save_pretrained(output)
    return processor is not None


def _note(model: LlavaSkipForConditionalGeneration) -> str:
    """What a user must know of a model that lacks trained parts."""
    report = getattr(model, "load_report", None)  # a model with another front end has none
    read = ("model.summary.", "model.multi_modal_projector.")  # not the tower's layers after the features
    is_new = report is None or any(name.startswith(read) for name in report.fresh)
    return "Parts of it are newly initialised: train it before it is used." if is_new else ""


def convert(
    source: Annotated[str, typer.Argument(help="Checkpoint folder or hub name, of any layout.")],
    output: Annotated[Path, typer.Argument(help="Folder to write; it must be empty or not exist.")],
    preset: Annotated[str | None, typer.Option(help="Preset of the model that is written.")] = None,
    vision_tower: Annotated[str | None, typer.Option(help="Folder or hub name of the CLIP tower.")] = None,
    lora: Annotated[str | None, typer.Option(help="Folder of a LoRA adapter to merge.")] = None,
    projector: Annotated[str | None, typer.Option(help="A mm_projector.bin, or its folder.")] = None,
    to: Annotated[Target, typer.Option(help="Layout to write.")] = Target.native,
    reduction: Annotated[
        str | None, typer.Option(help="Rival method instead of skipping: METHOD:TOKENS[,NAME=VALUE...].")
    ] = None,
    dtype: Annotated[Precision, typer.Option(help="Type of the weights that are written.")] = Precision.same,
    new_projector: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Give the model the preset's front end, with a projector that has to be trained; tower and language "
            "model stay. SIZE, such as tiny, has the front end's numbers.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the weights that --new-projector makes.")] = 0,
    template: Annotated[str | None, typer.Option(help="Conversation template of the processor.")] = None,
    language_model_type: Annotated[
        str | None, typer.Option(help="What the language model is, such as llama, where config.json does not say it.")
    ] = None,
) -> None:
    """Read a checkpoint of any known layout, say what did not fit, and write it (see docs/checkpoints.md)."""
    output = new_folder(output)
    rival = None if reduction is None else ReductionConfig.parse(reduction)
    _check_new_projector(new_projector, preset, rival)
    hide_bars_in_files()
    model = load_checkpoint(
        source,
        None if new_projector else preset,
        dtype.torch_dtype,
        vision_tower=vision_tower,
        projector=projector,
        lora=lora,
        language_model_type=language_model_type,
        reduction=rival,
        log=False,
    )
    print_text(model.load_report)
    if new_projector:
        model = with_new_front_end(model, str(preset), new_projector, seed)
        print_text("The projector is new: train the model before it is used.")
    if not _write(model, source, output, template, to):
        print_text(f"{source} has no tokenizer: no processor is written.")
    if to is Target.native:
        parts = {"checkpoint": source, "vision tower": vision_tower, "LoRA adapter": lora, "projector": projector}
        write_card(output, model.config, CardFacts(parts, parameters=model.num_parameters(), note=_note(model)))
    print_text(f"written to {output}")
    train = f"llava-skip train --recipe finetune --model {output}"
    print_next(train if new_projector else f"llava-skip eval --model {output}, or {train}")


def main() -> None:
    """Convert a checkpoint from the command line."""
    program(convert)


if __name__ == "__main__":
    main()
