"""Arguments of a training run: three dataclasses, read by `train.command_line`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from transformers import TrainingArguments

from llava_skip.conversation import template_names
from llava_skip.presets import DEFAULT_PRESET, PRESETS, SIZES, dense_preset
from llava_skip.reduction import ReductionConfig
from llava_skip_base.errors import UserError
from train.argument_values import check_numbers, read_object, read_rates
from train.data.loading import set_workers
from train.data.parallel import default_processes
from train.recipe.parts import PART_PREFIXES
from train.recipe.recipes import set_checkpointing, zero_file
from train.resilience.deepspeed_operators import prepare_deepspeed
from train.resilience.layout import Layout
from train.training_flags import INHERITED, check_choices, check_zero_file

PARTS = tuple(PART_PREFIXES)
"""Parts of the model that can be trained or frozen; the head belongs to the language model."""
LOSS_NORMALIZATIONS = ("step", "micro_batch")
"""What the loss is a mean over: the supervised tokens of a step on all ranks, or LLaVA's mean of micro batch means."""


@dataclass
class ModelArguments:
    """Which model is trained, and which parts of it."""

    GROUPS: ClassVar[str] = "model"

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
    reduction: str | None = field(
        default=None,
        metadata={"help": "A rival method instead of skipping, METHOD:TOKENS[,NAME=VALUE...], such as "
                          "visionzip:64 (docs/rivals.md). Default: what a saved model has."},
    )  # fmt: skip
    size: str = field(default="tiny", metadata={"help": f"Size of a new model: {', '.join(SIZES)}."})
    template: str | None = field(
        default=None,
        metadata={"help": f"Conversation template: {', '.join(template_names())}; default: the tokenizer's own."},
    )
    train_parts: list[str] | None = field(
        default=None,
        metadata={"help": f"Trainable parts, of {', '.join(PARTS)}. Default: all for a new model, all but "
                          "vision_tower for a loaded one."},
    )  # fmt: skip
    projector: str | None = field(
        default=None, metadata={"help": "A pretrained projector to start from: an mm_projector.bin, or its folder."}
    )
    image_aspect_ratio: str = field(
        default="pad",
        metadata={"help": "pad: images are padded to a square; square: cropped, as in LLaVA's own stage 1."},
    )
    lora_enable: bool = field(default=False, metadata={"help": "Low-rank factors in the language model (LoRA)."})
    lora_r: int = field(default=64, metadata={"help": "Rank of the factors."})
    lora_alpha: int = field(default=16, metadata={"help": "The factors' product counts lora_alpha / lora_r times."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the factors."})
    lora_bias: str = field(
        default="none", metadata={"help": "none, or lora_only: biases of adapted layers are trainable."}
    )
    lora_targets: list[str] | None = field(
        default=None, metadata={"help": "Linear layers that get factors, such as q_proj v_proj; default: all."}
    )
    bits: int = field(default=16, metadata={"help": "4 or 8 quantises the frozen language model (QLoRA)."})
    quant_type: str = field(default="nf4", metadata={"help": "Of 4 bits: nf4 or fp4."})
    double_quant: bool = field(default=True, metadata={"help": "Quantise the constants of 4 bits, too."})
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "eager, sdpa, flash_attention_2 or flex_attention; default: transformers' choice."},
    )

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.train_parts or ()) - set(PARTS)):
            raise UserError(f"--train_parts has the unknown parts {unknown}; known: {', '.join(PARTS)}.")
        _ = self.rival  # a mistake in it shows now
        for name in ("vision_tower", "projector"):
            if getattr(self, name) and not self.model:
                raise UserError(f"--{name} needs --model, the language model that it is joined to.")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise UserError(f"--{name} is {getattr(self, name)!r}; it must be {' or '.join(map(str, known))}.")
        check_numbers(self, above_zero=("lora_r", "lora_alpha"), not_negative=("lora_dropout",))

    @property
    def rival(self) -> ReductionConfig | None:
        """The rival method that was asked for."""
        return None if self.reduction is None else ReductionConfig.parse(self.reduction)

    @property
    def new_preset(self) -> str:
        """The preset of a model that has none yet; a rival method is for a dense one."""
        return self.preset or (DEFAULT_PRESET if self.reduction is None else dense_preset(DEFAULT_PRESET))

    @property
    def trained_parts(self) -> tuple[str, ...]:
        """The trainable parts, with the default resolved."""
        if self.train_parts is not None:
            return tuple(self.train_parts)
        return PARTS if self.model is None else tuple(part for part in PARTS if part != "vision_tower")


_CHOICES: dict[str, tuple[Any, ...]] = {
    "image_aspect_ratio": ("pad", "square"),
    "lora_bias": ("none", "lora_only"),
    "bits": (16, 8, 4),
    "quant_type": ("nf4", "fp4"),
}


@dataclass
class DataArguments:
    """The training data."""

    GROUPS: ClassVar[str] = "data"

    data: str = field(
        default="",
        metadata={"help": "LLaVA conversation JSON, JSONL, Parquet, a set of `datasets` (folder or hub name), or a "
                          "YAML that mixes several."},
    )  # fmt: skip
    images: str = field(
        default="",
        metadata={"help": "Folder that the image paths of the records start from, or a JSON file that maps their first "
                          "component to a folder."},
    )  # fmt: skip
    max_length: int = field(
        default=2048, metadata={"help": "Tokens of a sample, images included; longer ones lose their tail (counted)."}
    )
    drop_faulty: bool = field(
        default=False,
        metadata={"help": "Leave faulty records out and list them in dropped.json; default: refuse."},
    )
    group_by_modality_length: bool = field(
        default=False, metadata={"help": "Steps of one modality, whose batches are about equally long."}
    )
    padding_free: bool = field(
        default=False, metadata={"help": "The samples of a batch one after the other in one sequence, without padding."}
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={"help": "With --padding_free true: as many samples in a batch as have at most so many tokens "
                          "together; needs --per_device_train_batch_size 1."},
    )  # fmt: skip
    streaming: bool = field(
        default=False,
        metadata={"help": "Read records as they are needed, without a copy on disk; needs --max_steps."},
    )
    shuffle_buffer: int = field(default=10_000, metadata={"help": "Records that a stream is shuffled among."})
    cache_vision_features: str | None = field(
        default=None,
        metadata={"help": "Folder for the features of a frozen tower: an epoch writes them, later ones read them."},
    )
    data_processes: int = field(
        default=default_processes(), metadata={"help": "Processes that check and measure a set before the run."}
    )

    eval_data: str | None = field(
        default=None, metadata={"help": "Validation data: any source that --data takes; needs --eval_strategy."}
    )
    eval_images: str | None = field(
        default=None, metadata={"help": "Folder of the validation images; default: that of --images."}
    )
    eval_share: float | None = field(
        default=None,
        metadata={"help": "Share of --data that is validated on instead of trained on, such as 0.01; --seed chooses."},
    )

    def __post_init__(self) -> None:
        if self.eval_share is not None and not 0 < self.eval_share < 1:
            raise UserError(f"--eval_share is {self.eval_share}; it must be above 0 and below 1.")
        if not self.data:
            raise UserError("--data is missing: give a LLaVA conversation JSON, or another set.")
        above_zero = ("max_length", "shuffle_buffer", "max_tokens_per_batch")
        check_numbers(self, above_zero=above_zero, not_negative=("data_processes",))
        if self.streaming and self.group_by_modality_length:
            raise UserError("--group_by_modality_length needs the length of every sample; leave out --streaming.")


_ABOVE_ZERO = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "learning_rate", "logging_steps",
    "save_steps", "adam_epsilon", "ddp_timeout", "eval_steps", "per_device_eval_batch_size",
    "eval_benchmarks_limit",
)  # fmt: skip
_NOT_NEGATIVE = (
    "eval_delay", "adam_beta1", "adam_beta2", "warmup_steps", "weight_decay", "max_grad_norm", "dataloader_num_workers",
    "hang_timeout_seconds",
)  # fmt: skip


@dataclass
class RunArguments(TrainingArguments):
    """transformers' TrainingArguments with LLaVA's defaults, and what to do with an output folder that is in use."""

    # All flags that a run takes: `train.command_line` refuses the others of TrainingArguments.
    GROUPS: ClassVar[dict[str, tuple[str, ...]]] = {
        "optimisation": (
            "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps",
            "learning_rate", "learning_rates", "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta2",
            "max_grad_norm", "optim", "loss_normalization", "seed", "bf16", "fp16", "use_cpu", "deepspeed",
            "activation_checkpointing", "dataloader_num_workers", "dataloader_drop_last",
        ),
        "resilience": (
            "output_dir", "overwrite", "save_steps", "save_total_limit", "hang_timeout_seconds", "dry_run",
        ),
        "reporting": ("logging_steps", "report_to", "run_name", "peak_tflops", "disable_tqdm"),
        "validation": (
            "eval_strategy", "eval_steps", "eval_delay", "per_device_eval_batch_size", "load_best_model_at_end",
            "eval_benchmarks", "eval_benchmarks_data", "eval_benchmarks_limit",
        ),
        "inherited": INHERITED,
    }  # fmt: skip

    output_dir: str = field(default="", metadata={"help": "Folder of the run; default: checkpoints/<preset>."})
    activation_checkpointing: str | None = field(
        default=None,
        metadata={"help": "Run layers again in the backward pass instead of keeping what they made: true, false, or "
                          "auto: if a batch of the longest samples would not fit the free memory without it.",
                  "nargs": "?", "const": "true"},
    )  # fmt: skip
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Samples of one process in one step."})
    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Shape of the learning rate."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up in steps, or as a ratio below 1."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two points of the loss curve."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints that are kept."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Off: the collator reads all."})
    report_to: list[str] = field(
        default_factory=lambda: ["none"], metadata={"help": "none, wandb, tensorboard, ...; several may be named."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Off: a loss that is not finite is an error."}
    )
    eval_strategy: str = field(
        default="no", metadata={"help": "When to validate: steps (every --eval_steps), or epoch."}
    )
    eval_steps: float | None = field(
        default=None, metadata={"help": "Steps between two validations; default: --save_steps."}
    )
    load_best_model_at_end: bool = field(
        default=False,
        metadata={"help": "Keep the checkpoint with the lowest validation loss, and export it instead of the last."},
    )
    eval_benchmarks: str | None = field(
        default=None, metadata={"help": "Benchmarks of llava-skip eval for each checkpoint, separated by commas."}
    )
    eval_benchmarks_data: list[str] | None = field(
        default=None, metadata={"help": "Their FILE, or NAME=FILE for each; default: the embedded set."}
    )
    eval_benchmarks_limit: int | None = field(
        default=None, metadata={"help": "Only the first N questions of each benchmark."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Delete what the output folder holds before the run."})
    dry_run: bool = field(
        default=False, metadata={"help": "Check everything, print the resolved run, load no weights."}
    )
    learning_rates: dict | str | None = field(
        default=None,
        metadata={"help": "JSON: part -> peak learning rate, of the parts that have one of their own, such as "
                          "'{\"vision_tower\": 2e-6}'."},
    )  # fmt: skip
    loss_normalization: str = field(
        default="step",
        metadata={"help": "step: mean over the supervised tokens of the step on all ranks; micro_batch: mean of the "
                          "means of micro batches, as LLaVA has it."},
    )  # fmt: skip
    peak_tflops: float | None = field(
        default=None, metadata={"help": "bfloat16 peak of a device, for MFU; default: from a table of known GPUs."}
    )
    dataloader_num_workers: int | None = field(
        default=None, metadata={"help": "Workers of a process that read its batches; default: 2 to 4 a GPU, else 0."}
    )
    dataloader_persistent_workers: bool | None = field(
        default=None, metadata={"help": "Whether workers live for the whole run; default: with a GPU."}
    )
    hang_timeout_seconds: float = field(
        default=1500,
        metadata={"help": "A run without progress for this long is ended, and its slow rank named; 0: never."},
    )

    def __post_init__(self) -> None:
        check_choices(self)
        set_checkpointing(self)
        set_workers(self)
        if self.eval_steps is None and self.eval_strategy == "steps":  # transformers would take --logging_steps
            self.eval_steps = self.save_steps
        for name in ("activation_checkpointing_kwargs", "lr_scheduler_kwargs"):
            setattr(self, name, read_object(name, getattr(self, name)))
        if self.deepspeed:
            self.deepspeed: Any = zero_file(self.deepspeed)
            check_zero_file(self.deepspeed)
            prepare_deepspeed()
        self._read_as_transformers_does()
        check_numbers(self, above_zero=_ABOVE_ZERO, not_negative=_NOT_NEGATIVE)
        if wrong := [name for name in ("adam_beta1", "adam_beta2") if getattr(self, name) >= 1]:
            raise UserError(f"--{wrong[0]} is {getattr(self, wrong[0])}; it must be below 1.")
        self.learning_rates = read_rates(self.learning_rates)
        self.layout: Layout = self.own_layout
        if self.loss_normalization not in LOSS_NORMALIZATIONS:
            raise UserError(
                f"--loss_normalization is {self.loss_normalization!r}; known: {', '.join(LOSS_NORMALIZATIONS)}."
            )

    def _read_as_transformers_does(self) -> None:
        """Resolve what TrainingArguments resolves; what it refuses is a mistake of the user."""
        try:
            super().__post_init__()
        except (ValueError, ImportError) as error:
            raise UserError(f"the arguments do not go together or with this machine: {error}") from error

    @property
    def own_layout(self) -> Layout:
        """How these processes divide the samples of a step; `layout` is that with which the run began."""
        return Layout(self.world_size, self.per_device_train_batch_size, self.gradient_accumulation_steps)

    @property
    def part_rates(self) -> dict[str, float]:
        """Peak learning rates of the parts that have one of their own."""
        assert isinstance(self.learning_rates, dict)  # __post_init__ has read it
        return self.learning_rates


KINDS = (ModelArguments, DataArguments, RunArguments)
"""The dataclasses of a run's arguments."""

# What may change between a run and its continuation without making it another run.
_NOT_IDENTITY = (
    "output_dir", "overwrite", "logging_steps", "save_steps", "save_strategy", "save_total_limit", "report_to",
    "dataloader_num_workers", "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_pin_memory",
    "disable_tqdm", "run_name", "local_rank", "deepspeed", "dry_run", "peak_tflops",
    "hang_timeout_seconds", "data_processes", "per_device_eval_batch_size", "eval_steps", "eval_delay",
    "eval_benchmarks", "eval_benchmarks_data", "eval_benchmarks_limit", "cache_vision_features",
    "activation_checkpointing", "gradient_checkpointing",  # one switch under two names; the losses are the same
    "per_device_train_batch_size", "gradient_accumulation_steps",  # their product with the processes is compared
)  # fmt: skip


def resolved(model: ModelArguments, data: DataArguments, run: RunArguments) -> dict[str, Any]:
    """Every argument of the run as plain data, to be saved with its results."""
    return {"model": asdict(model), "data": asdict(data), "training": run.to_dict(), "layout": asdict(run.layout)}


def identity(arguments: dict[str, Any]) -> dict[str, Any]:
    """The part of the resolved arguments that makes two runs the same run.

    A stream's workers belong to it: they divide its records.
    """
    training = {k: v for k, v in arguments["training"].items() if k not in _NOT_IDENTITY and not k.startswith("_")}
    data = {k: v for k, v in arguments["data"].items() if k not in _NOT_IDENTITY}
    if data.get("streaming"):
        training["dataloader_num_workers"] = arguments["training"].get("dataloader_num_workers")
    return {"model": arguments["model"], "data": data, "training": training}
