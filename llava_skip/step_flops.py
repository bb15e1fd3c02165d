"""FLOPs of a whole training step and of a whole prefill: tower, projector, merging, decoder and head; by formula.

Counted are matrix products as in `llava_skip.flops`: torch's FlopCounterMode gives the same numbers, forward and
backward, for each part that is frozen or trained, with and without activation checkpointing. The optimizer's work is
no product, and is counted by a rule of thumb.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, replace

from llava_skip.configuration import LlavaSkipConfig
from llava_skip.flops import decoder_flops, head_widths, image_rows
from llava_skip.products import Products, linear
from llava_skip.vision import get_front_end

ADAMW_FLOPS = 15
"""Operations of AdamW on one parameter: two moments, their corrections, the quotient, decay and update."""


@dataclass(frozen=True)
class Load:
    """What goes through a model, summed over the samples of a batch or of a whole data set.

    Attributes:
        samples: their number.
        images: their number.
        crops: of all images.
        tokens: that attend, averaged over the layers. Where fewer ask than are asked: the number with equal products.
        pairs: query and key of one sample: the sum of squared numbers of tokens, averaged over the layers.
        ffn_tokens: that take the FFN, averaged over the layers before the last one.
        head_tokens: that reach the head, and take the last layer's FFN: the supervised ones in training.
        gathered: whether the FFN's tokens are gathered, as in a skipping model and in a padded batch.
        asking: that have a query in the last layer: in a batch with a mask, those of each sample from the first column
            on in which a token of any sample reaches the head; None: all, as in a batch without.
    """

    samples: float
    images: float
    crops: float
    tokens: float
    pairs: float
    ffn_tokens: float
    head_tokens: float
    gathered: bool = True
    asking: float | None = None

    def times(self, number: float) -> Load:
        """What `number` of such loads are."""
        amounts = {name: value * number for name, value in asdict(self).items() if name != "gathered" and value}
        return replace(self, **amounts)


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of a training step, or of an epoch, by where they are spent.

    Attributes:
        tower: forward of the tower, with the ranking of its patches.
        projector: forward of projector or resampler, merging and summaries.
        decoder: forward of the decoder layers.
        head: forward of the head.
        backward: of all of them.
        recomputed: forward of the layers that activation checkpointing runs again.
        optimizer: of the update.
    """

    tower: int
    projector: int
    decoder: int
    head: int
    backward: int = 0
    recomputed: int = 0
    optimizer: int = 0

    @property
    def forward(self) -> int:
        """Of one forward."""
        return self.tower + self.projector + self.decoder + self.head

    @property
    def model(self) -> int:
        """Forward and backward: what MFU counts."""
        return self.forward + self.backward

    @property
    def total(self) -> int:
        """All."""
        return self.model + self.recomputed + self.optimizer


def prompt_load(config: LlavaSkipConfig, text_tokens: int, head_tokens: int, images: int = 1, samples: int = 1) -> Load:
    """What goes through a model with equally long samples, none padded; images have the most crops that they can have.

    Args:
        config: of a model without a reduction.
        text_tokens: tokens of a sample beside its images.
        head_tokens: of a sample that reach the head.
        images: of a sample.
        samples: of the batch.
    """
    rows = image_rows(config)
    rows = rows[:-1] or rows
    tokens = text_tokens + images * config.image_seq_length
    return Load(
        samples=samples,
        images=samples * images,
        crops=samples * images * config.most_crops,
        tokens=samples * tokens,
        pairs=samples * tokens**2,
        ffn_tokens=samples * (text_tokens + images * sum(layer.ffn for layer in rows) / len(rows)),
        head_tokens=samples * head_tokens,
        gathered=config.skip is not None,
        asking=samples if head_tokens == 1 else None,
    )


def tower_products(config: LlavaSkipConfig, crops: float) -> Products:
    """Of the tower's layers before the features, on `crops` crops, with the ranking where there is one."""
    vision = config.vision_config
    width, patches = vision.hidden_size, (vision.image_size // vision.patch_size) ** 2
    tokens, layers = patches + 1, config.used_tower_layers
    embedding = linear(patches, vision.num_channels * vision.patch_size**2, width)
    last = layers * linear(tokens, vision.intermediate_size, width)
    weights = layers * linear(tokens, width, 4 * width + vision.intermediate_size) + last
    choices = 0
    if get_front_end(config.front_end).ranks(config):
        choices = linear(tokens + 1, width, width) + linear(tokens, width, 1)
    return Products(embedding + weights, layers * 2 * linear(tokens, tokens, width), embedding, choices, last) * crops


def repeated_of_tower(products: Products) -> int:
    """What checkpointing repeats of a trainable tower: its layers, without the embedding."""
    return products.repeated - products.first


def block_products(config: LlavaSkipConfig, images: float, crops: float) -> tuple[Products, Products]:
    """Of merging and of the summaries; the scores of the summaries are the product with a weight."""
    skip, width = config.skip_config, config.text_config.hidden_size
    if skip is None or not images:
        return Products(), Products()
    others = config.visual_tokens(max(1, round(crops / images))) - skip.retained
    matched = linear(others - skip.skipped, width, skip.skipped)
    summed = linear(skip.skipped, others - skip.skipped, width)
    spans = sum(end - first for first, end in skip.spans) if skip.summary_start == "pooled" else 0
    # `choices`, both: the gradient of a merge is a look-up, without a product.
    return Products(choices=matched + summed) * images, Products(weights=linear(spans, width, 1)) * images


@dataclass(frozen=True)
class _Decoder:
    """Products of the decoder layers, and of the LoRA factors in them."""

    own: Products
    factors: Products


def _decoder(config: LlavaSkipConfig, load: Load, rank: int) -> _Decoder:
    text, before = config.text_config, config.text_config.num_hidden_layers - 1
    keys = load.pairs / load.tokens if load.tokens else 0
    flops = decoder_flops(
        text, load.tokens, load.ffn_tokens, 0, keys=keys, asking=load.asking, last_ffn_tokens=load.head_tokens
    )
    last = 0 if load.gathered else round(flops.ffn / 3)
    own = Products(round(flops.projections) + flops.ffn, states=round(flops.attention), last=last)
    width, (queries, key_values) = text.hidden_size, head_widths(text)
    asking = before * load.tokens + (load.tokens if load.asking is None else load.asking)
    factors = linear(asking, rank, 2 * (width + queries))
    factors += linear((before + 1) * load.tokens, rank, 2 * (width + key_values))
    factors += linear(before * load.ffn_tokens + load.head_tokens, rank, 3 * (width + text.intermediate_size))
    return _Decoder(own, Products(factors))


def step_flops(
    config: LlavaSkipConfig,
    load: Load,
    trained: Collection[str] = (),
    checkpointing: bool = False,
    lora_rank: int = 0,
    updated: int = 0,
) -> StepFlops:
    """FLOPs of a forward, and of the backward pass for the trained parts.

    Args:
        config: of the model.
        load: of the step; for an epoch, the sums over it.
        trained: of vision_tower, multi_modal_projector, summary and language_model; none: inference.
        checkpointing: whether layers are run again in the backward pass.
        lora_rank: rank of LoRA's factors in the language model, whose own weights are then frozen; 0: none.
        updated: trainable parameters times the number of updates, for the optimizer.
    """
    tower, decoder = tower_products(config, load.crops), _decoder(config, load, lora_rank)
    projector = get_front_end(config.front_end).projector_products(config, load.crops)
    merge, summary = block_products(config, load.images, load.crops)
    head = Products(weights=linear(load.head_tokens, config.text_config.hidden_size, config.text_config.vocab_size))
    whole = "language_model" in trained and not lora_rank
    factors = "language_model" in trained and bool(lora_rank)
    sees, visual = "vision_tower" in trained, bool({"vision_tower", "multi_modal_projector"} & set(trained))
    backward = recomputed = 0
    if trained:
        through = visual or "summary" in trained or whole or checkpointing  # the embeddings have a gradient
        backward = (
            tower.backward(sees, False)
            + projector.backward("multi_modal_projector" in trained, sees)
            + summary.backward("summary" in trained, visual)
            + decoder.own.backward(whole, through or factors)
            + decoder.factors.backward(factors, through or factors)
            + head.backward(whole, True)
        )
        if checkpointing:
            recomputed = decoder.own.repeated + decoder.factors.weights + (repeated_of_tower(tower) if sees else 0)
    return StepFlops(
        tower=tower.forward,
        projector=projector.forward + merge.forward + summary.forward,
        decoder=decoder.own.forward + decoder.factors.forward,
        head=head.forward,
        backward=backward,
        recomputed=recomputed,
        optimizer=ADAMW_FLOPS * updated,
    )
