"""Extends a pretrained resampler: `llava-skip extend PROJECTOR RULE OUTPUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from safetensors.torch import save_file

from llava_skip.checkpoints.extension import EXTENSIONS, extend_resampler
from llava_skip.checkpoints.files import read_tensors
from llava_skip_base.console import print_next, print_text, program
from llava_skip_base.errors import UserError


def extend(
    projector: Annotated[
        Path, typer.Argument(help="File with the weights of an 80-query resampler (.bin, .safetensors).")
    ],
    rule: Annotated[str, typer.Argument(help="One of " + ", ".join(EXTENSIONS))],
    output: Annotated[Path, typer.Argument(help="The safetensors file to write.")],
) -> None:
    """Extend the resampler of the paper's code to more scales, queries and features, under its own names."""
    if rule not in EXTENSIONS:
        raise UserError(f"Unknown rule {rule!r}; known: {', '.join(EXTENSIONS)}.")
    weights = read_tensors(projector.expanduser())
    query = next((name for name in weights if "cls_token_" in name), None)
    if query is None:
        raise UserError(f"{projector} holds no resampler: none of its {len(weights)} tensors is a cls_token_w*_q*.")
    extended = extend_resampler(weights, EXTENSIONS[rule], query[: query.index("cls_token_")])
    file = output.expanduser()
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in extended.items()}, file)
    scales = ", ".join(f"windows of {w} with {q} queries" for _, w, q in EXTENSIONS[rule].scales())
    print_text(f"{len(weights)} tensors -> {len(extended)}: {scales}; written to {output}")
    print_next(f"llava-skip train --projector {output} with a preset of the extended resampler")


def main() -> None:
    """Extend a resampler from the command line."""
    program(extend)


if __name__ == "__main__":
    main()
