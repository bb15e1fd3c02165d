"""Bytes that training and inference hold on a GPU: weights, gradients, optimizer states, activations; by formula.

The activations are what autograd saves for the backward pass; a test compares the formulas with what it does save. What
a product needs only while it runs, and what an allocator leaves between tensors, is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import PreTrainedConfig

from llava_skip.configuration import LlavaSkipConfig
from llava_skip.flops import head_widths
from llava_skip.head import rows_at_once
from llava_skip.step_flops import Load
from llava_skip.vision import get_front_end

FLOAT = 4
"""Bytes of a float32."""
INDEX = 8
"""Bytes of an index."""
MASTER, MOMENTS = 4, 8
"""Bytes of a parameter's float32 copy and of AdamW's two moments."""


def layer_bytes(text: PreTrainedConfig, load: Load, element: int = 2, masked: bool = True, last: bool = False) -> int:
    """What autograd saves of one decoder layer (Llama, Mistral, Qwen2, Qwen3) with attention that forms no map.

    Norms keep their input in float32, the input divided by its norm, and their output. Attention keeps q, k, v, its
    output and a number for each head; with a mask it keeps the mask, and k and v once for each query head. The FFN
    keeps gate, activated gate, up and their product; where its tokens are gathered, what it gave as well.

    Args:
        text: of the language model.
        load: of a micro batch; its `tokens` and `pairs` include padding, its `ffn_tokens` do not.
        element: bytes of a number.
        masked: whether attention gets a mask, as for a padded batch.
        last: whether it is the last layer, in which fewer tokens ask and take the FFN (`llava_skip.head_rows`).
    """
    width, inner, heads = text.hidden_size, text.intermediate_size, text.num_attention_heads
    queries, key_values = head_widths(text)
    norm = FLOAT * width + FLOAT + 2 * element * width
    asks, asked = element * 2 * queries + FLOAT * heads, element * 2 * (queries if masked else key_values)
    if text.model_type == "qwen3":  # norms of each head's query and key
        asks += (FLOAT + element) * queries + FLOAT * heads
        asked += (FLOAT + element) * key_values + FLOAT * text.num_key_value_heads
    ffn = norm + 4 * element * inner + (element * width if load.gathered and not last else 0)
    asking = load.asking if last and load.asking is not None else load.tokens
    in_ffn = load.head_tokens if last else load.ffn_tokens
    seen = element * load.pairs * asking / load.tokens if masked and load.tokens else 0
    return round(load.tokens * (norm + asked) + asking * asks + in_ffn * ffn + seen)


def tower_bytes(config: LlavaSkipConfig, crops: float, element: int = 2) -> int:
    """What autograd saves of the layers of a trainable tower: states, attention and the three of its MLP."""
    vision = config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    layer = element * (8 * vision.hidden_size + 3 * vision.intermediate_size)
    layer += FLOAT * (vision.num_attention_heads + 4)  # a sum for each head; mean and deviation of two norms
    return round(crops * tokens * config.used_tower_layers * layer)


def block_bytes(config: LlavaSkipConfig, load: Load, element: int = 2) -> int:
    """What autograd saves of merging and summaries: each token's mean, the R + S tokens, and norms of each span."""
    skip, width = config.skip_config, config.text_config.hidden_size
    if skip is None or not load.images:
        return 0
    others = config.visual_tokens(max(1, round(load.crops / load.images))) - skip.retained
    spans = sum(end - first for first, end in skip.spans) if skip.summary_start == "pooled" else 0
    numbers = skip.skipped + (skip.retained + skip.skipped + spans) * width
    return round(load.images * (INDEX * others + element * numbers))


def placed_bytes(config: LlavaSkipConfig, load: Load, element: int = 2) -> int:
    """What autograd saves where images replace image tokens: the tokens of their blocks, and the places of these."""
    if not load.images:
        return 0
    tokens = load.images * config.image_length(max(1, round(load.crops / load.images)))
    return round(tokens * (element * config.text_config.hidden_size + INDEX))


def head_bytes(text: PreTrainedConfig, tokens: float, element: int = 2) -> int:
    """The states of the supervised tokens, their logits and the gradient of these; for many tokens, of a part.

    With parts there is a float32 sum of the gradient of the head's weight, see `llava_skip.head`.
    """
    at_once, weight = rows_at_once(text.vocab_size), FLOAT * text.hidden_size * text.vocab_size
    logits = 2 * FLOAT * text.vocab_size * min(tokens, at_once)
    return round(element * text.hidden_size * tokens + logits + (weight if tokens > at_once else 0))


@dataclass(frozen=True)
class Activations:
    """Bytes of a micro batch on one GPU.

    Attributes:
        decoder: saved of all decoder layers; with checkpointing, their inputs.
        working: of one layer while it is run again; 0 without checkpointing.
        vision: saved of tower, projector, merging, summaries and their blocks, as far as they are trainable.
        logits: of the supervised tokens and of their gradient, see `head_bytes`.
    """

    decoder: int
    working: int
    vision: int
    logits: int

    @property
    def total(self) -> int:
        """The peak: logits are gone when a layer is run again."""
        return self.decoder + self.vision + max(self.working, self.logits)


def activations(
    config: LlavaSkipConfig,
    load: Load,
    trains_tower: bool,
    trains_projector: bool,
    checkpointing: bool,
    element: int = 2,
    masked: bool = True,
) -> Activations:
    """Of a micro batch; arguments as those of `layer_bytes` and `step_flops`."""
    text, front_end = config.text_config, get_front_end(config.front_end)
    layer = layer_bytes(text, load, element, masked)
    last = layer_bytes(text, load, element, masked, last=True)
    last_norm = round(load.head_tokens * (FLOAT * text.hidden_size + FLOAT + element * text.hidden_size))
    states = round(load.tokens * text.hidden_size * element)
    tower = 0
    if trains_tower:
        tower = tower_bytes(config, load.crops, element)
        if checkpointing:
            vision = config.vision_config
            patches = (vision.image_size // vision.patch_size) ** 2 + 1
            tower = round(load.crops * patches * vision.hidden_size * element * config.used_tower_layers)
    projector = front_end.projector_bytes(config, load.crops, element) if trains_tower or trains_projector else 0
    block = block_bytes(config, load, element) + placed_bytes(config, load, element) if projector else 0
    return Activations(
        decoder=(text.num_hidden_layers - 1) * (states if checkpointing else layer)
        + (states if checkpointing else last)
        + last_norm,
        working=layer if checkpointing else 0,
        vision=tower + projector + block,
        logits=head_bytes(text, load.head_tokens, element),
    )


@dataclass(frozen=True)
class Zero:
    """How DeepSpeed divides a model's states among processes.

    Attributes:
        stage: 0 to 3; None: no DeepSpeed, trainable parameters in float32.
        offload_optimizer: whether gradients and optimizer states are in the host's memory.
        offload_weights: whether weights are too (stage 3).
    """

    stage: int | None = None
    offload_optimizer: bool = False
    offload_weights: bool = False


@dataclass(frozen=True)
class States:
    """Bytes that one GPU holds for the whole run, and what its process holds in the host's memory.

    Attributes:
        weights: of all parameters, or of this process's part, with the layers that ZeRO-3 has gathered.
        gradients: of the trainable parameters.
        optimizer: the float32 copy and AdamW's moments.
        update: a float32 copy of the gradients while the optimizer runs, when there are no activations.
        host: bytes in the host's memory for each process.
    """

    weights: int
    gradients: int
    optimizer: int
    update: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        """On the GPU, without `update`."""
        return self.weights + self.gradients + self.optimizer


def states(parameters: int, trainable: int, largest: int, zero: Zero, processes: int, element: int = 2) -> States:
    """What a model's states take on one of `processes` GPUs.

    Weights and gradients are in the training's format, the optimizer in float32 (ZeRO, section 3).

    Args:
        parameters: of the model.
        trainable: of them.
        largest: parameters that ZeRO-3 gathers at once: of two layers, or of the head.
        zero: the stage.
        processes: among which it divides.
        element: bytes of a weight.
    """
    if zero.stage is None:
        frozen = (parameters - trainable) * element
        return States(frozen + FLOAT * trainable, FLOAT * trainable, MOMENTS * trainable)
    weights = element * parameters
    gathered = 0
    if zero.stage == 3:
        weights, gathered = -(-weights // processes), element * largest
    share = -(-trainable // processes) if zero.stage else trainable
    gradients = element * (share if zero.stage >= 2 else trainable)
    found = States(weights + gathered, gradients, (MASTER + MOMENTS) * share, FLOAT * share)
    if zero.offload_optimizer:
        host = found.optimizer + found.update
        found = replace(found, gradients=0, optimizer=0, update=0, host=host)
    if zero.offload_weights:
        found = replace(found, weights=gathered, host=found.host + weights)
    return found


def cache_token_bytes(text: PreTrainedConfig, element: int = 2) -> int:
    """Bytes of one token's keys and values in all layers."""
    return text.num_hidden_layers * 2 * head_widths(text)[1] * element
