"""Merge a trained LoRA adapter into its model: `llava-skip merge-lora ADAPTER --output DIR`."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import PeftModel
from transformers import AutoConfig, set_seed

from llava_skip.checkpoints.files import check_tensors, is_adapter
from llava_skip.checkpoints.processor import load_processor
from llava_skip.convert import Precision, new_folder
from llava_skip.ends import learn_ends
from llava_skip.model_card import write_card
from llava_skip_base.console import hide_bars_in_files, print_next, print_text, program
from llava_skip_base.errors import MissingFileError
from llava_skip_base.files import read_json
from train.arguments import ModelArguments
from train.recipe.model import build_model, check_weights
from train.reporting.card import run_facts
from train.resilience.run_folder import RESULT


def load_base(adapter: Path, base: str | None, dtype: torch.dtype | None) -> Any:
    """The model that an adapter was trained on, from the sources that its `run.json` names, without quantisation.

    Args:
        adapter: the folder of a run with LoRA, or of one of its checkpoints.
        base: where the run's `--model` is now, if it was moved.
        dtype: of the weights; None takes the run's.

    Raises:
        MissingFileError: the folder holds no adapter, no `run.json`, or names a model that is not there.
    """
    if not is_adapter(adapter) or not (adapter / "run.json").is_file():
        raise MissingFileError(
            f"{adapter} must hold adapter_config.json and run.json: name the folder of a run with --lora_enable."
        )
    run = read_json(adapter / "run.json")
    known = {field.name for field in fields(ModelArguments)}
    arguments = ModelArguments(**{name: value for name, value in run["model"].items() if name in known})
    arguments = replace(arguments, model=base or arguments.model, bits=16)
    training = run["training"]
    trained = torch.bfloat16 if training["bf16"] else torch.float16 if training["fp16"] else torch.float32
    set_seed(training["seed"])  # what a join initialises is the same again
    config = AutoConfig.from_pretrained(adapter, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    check_weights(arguments, config)  # --base may name another model
    return build_model(arguments, config, dtype or trained)


def merge(
    adapter: Annotated[Path, typer.Argument(help="Folder of a run with LoRA, or of one of its checkpoints.")],
    output: Annotated[Path, typer.Option(help="Folder to write; it must be empty or not exist.")],
    base: Annotated[str | None, typer.Option(help="Where the run's --model is now, if it was moved.")] = None,
    dtype: Annotated[Precision, typer.Option(help="Type of the weights that are written.")] = Precision.same,
) -> None:
    """Write the whole model, with the adapter merged into it, and its processor."""
    folder = new_folder(output)
    adapter = adapter.expanduser()
    for file in adapter.glob("adapter_model.*"):
        check_tensors(file)
    hide_bars_in_files()
    model = PeftModel.from_pretrained(load_base(adapter, base, dtype.torch_dtype), adapter).merge_and_unload()
    processor = load_processor(adapter)
    learn_ends(model, processor)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    result = read_json(adapter / RESULT) if (adapter / RESULT).is_file() else {}  # a checkpoint has none
    resolved = read_json(adapter / "run.json")
    resolved["model"] |= {"model": base} if base else {}
    facts = run_facts(resolved, result)
    write_card(folder, model.config, replace(facts, parameters=model.num_parameters()))  # the adapter's are in no count
    print_text(f"written to {output}")
    print_next(f"llava-skip eval --model {output}")


def main() -> None:
    """Merge an adapter from the command line."""
    program(merge)


if __name__ == "__main__":
    main()
