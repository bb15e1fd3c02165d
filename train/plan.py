"""What a run would cost, and which models fit a budget, before anything is loaded.

    llava-skip plan --recipe table1-sv-llava-100 --gpu A100 --gpus 8
    llava-skip plan --size llama3-8b --gpu "H100" --gpus 4 --samples 665298 --budget_hours 6

Nothing is trained, and no weights and no network are needed. Everything is by formula (llava_skip/flops.py,
step_flops.py, memory.py) at a stated share of the GPUs' peak.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_skip.checkpoints import load_tokenizer
from llava_skip.gpus import GPUS, Gpu, get_gpu
from llava_skip.memory import Zero
from llava_skip.presets import PRESETS
from llava_skip.processing import LlavaSkipProcessor, find_image_token
from llava_skip_base.console import one_message, print_next
from llava_skip_base.errors import UserError
from llava_skip_base.files import write_json
from llava_skip_base.paths import embedded_tokenizer
from train.command_line import read_command_line
from train.data import load_records
from train.data.parallel import default_processes
from train.planning.checkpointing import zero_of_file
from train.planning.estimate import Machine, Training, inference_cost, training_cost
from train.planning.models import config_for
from train.planning.published import data_set_of, known_samples
from train.planning.shape import Shape, assumed, measured
from train.planning.showing import draw, show
from train.recipe.parts import PART_PREFIXES
from train.recipe.recipes import (
    FOLDER,
    RECIPE,
    checkpointing_of,
    read_recipe,
    take_option,
    with_underscores,
    zero_file,
)

UTILISATION = 0.3
"""About what the paper's dense LLaVA reached (10.2 hours on 8 A100), recomputation counted; see docs/reproduce.md."""
_RECOMPUTED = {
    True: "; activations recomputed",
    False: "",
    None: "; activations recomputed where they would not fit",
}
TEXT_TOKENS = 200
"""Assumed of a sample of LLaVA's 665k mix, whose own mean nobody has measured here."""


@dataclass
class PlanArguments:
    """What is planned. A recipe's arguments of the same names are taken from it."""

    gpu: str = field(default="A100", metadata={"help": f"One of {', '.join(GPUS)}."})
    gpus: int = field(default=8, metadata={"help": "How many."})
    gpu_memory: float | None = field(default=None, metadata={"help": "GiB, if not those of the table."})
    gpu_tflops: float | None = field(default=None, metadata={"help": "Peak of bfloat16, if not that of the table."})
    utilisation: float = field(
        default=UTILISATION, metadata={"help": "Share of the peak that the products reach, recomputed ones included."}
    )
    step_seconds: float = field(default=0.0, metadata={"help": "Of each step beside the products."})

    model: str | None = field(default=None, metadata={"help": "Folder, published name, or what a recipe writes."})
    size: str | None = field(default=None, metadata={"help": "tiny, vicuna-7b, llama3-8b; default: the model's."})
    preset: list[str] | None = field(default=None, metadata={"help": "One or several; default: the recipe's, or all."})
    reduction: list[str] | None = field(
        default=None, metadata={"help": "Rival methods, such as visionzip:64, each on the dense preset."}
    )

    data: str | None = field(default=None, metadata={"help": "A data set, which is measured; needs a tokenizer."})
    images: str = field(default="", metadata={"help": "Its images."})
    tokenizer: str | None = field(default=None, metadata={"help": "To measure the data with; default: --model's."})
    template: str | None = field(default=None, metadata={"help": "To measure the data with."})
    data_processes: int = field(default=default_processes(), metadata={"help": "To measure it with."})
    most_records: int = field(default=20_000, metadata={"help": "Records of the set that are measured."})
    samples: float | None = field(default=None, metadata={"help": "Instead of --data: number of samples."})
    text_tokens: float | None = field(
        default=None,
        metadata={"help": f"Assumed mean of a sample that is not measured; default: {TEXT_TOKENS}, or the data's."},
    )
    supervised_tokens: float | None = field(default=None, metadata={"help": "Of them, with a label; default: half."})
    image_share: float | None = field(default=None, metadata={"help": "Of the samples, with an image; default: 1."})

    train_parts: list[str] | None = field(default=None, metadata={"help": "Default: all but vision_tower."})
    samples_per_step: int = field(default=128, metadata={"help": "Of all GPUs."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Samples of one GPU at once, at most."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Over the data."})
    max_steps: int = field(default=0, metadata={"help": "End earlier."})
    max_length: int = field(default=2048, metadata={"help": "Tokens of a sample; what must fit is a batch of these."})
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={"help": "Of one GPU: as many samples in one row as fit; --samples_per_step is then their mean."},
    )
    activation_checkpointing: str = field(
        default="true", metadata={"help": "Run layers again instead of keeping them; auto: where they do not fit."}
    )
    deepspeed: str | None = field(default="zero3", metadata={"help": "zero2, zero3, with _offload, a file, or ''."})
    lora_enable: bool = field(default=False, metadata={"help": "Factors in the language model."})
    lora_r: int = field(default=64, metadata={"help": "Their rank."})
    bits: int = field(default=16, metadata={"help": "Of the frozen language model's weights."})

    prompt_tokens: int = field(default=100, metadata={"help": "Of a question, beside its image."})
    answer_tokens: int = field(default=128, metadata={"help": "Of an answer."})
    budget_hours: float | None = field(default=None, metadata={"help": "Of training, on all GPUs together."})
    budget_ms: float | None = field(default=None, metadata={"help": "Of a prefill, on one GPU."})
    json: str = field(default="plan.json", metadata={"help": "File of all numbers; '' writes none."})
    picture: str = field(default="plan.png", metadata={"help": "PNG of hours and memory; '' draws none."})

    dense: str = field(default="llava", init=False)
    """Preset that the rival methods act on."""

    def __post_init__(self) -> None:
        above = ("gpus", "samples_per_step", "per_device_train_batch_size", "num_train_epochs", "max_length", "lora_r",
                 "prompt_tokens", "answer_tokens", "most_records", "gpu_memory", "gpu_tflops", "budget_hours",
                 "budget_ms", "max_tokens_per_batch")  # fmt: skip
        for name in above:
            if (value := getattr(self, name)) is not None and not 0 < value < 1e12:
                raise UserError(f"--{name} is {value:g}; it must be above 0.")
        if self.max_tokens_per_batch is not None and self.max_tokens_per_batch < self.max_length:
            raise UserError(
                f"--max_tokens_per_batch is {self.max_tokens_per_batch}, and a sample may have {self.max_length} "
                "tokens: raise it, or lower --max_length."
            )
        if not 0 <= self.step_seconds < 1e12:
            raise UserError(f"--step_seconds is {self.step_seconds:g}; it must be 0 or above.")
        if not 0 < self.utilisation <= 1:
            raise UserError(f"--utilisation is {self.utilisation:g}; it must be above 0, and at most 1.")
        if self.bits not in (16, 8, 4):
            raise UserError(f"--bits is {self.bits}; it must be 16, 8 or 4.")
        if unknown := sorted(set(self.train_parts or ()) - set(PART_PREFIXES)):
            raise UserError(f"--train_parts has the unknown parts {unknown}; known: {', '.join(PART_PREFIXES)}.")

    @property
    def machine(self) -> Machine:
        """The GPUs.

        Raises:
            UserError: an unknown one without its numbers.
        """
        gpu = Gpu(0, 0) if self.gpu_memory and self.gpu_tflops else get_gpu(self.gpu)
        gpu = Gpu(self.gpu_tflops or gpu.tflops, self.gpu_memory or gpu.memory)
        return Machine(self.gpu, gpu, self.gpus, self.utilisation, self.step_seconds)

    @property
    def training(self) -> Training:
        """How it is trained."""
        step = self.samples_per_step
        return Training(
            trained=tuple(self.train_parts or [part for part in PART_PREFIXES if part != "vision_tower"]),
            batch=min(self.per_device_train_batch_size, max(1, step // self.gpus)),
            samples_per_step=step,
            epochs=self.num_train_epochs,
            max_steps=self.max_steps,
            max_length=self.max_length,
            row=self.max_tokens_per_batch,
            checkpointing=checkpointing_of(self.activation_checkpointing),
            zero=zero_of(self.deepspeed),
            lora_rank=self.lora_r if self.lora_enable else 0,
            bits=self.bits,
        )


def zero_of(name: str | None) -> Zero:
    """How a DeepSpeed file divides the states.

    Raises:
        UserError: it cannot be read.
    """
    if not name:
        return Zero()
    if not (path := Path(zero_file(name)).expanduser()).is_file():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("zero*.json")))
        raise UserError(f"--deepspeed is {name!r}; expected one of {known}, a file, or ''.")
    return zero_of_file(path)


def shape_of(arguments: PlanArguments) -> Shape | None:
    """The samples: measured, assumed, or None if neither data nor a number is given.

    Raises:
        UserError: data that cannot be read, or no tokenizer to measure it with.
    """
    data = arguments.data
    if data is None and arguments.samples is None:
        return None
    if data is None or arguments.samples is not None or not Path(data).expanduser().exists():
        return _assumed(arguments)
    source = arguments.tokenizer or arguments.model
    if source is None and arguments.size not in (None, "tiny"):
        raise UserError("--data is measured with the model's tokenizer, which a --size has not: give --tokenizer.")
    source = source or str(embedded_tokenizer())
    tokenizer = load_tokenizer(source)
    config = config_for(None, "tiny", "llava", None)
    config.image_token_index = find_image_token(tokenizer)
    processor = LlavaSkipProcessor.for_config(config, tokenizer, arguments.template)
    records = load_records(data, arguments.images)
    return measured(records, processor, arguments.data_processes, arguments.most_records, data)


def _assumed(arguments: PlanArguments) -> Shape:
    """What is given, else what is known of a public set, else what is assumed of any."""
    known = data_set_of(arguments.data)
    if known is None and arguments.samples is None:
        known = known_samples(str(arguments.data))
    text, labelled, share = arguments.text_tokens, arguments.supervised_tokens, arguments.image_share
    if text is None:
        text = known.text_tokens if known else TEXT_TOKENS
        labelled = known.supervised_tokens if known and labelled is None else labelled
    samples = arguments.samples if arguments.samples is not None else known.samples if known else 0
    return assumed(
        samples,
        text,
        text / 2 if labelled is None else labelled,
        share if share is not None else known.image_share if known else 1.0,
    )


def make_plan(arguments: PlanArguments, shape: Shape | None) -> dict[str, Any]:
    """All numbers of the plan."""
    machine, training, variants = arguments.machine, arguments.training, []
    rivals = [(None, text) for text in arguments.reduction or ()]
    presets = arguments.preset or ([] if rivals else list(PRESETS))
    for preset, rival in [*((name, None) for name in presets), *rivals]:
        dense = arguments.dense if rival else preset
        config = config_for(arguments.model, arguments.size, dense, rival)
        one: dict[str, Any] = {"name": rival or preset, "preset": dense, "reduction": rival}
        one["inference"] = inference_cost(config, machine, arguments.prompt_tokens, arguments.answer_tokens)
        if shape is not None:
            one["training"] = training_cost(config, shape, training, machine)
        variants.append(one)
    facts = {
        "GPUs": f"{machine.gpus} x {machine.name}: {machine.gpu.tflops:g} TFLOPs, {machine.gpu.memory:g} GiB",
        "share of the peak": f"{machine.utilisation:.0%} of every product, recomputed ones included (HFU)",
        "request": f"{arguments.prompt_tokens} tokens and one image, answered with {arguments.answer_tokens}",
    }
    if shape is not None:
        facts |= {
            "samples": f"{shape.samples:,.0f}, {shape.described()['mean_images']:.3g} images each",
            "their length": shape.source,
            "step": f"{training.samples_per_step} samples, "
            + (f"{training.row} tokens" if training.row else str(training.batch))
            + " of a GPU at once",
            "trained": " ".join(training.trained) + (f" (LoRA {training.lora_rank})" if training.lora_rank else ""),
            "memory": ("of a row" if training.row else "of a batch")
            + f" of samples of {training.max_length} tokens; DeepSpeed: {arguments.deepspeed or 'no'}"
            + _RECOMPUTED[training.checkpointing],
        }
    budgets = {"hours": arguments.budget_hours, "ms": arguments.budget_ms}
    found = {"assumptions": facts, "budgets": budgets, "variants": variants}
    return found if shape is None else found | {"data": shape.described()}


def within(plan: dict[str, Any]) -> list[str]:
    """The names of the variants that fit memory and budgets.

    Raises:
        UserError: none does; the message names the nearest.
    """
    variants, budgets = plan["variants"], plan["budgets"]
    left = list(variants)
    for name, limit, unit in (("training", budgets["hours"], "hours"), ("inference", budgets["ms"], "ms")):
        if limit is None:
            continue
        if name not in variants[0]:
            raise UserError("--budget_hours needs data: give --data or --samples.")
        key = "hours" if name == "training" else "prefill_ms"
        nearest = min(left, key=lambda one: one[name][key])
        left = [one for one in left if one[name][key] <= limit]
        if not left:
            raise UserError(
                f"Nothing fits {limit:g} {unit}: the nearest, {nearest['name']}, takes {nearest[name][key]:.3g}. Give "
                "more or other GPUs, a smaller model, fewer samples, or a larger budget."
            )
    if "training" not in variants[0]:
        return [one["name"] for one in _answering(left)]
    if all(one["training"]["image_is_cut"] for one in left):
        raise UserError("No image fits --max_length: give more tokens, or a preset whose images take fewer.")
    if not any(one["training"]["memory"]["fits"] for one in left):
        nearest = min(left, key=lambda one: one["training"]["memory"]["peak"])
        memory = nearest["training"]["memory"]
        raise UserError(
            f"Nothing fits the memory of a GPU: the nearest, {nearest['name']}, takes {memory['peak']:.0f} GiB of "
            f"{memory['available']:.0f} that are available ({memory['activations']:.0f} are activations). Give a "
            "smaller --per_device_train_batch_size or --max_length, more GPUs, --deepspeed zero3_offload, or LoRA."
        )
    return [one["name"] for one in left if one["training"]["memory"]["fits"]]


def _answering(variants: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that answer a request on one GPU, where nothing is trained."""
    fitting = [one for one in variants if one["inference"]["requests"]]
    if not fitting:
        raise UserError("No weights of 16 bits with one request fit the memory of a GPU: give a larger GPU.")
    return fitting


def read_arguments(words: Sequence[str]) -> PlanArguments:
    """The arguments, with those of a recipe; what it has of the data is left out unless that is here."""
    words = with_underscores(words)
    source, own = take_option(words, RECIPE)
    recipe = {} if source is None else read_recipe(source)
    given = {word.partition("=")[0].removeprefix("--") for word in own if word.startswith("--")}
    if "samples_per_step" in recipe and "samples_per_step" not in given:
        own = [*own, "--samples_per_step", str(recipe["samples_per_step"])]
    (arguments,) = read_command_line((PlanArguments,), words if source is None else [RECIPE, source, *own])
    if recipe.get("reduction") and "preset" not in given:  # its preset is what the method acts on
        arguments.preset, arguments.dense = None, recipe.get("preset", arguments.dense)
    return arguments


def main() -> None:
    """Plan, show, and write the numbers; a budget that nothing fits is an error."""
    with one_message():
        arguments = read_arguments(sys.argv[1:])
        plan = make_plan(arguments, shape_of(arguments))
        show(plan)
        if arguments.json:
            write_json(Path(arguments.json).expanduser(), plan)
        if arguments.picture:
            draw(plan, Path(arguments.picture).expanduser())
        fitting = within(plan)
    option = "--reduction" if arguments.reduction else "--preset"
    print_next(f"these fit: {', '.join(fitting)}. llava-skip train {option} NAME ...; docs/plan.md has the rules.")


if __name__ == "__main__":
    main()
