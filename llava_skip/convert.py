"""Command line that converts a checkpoint of any known layout: `python -m llava_skip.convert SOURCE OUTPUT`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer

from llava_skip.checkpoints import export_llava_hf, find_folder, load_checkpoint, load_tokenizer
from llava_skip.errors import UserError
from llava_skip.processing import LlavaSkipProcessor


class Target(str, Enum):
    """Layouts that are written."""

    native = "native"
    llava_hf = "llava-hf"


class Precision(str, Enum):
    """Types that weights are written in."""

    same = "same"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def convert(
    source: Annotated[str, typer.Argument(help="Checkpoint folder or hub name, of any layout.")],
    output: Annotated[Path, typer.Argument(help="Folder to write; it must be empty or not exist.")],
    preset: Annotated[str | None, typer.Option(help="Preset that the model is to skip by.")] = None,
    vision_tower: Annotated[str | None, typer.Option(help="Folder or hub name of the CLIP tower.")] = None,
    lora: Annotated[str | None, typer.Option(help="Folder of a LoRA adapter to merge.")] = None,
    projector: Annotated[str | None, typer.Option(help="A mm_projector.bin, or its folder.")] = None,
    to: Annotated[Target, typer.Option(help="Layout to write.")] = Target.native,
    dtype: Annotated[Precision, typer.Option(help="Type of the weights that are written.")] = Precision.same,
    template: Annotated[str | None, typer.Option(help="Conversation template of the processor.")] = None,
) -> None:
    """Read a checkpoint of any known layout, say what did not fit, and write it (see docs/checkpoints.md)."""
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise UserError(f"{output} is not empty: name a new folder.")
        chosen = None if dtype is Precision.same else getattr(torch, dtype.value)
        model = load_checkpoint(
            source, preset, chosen, vision_tower=vision_tower, projector=projector, lora=lora, log=False
        )
        typer.echo(str(model.load_report))
        tokenizer = load_tokenizer(find_folder(source), model.config.text_config)
        processor = None if tokenizer is None else LlavaSkipProcessor.for_config(model.config, tokenizer, template)
        if to is Target.llava_hf:
            export_llava_hf(model, output, processor)
        else:
            model.save_pretrained(output)
            if processor is not None:
                processor.save_pretrained(output)
    except (ValueError, FileNotFoundError, ImportError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    if processor is None:
        typer.echo(f"{source} has no tokenizer: no processor is written.")
    typer.echo(f"written to {output}")


if __name__ == "__main__":
    typer.run(convert)
