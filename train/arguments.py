"""Arguments of a training run: three dataclasses, read from the command line by transformers' HfArgumentParser."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import TrainingArguments

from llava_skip.presets import PRESETS, SIZES
from llava_skip.processing import template_names

PARTS = ("vision_tower", "multi_modal_projector", "summary", "language_model")
"""Parts of the model that can be trained or frozen; the head belongs to the language model."""


@dataclass
class ModelArguments:
    """Which model is trained, and which parts of it."""

    model: str | None = field(
        default=None,
        metadata={"help": "A saved llava_skip model, or a plain language model together with --vision_tower (folder or "
                          "hub name). Without it a new model of --size is made."},
    )  # fmt: skip
    vision_tower: str | None = field(
        default=None, metadata={"help": "CLIP vision tower (folder or hub name) for a plain language model."}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Tokenizer of a new model (folder or hub name); default: that of --model."}
    )
    preset: str | None = field(
        default=None,
        metadata={"help": f"One of {', '.join(PRESETS)}. Default: what a saved model has, sv-llava-256 for a new one."},
    )
    size: str = field(default="tiny", metadata={"help": f"Size of a new model: {', '.join(SIZES)}."})
    template: str | None = field(
        default=None,
        metadata={"help": f"Conversation template: {', '.join(template_names())}; default: the tokenizer's own."},
    )
    train_parts: list[str] | None = field(
        default=None,
        metadata={"help": f"Parts that learn, of {', '.join(PARTS)}. Default: all for a new model, all but "
                          "vision_tower for a loaded one."},
    )  # fmt: skip
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "eager, sdpa, flash_attention_2 or flex_attention; default: transformers' choice."},
    )

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.train_parts or ()) - set(PARTS)):
            raise ValueError(f"--train_parts has the unknown parts {unknown}; known: {', '.join(PARTS)}.")
        if self.vision_tower and not self.model:
            raise ValueError("--vision_tower needs --model, the language model that it is joined to.")


@dataclass
class DataArguments:
    """What is learnt from."""

    data: str = field(default="", metadata={"help": "LLaVA conversation JSON (a list of records)."})
    images: str = field(default="", metadata={"help": "Folder that the image paths of the records start from."})
    max_length: int = field(
        default=2048, metadata={"help": "Rows of a sample, pictures included; longer ones lose their tail (counted)."}
    )

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("--data is missing: give a LLaVA conversation JSON.")
        if self.max_length < 1:
            raise ValueError(f"--max_length is {self.max_length}; it must be at least 1.")


@dataclass
class RunArguments(TrainingArguments):
    """transformers' TrainingArguments with LLaVA's defaults, and what to do with an output folder that is in use."""

    per_device_train_batch_size: int = field(default=16, metadata={"help": "Samples of one process in one step."})
    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Shape of the learning rate."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up in steps, or as a ratio below 1."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two points of the loss curve."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints that are kept."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off: the collator reads all."})
    report_to: str = field(default="none", metadata={"help": "none, wandb, tensorboard, ..."})
    overwrite: bool = field(default=False, metadata={"help": "Delete what the output folder holds before the run."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.remove_unused_columns:
            raise ValueError("--remove_unused_columns must stay off: records are encoded as they are read.")


# What may change between a run and its continuation without making it another run.
_NOT_IDENTITY = (
    "output_dir", "overwrite", "logging_steps", "save_steps", "save_strategy", "save_total_limit", "report_to",
    "dataloader_num_workers", "disable_tqdm", "run_name", "local_rank", "deepspeed",
)  # fmt: skip


def resolved(model: ModelArguments, data: DataArguments, run: RunArguments) -> dict[str, Any]:
    """Every argument of the run as plain data, to be saved beside its results."""
    return {"model": asdict(model), "data": asdict(data), "training": run.to_dict()}


def identity(arguments: dict[str, Any]) -> dict[str, Any]:
    """The part of the resolved arguments that makes two runs the same run."""
    training = {k: v for k, v in arguments["training"].items() if k not in _NOT_IDENTITY and not k.startswith("_")}
    return {"model": arguments["model"], "data": arguments["data"], "training": training}
