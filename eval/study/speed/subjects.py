"""What is measured: models on one set of random weights, each with a batch of equal samples.

Shapes: B samples, T tokens of a sample, N images of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedModel
from transformers.cache_utils import Cache

from eval.study.speed.sizes import bench_config
from llava_skip.checkpoints.export import stock_config
from llava_skip.configuration import IGNORE_INDEX, LlavaSkipConfig
from llava_skip.modeling import LlavaSkipForConditionalGeneration
from llava_skip.presets import PRESETS, dense_preset
from llava_skip.step_flops import StepFlops, prompt_load, step_flops
from llava_skip.vision import get_front_end
from llava_skip_base.errors import UserError

STOCK = "transformers LLaVA"
"""Name of transformers' own dense LLaVA, which has the weights of the preset `llava`."""
TRAINED = ("multi_modal_projector", "summary", "language_model")
"""What a training step trains: all but the tower, as in LLaVA's second stage."""


@dataclass(frozen=True)
class Shape:
    """Of a batch.

    Attributes:
        samples: B.
        images: of a sample.
        text: tokens of a sample beside its images; the second half of them is supervised.
    """

    samples: int = 1
    images: int = 1
    text: int = 100

    @property
    def supervised(self) -> int:
        """Tokens of a sample that have a label."""
        return self.text // 2


@dataclass
class Subject:
    """A model to measure.

    Attributes:
        name: the preset's, or `STOCK`.
        reference: name of the dense model that its times are divided by.
        config: the configuration; for `STOCK`, that of the same model in this project.
        model: the model, of the language model's and the tower's shared weights.
    """

    name: str
    reference: str
    config: LlavaSkipConfig
    model: PreTrainedModel

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def inputs(self, shape: Shape, seed: int = 0) -> dict[str, Tensor]:
        """A batch as a processor would give it: random text and pixels, `labels` on the second half of the text."""
        config, generator = self.config, torch.Generator().manual_seed(seed)
        vocabulary = min(1000, config.image_token_id - 3)
        text = 3 + torch.randint(vocabulary, (shape.samples, shape.text), generator=generator)
        image = torch.full((shape.samples, shape.images * config.image_seq_length), config.image_token_id)
        ids = torch.cat([text[:, :1], image, text[:, 1:]], dim=1)
        labels = ids.clone()
        labels[:, : ids.shape[1] - shape.supervised] = IGNORE_INDEX
        crops, side = config.most_crops, config.vision_config.image_size
        images = shape.samples * shape.images
        pixels = torch.randn(images * crops, 3, side, side, generator=generator).to(self.model.dtype)
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "labels": labels}
        if get_front_end(config.front_end).cuts_tiles:
            found["crop_counts"] = torch.full((images,), crops)
        return {name: tensor.to(self.device) for name, tensor in found.items()}

    def training_flops(self, shape: Shape) -> StepFlops:
        """Of a training step by formula, for `STOCK` those of this project's model."""
        load = prompt_load(self.config, shape.text, shape.supervised, shape.images, shape.samples)
        updated = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        return step_flops(self.config, load, TRAINED, updated=updated)

    def prefill_flops(self, shape: Shape) -> StepFlops:
        """Of a prefill with the head on the last token."""
        return step_flops(self.config, prompt_load(self.config, shape.text, 1, shape.images, shape.samples))


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _share(model: PreTrainedModel, first: PreTrainedModel | None) -> None:
    """Give a model the parameters of another one wherever name and shape agree: one copy for all models."""
    if first is None:
        return
    own, others = model.state_dict(keep_vars=True), first.state_dict(keep_vars=True)
    shared = {name: others[name] for name, mine in own.items() if name in others and others[name].shape == mine.shape}
    model.load_state_dict(own | shared, assign=True)


def build_model(
    config: Any,
    kind: type[PreTrainedModel],
    device: str,
    dtype: torch.dtype,
    first: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """A model of random weights with a frozen tower, which shares with `first` the weights that both have."""
    torch.manual_seed(0)
    with torch.device(device), _default_dtype(dtype):
        model = kind(config)
    _share(model, first)
    model.model.vision_tower.requires_grad_(False)
    if model.generation_config is not None:
        model.generation_config.pad_token_id = 0
    return model


def build_subjects(
    presets: Sequence[str], size: str, device: str, dtype: torch.dtype, stock: bool = True
) -> list[Subject]:
    """The models of presets, each after the dense one of its front end, and transformers' LLaVA where there is one.

    All hold one copy of the language model and of towers of one size. Their times are divided by those of the dense
    preset, those of the dense `llava` stay 1.

    Args:
        presets: names; the dense ones that they are compared with need not be named.
        size: of `BENCH_SIZES`.
        device: where the models are.
        dtype: of their weights.
        stock: whether transformers' LLaVA is measured beside the preset `llava`.

    Raises:
        UserError: an unknown preset or size.
    """
    if unknown := [name for name in presets if name not in PRESETS]:
        raise UserError(f"unknown presets {', '.join(unknown)}; known: {', '.join(PRESETS)}.")
    names = list(dict.fromkeys(name for preset in presets for name in (dense_preset(preset), preset)))
    subjects: list[Subject] = []
    for name in names:
        config = bench_config(name, size)
        first = subjects[0].model if subjects else None
        model = build_model(config, LlavaSkipForConditionalGeneration, device, dtype, first)
        subjects.append(Subject(name, dense_preset(name), config, model))
        if stock and config.skip is None and get_front_end(config.front_end).is_llava_hf:
            twin = build_model(stock_config(config), LlavaForConditionalGeneration, device, dtype, model)
            subjects.append(Subject(STOCK, name, config, twin))
    return subjects


def cache_bytes(cache: Cache) -> tuple[int, int]:
    """Bytes of the tokens that a cache stores, and of all memory that it holds, room to grow included."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors), sum(held.values())
