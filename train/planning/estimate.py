"""What a run costs with a model: FLOPs, hours, memory of a GPU; and what answering costs."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from llava_skip.configuration import LlavaSkipConfig
from llava_skip.flops import image_cost, image_rows
from llava_skip.gpus import Gpu
from llava_skip.memory import Zero, activations, cache_token_bytes, states
from llava_skip.modeling import LlavaSkipForConditionalGeneration
from llava_skip.step_flops import Load, step_flops
from train.planning.shape import Shape
from train.recipe.parts import choose_trained, count_parameters, freeze_unused

GIB = 2**30
USABLE = 0.92
"""Share of a GPU's memory for what is counted; the rest is for its context, kernels, buckets and gaps."""


@dataclass(frozen=True)
class Machine:
    """GPUs, and how well they are used.

    Attributes:
        name: of the GPU.
        gpu: its numbers.
        gpus: how many.
        utilisation: share of the peak that the products reach, recomputed ones included (HFU).
        step_seconds: of a step, beside the products: communication and waiting.
    """

    name: str
    gpu: Gpu
    gpus: int
    utilisation: float
    step_seconds: float = 0.0

    def seconds(self, flops: float) -> float:
        """Of products on all GPUs."""
        return flops / (self.gpus * self.gpu.tflops * 1e12 * self.utilisation)


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    Attributes:
        trained: the trainable parts.
        batch: samples of one GPU at once.
        samples_per_step: of all GPUs.
        epochs: over the data.
        max_steps: ends the run earlier; 0: no.
        max_length: tokens of a sample.
        row: tokens of one GPU at once, of samples one after the other; None: `batch` samples with padding.
        checkpointing: of activations; None: where the longest batch does not fit without it.
        zero: DeepSpeed's division.
        lora_rank: 0 without LoRA.
        bits: of the frozen language model's weights.
    """

    trained: tuple[str, ...]
    batch: int
    samples_per_step: int
    epochs: float = 1.0
    max_steps: int = 0
    max_length: int = 2048
    row: int | None = None
    checkpointing: bool | None = True
    zero: Zero = Zero()
    lora_rank: int = 0
    bits: int = 16

    def steps(self, samples: float) -> int:
        """Of the run over a data set."""
        steps = math.ceil(self.epochs * -(-samples // self.samples_per_step))  # as the trainer rounds
        return min(steps, self.max_steps) if self.max_steps > 0 else steps


def _with_one_layer(config: LlavaSkipConfig) -> LlavaSkipConfig:
    """The configuration with one decoder layer; what concerns single layers has no parameters."""
    fields = config.to_dict()
    text = fields["text_config"] | {"num_hidden_layers": 1}
    if text.get("layer_types"):
        text["layer_types"] = text["layer_types"][:1]
    skip = None if fields["skip"] is None else {k: v for k, v in fields["skip"].items() if k != "layers"}
    return LlavaSkipConfig.from_dict(fields | {"text_config": text, "skip": skip, "reduction": None})


def parameter_counts(config: LlavaSkipConfig, trained: Collection[str], rank: int) -> dict[str, int]:
    """Parameters: of the model, of the language model, trainable ones, and what ZeRO-3 gathers at once.

    They are counted in a model on the meta device, as a dry run does; it has one decoder layer, since all are equal.
    """
    short = _with_one_layer(config)
    with torch.device("meta"):
        model = LlavaSkipForConditionalGeneration(short)
        choose_trained(model, trained)
    freeze_unused(model, short)
    parts, text = count_parameters(model), config.text_config
    layer = sum(parameter.numel() for parameter in model.model.language_model.layers[0].parameters())
    others, own = (text.num_hidden_layers - 1) * layer, "language_model" in trained
    whole, chosen = parts["language_model"]
    parts["language_model"] = (whole + others, chosen + others * own)
    trainable = sum(number for _, number in parts.values())
    added = 0
    if rank and own:
        linears = [p for n, p in model.model.language_model.layers[0].named_parameters() if n.endswith("proj.weight")]
        added = text.num_hidden_layers * rank * sum(sum(weight.shape) for weight in linears)
        trainable += added - parts["language_model"][1]
    return {
        "all": sum(whole for whole, _ in parts.values()) + added,
        "language_model": parts["language_model"][0],
        "trainable": trainable,
        "gathered": max(2 * layer, text.vocab_size * text.hidden_size),
    }


def training_cost(config: LlavaSkipConfig, shape: Shape, training: Training, machine: Machine) -> dict[str, Any]:
    """FLOPs, hours and memory of a run."""
    counts = parameter_counts(config, training.trained, training.lora_rank)
    longest = longest_batch(config, shape, training)
    if training.checkpointing is None:
        without = training_memory(config, replace(training, checkpointing=False), machine, counts, longest)
        training = replace(training, checkpointing=not without["fits"])
    steps = training.steps(shape.samples)
    share = steps * training.samples_per_step / shape.samples
    # An image that --max_length would cut is counted whole, with its text, and does not fit.
    epoch = shape.load(config, max(training.max_length, 2 * config.image_seq_length))
    load = epoch.times(share)
    updated = counts["trainable"] * steps
    flops = step_flops(config, load, training.trained, bool(training.checkpointing), training.lora_rank, updated)
    seconds = machine.seconds(flops.total) + steps * machine.step_seconds
    peak = machine.gpus * machine.gpu.tflops * 1e12
    memory = training_memory(config, training, machine, counts, longest)
    batches = epoch.tokens / training.row if training.row else shape.samples / training.batch
    usual = training_memory(config, training, machine, counts, epoch.times(1 / batches))
    memory |= {"mean_batch_peak": usual["peak"], "mean_batch_activations": usual["activations"]}
    if too_long := shape.images.any() and config.image_seq_length >= training.max_length:
        memory["fits"] = False
    return {
        "parameters": counts["all"],
        "trainable": counts["trainable"],
        "steps": steps,
        "samples_per_step": training.samples_per_step,
        "tokens_a_sample": load.tokens / load.samples,
        "flops_a_step": {name: value / steps for name, value in asdict(flops).items()},
        "flops": flops.total,
        "hours": seconds / 3600,
        "mfu": flops.model / (seconds * peak),
        "memory": memory,
        "activation_checkpointing": training.checkpointing,
        "image_is_cut": bool(too_long),
    }


def longest_batch(config: LlavaSkipConfig, shape: Shape, training: Training) -> Load:
    """A batch of one GPU whose samples are all as long as the longest that the data can have: what must fit.

    A row has as many of them as fill it.
    """
    rows = image_rows(config)
    images = 1.0 if shape.images.any() else 0.0
    words = max(0.0, training.max_length - images * config.image_seq_length)
    if shape.source.startswith("measured"):
        words = min(words, float(shape.text.max()))
    tokens = words + images * max(layer.keys for layer in rows)
    ffn = words + images * sum(layer.ffn for layer in rows) / len(rows)
    supervised = words * float((shape.weights * shape.supervised).sum() / max(1.0, (shape.weights * shape.text).sum()))
    batch = training.row / tokens if training.row else training.batch
    return Load(
        samples=batch,
        images=batch * images,
        crops=batch * images * config.most_crops,
        tokens=batch * tokens,
        pairs=batch * tokens**2,
        ffn_tokens=batch * ffn,
        head_tokens=batch * supervised,
    )


def training_memory(
    config: LlavaSkipConfig,
    training: Training,
    machine: Machine,
    counts: dict[str, int],
    batch: Load,
    element: int = 2,
) -> dict[str, Any]:
    """GiB of one GPU, by what holds them, with and without checkpointing, and whether they fit.

    `element` are the bytes of a number.
    """
    saved = counts["language_model"] * (1 - training.bits / 16) if training.bits < 16 else 0
    parameters = counts["all"] - round(saved)
    held = states(parameters, counts["trainable"], counts["gathered"], training.zero, machine.gpus, element)
    parts = set(training.trained)
    tower, projector = "vision_tower" in parts, "multi_modal_projector" in parts
    masked = training.batch > 1 and not training.row
    kept = {on: activations(config, batch, tower, projector, on, element, masked) for on in (True, False)}
    own = kept[bool(training.checkpointing)]
    peak = held.total + max(own.total, held.update)
    return {
        "weights": held.weights / GIB,
        "gradients": held.gradients / GIB,
        "optimizer": held.optimizer / GIB,
        "activations": own.total / GIB,
        "activations_without_checkpointing": kept[False].total / GIB,
        "logits": own.logits / GIB,
        "peak": peak / GIB,
        "host_a_process": held.host / GIB,
        "available": machine.gpu.memory * USABLE,
        "fits": peak / GIB <= machine.gpu.memory * USABLE,
    }


def inference_cost(config: LlavaSkipConfig, machine: Machine, text_tokens: int, answer_tokens: int) -> dict[str, Any]:
    """Prefill and cache of a request with one image on one GPU, and requests that fit beside the weights."""
    text, cost = config.text_config, image_cost(config, text_tokens)
    crops, tokens = config.most_crops, text_tokens + cost.attention_tokens
    before = step_flops(config, Load(1, 1, crops, tokens, tokens**2, tokens, head_tokens=0))
    flops = before.tower + before.projector + cost.prefill_flops
    token = cache_token_bytes(text)
    request = cost.cache_bytes + (text_tokens + answer_tokens) * token
    # One prefill at a time holds all its tokens, the skipped ones too, and the states of a layer.
    prefill = round((text_tokens + cost.tokens) * (token + 2 * (4 * text.hidden_size + 3 * text.intermediate_size)))
    weights = 2 * parameter_counts(config, (), 0)["all"]
    free = machine.gpu.memory * USABLE * GIB - weights - prefill
    return {
        "tokens": cost.tokens,
        "attention_tokens": cost.attention_tokens,
        "ffn_tokens": cost.ffn_tokens,
        "cache_tokens": cost.cache_tokens,
        "cache_mib_an_image": cost.cache_bytes / 2**20,
        "prefill_flops": flops,
        "tower_flops": before.tower + before.projector,
        "prefill_ms": 1000 * replace(machine, gpus=1).seconds(flops),
        "request_mib": request / 2**20,
        "requests": max(0, int(free // request)),
    }
