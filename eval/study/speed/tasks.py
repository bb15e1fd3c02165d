"""The calls that `bench` measures: training steps, prefills, answers of `generate`, decode steps, single parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from eval.answering.clock import Clock
from eval.study.speed.measuring import Measured, clock
from eval.study.speed.subjects import Shape, Subject
from llava_skip.tokens import merge_tokens


class Trainer:
    """Training steps of several subjects that share weights, with one optimizer: one copy of its moments as well."""

    def __init__(self, subjects: Sequence[Subject]) -> None:
        own = {id(p): p for subject in subjects for p in subject.model.parameters() if p.requires_grad}
        # So small a rate that the weights stay what they are, whoever is measured first.
        self.optimizer = torch.optim.AdamW(own.values(), lr=1e-12, fused=True)
        for parameter in own.values():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()  # makes the moments, which then are in no step's time or memory
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, subject: Subject, inputs: Mapping[str, Tensor]) -> None:
        """Forward, backward and update; a step leaves no gradients, so each one allocates its own."""
        subject.model(**inputs).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def release(self) -> None:
        """Give back the moments."""
        self.optimizer.state.clear()


def training(subject: Subject, shape: Shape, trainer: Trainer) -> Callable[[], None]:
    """A whole training step: tower, projector, language model, backward, AdamW."""
    subject.model.train()
    inputs = subject.inputs(shape)
    return lambda: trainer.step(subject, inputs)


def _prompt(subject: Subject, shape: Shape) -> dict[str, Tensor]:
    subject.model.eval()
    return {name: tensor for name, tensor in subject.inputs(shape).items() if name != "labels"}


def prefill(subject: Subject, shape: Shape) -> Callable[[], Any]:
    """A prompt with its images into a new cache; returns the outputs with the logits of the first new token."""
    inputs = _prompt(subject, shape)

    @torch.no_grad()
    def call() -> Any:
        return subject.model(**inputs, use_cache=True, logits_to_keep=1)

    return call


def seeing(subject: Subject, shape: Shape) -> Callable[[], Any]:
    """Images to the tokens of the language model: tower, projector, merging, summaries."""
    inputs = _prompt(subject, shape)
    images = {name: inputs[name] for name in ("pixel_values", "crop_counts") if name in inputs}

    @torch.no_grad()
    def call() -> Any:
        return subject.model.model.encode_images(**images)

    return call


def merging(subject: Subject, shape: Shape) -> Callable[[], Any] | None:
    """The merge alone, of all images of the batch; None for a dense model."""
    config, skip = subject.config, subject.config.skip_config
    if skip is None:
        return None
    others = config.visual_tokens(config.most_crops) - skip.retained
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(shape.samples * shape.images, others, config.text_config.hidden_size, generator=generator)
    tokens = tokens.to(subject.device, subject.model.dtype)

    @torch.no_grad()
    def call() -> Any:
        return merge_tokens(tokens, skip.skipped)

    return call


def answer(subject: Subject, shape: Shape, new_tokens: int, **options: Any) -> Measured:
    """`generate` with a new prompt: seconds to the first token, and for each of the further ones.

    Args:
        subject: the model.
        shape: of the batch.
        new_tokens: of each answer, at least 2.
        **options: of `generate`.
    """
    inputs, read = _prompt(subject, shape), clock(subject.device)
    options |= {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}

    def call() -> dict[str, float]:
        watch = Clock(subject.device, read)
        subject.model.generate(**inputs, **options, logits_processor=LogitsProcessorList([watch]))
        first, rest = watch.stop()
        return {"first_token": first, "next_token": rest / (new_tokens - 1)}

    return call


class Decoding:
    """Decode steps of a batch whose samples all have the same prompt, of which one is computed and repeated."""

    def __init__(self, subject: Subject, prompt: Any, samples: int, steps: int) -> None:
        """Fill a cache.

        Args:
            subject: the model.
            prompt: the outputs of its `prefill` of one sample, which stay as they are.
            samples: B.
            steps: of one call.
        """
        self.subject, self.steps = subject, steps
        self.cache = deepcopy(prompt.past_key_values)
        self.cache.batch_repeat_interleave(samples)
        self.token = prompt.logits[:, -1:].argmax(dim=-1).expand(samples, 1)

    @torch.no_grad()
    def __call__(self) -> None:
        """`steps` new tokens for each sample, which are then taken back."""
        for _ in range(self.steps):
            self.subject.model(input_ids=self.token, past_key_values=self.cache, use_cache=True)
        self.cache.crop(-self.steps)
