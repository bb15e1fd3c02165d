"""The model in vLLM: the library's image modules, vLLM's language model, and what is done with skipped rows.

A model that keeps every key gives vLLM all rows of an image, each with a channel that says whether it skips. One that
forgets gives it only the kept rows, which carry the skipped ones, with the positions of the whole sequence.

Shapes: N images, L tokens of a block, T rows of a forward, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.interfaces import SupportsMRoPE, SupportsMultiModal
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY

from llava_skip.blocks import ImageBlocks
from llava_skip.configuration import LlavaSkipConfig
from serve.vllm import rows
from serve.vllm.config import LANGUAGE_MODELS
from serve.vllm.layers import Forward, Hooks
from serve.vllm.processing import SkipDummyInputs, SkipImageProcessor, SkipInfo

NAMES = WeightsMapper(
    orig_to_new_prefix={
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.summary.": "summary.",
        "lm_head.": "language_model.lm_head.",
    }
)


@MULTIMODAL_REGISTRY.register_processor(SkipImageProcessor, info=SkipInfo, dummy_inputs=SkipDummyInputs)
class SkippingModelForVllm(ImageBlocks, nn.Module, SupportsMultiModal, SupportsMRoPE):
    """Skipping, forgetting and dense models; which of these follows from the configuration."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config: LlavaSkipConfig = vllm_config.model_config.hf_config
        text, skip = self.config.text_config, self.config.skip_config
        with self._mark_tower_model(vllm_config, "image"):  # type: ignore[operator]
            self.build_image_modules(self.config)
        with self._mark_language_model(vllm_config):  # type: ignore[operator]
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=text,
                architectures=[LANGUAGE_MODELS[text.model_type]],
                prefix=maybe_prefix(prefix, "language_model"),
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors
        self.hooks = None if skip is None else Hooks(self.language_model.model.layers, skip)
        self.forgotten = rows.Block.of(skip) if self.config.forgets else None
        self._most_rows = vllm_config.scheduler_config.max_num_batched_tokens
        self._images: tuple[Tensor, Tensor] | None = None
        """Of the forward that follows: which rows are of images [T] bool, and these rows with what they carry."""

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """What stands for an image in a text."""
        return "<image>"

    # --- images

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        """For each image its rows with what they carry."""
        pixels, counts = kwargs.get("pixel_values"), kwargs.get("crop_counts")
        if pixels is None:
            return []
        if not isinstance(pixels, Tensor):
            pixels = torch.cat([own if own.ndim == 4 else own[None] for own in pixels])
        if counts is not None:
            counts = [int(count) for count in counts]
        blocks, skip = self.encode_images(pixels.flatten(0, -4), counts), self.config.skip_config
        if skip is None:
            return list(blocks)
        made = torch.stack(list(blocks))
        return list(rows.mark(made, skip) if self.forgotten is None else rows.pack(made, self.forgotten))

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """Embeddings [T, D]; what the rows of images carry is kept for the forward, which vLLM calls next."""
        self._images = None
        if self.hooks is None or not multimodal_embeddings:
            return super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)
        made, width = torch.cat(list(multimodal_embeddings)), self.config.text_config.hidden_size
        assert is_multimodal is not None  # vLLM gives it with the embeddings
        self._images = is_multimodal.to(made.device), made
        return super().embed_input_ids(input_ids, [made[:, :width]], is_multimodal=is_multimodal)

    # --- forward

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """The positions of a request's rows, and what is added for later ones; see `rows.positions`."""
        assert self.forgotten is not None  # others are not asked
        places = [feature.mm_position for feature in mm_features]
        prompt = max((place.offset + place.length for place in places), default=0)
        starts = sorted(place.offset for place in places)
        return rows.positions(len(input_tokens), starts, prompt, self.forgotten)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """States [T, D] of embeddings [T, D] at positions [T], or [3, T] of a model that forgets."""
        images, self._images = self._images, None
        if positions.ndim == 2:
            positions, marks = positions[0], positions[1]
            if (starts := _sequence_starts()) is not None:
                self._check_whole(marks, starts)
            elif inputs_embeds is not None and len(inputs_embeds) == self._most_rows:
                self._try_most_rows(inputs_embeds)
        if images is None or inputs_embeds is None:
            return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds)
        is_image = nn.functional.pad(images[0], (0, len(inputs_embeds) - len(images[0])))  # a graph's batch is padded
        if self.forgotten is None:
            skips = torch.zeros_like(is_image).masked_scatter(is_image, images[1][:, -1] > 0.5)
            return self._run(Forward((~skips).nonzero().flatten()), positions, inputs_embeds)
        assert starts is not None and self.forgotten is not None
        _, skipped = rows.unpack(images[1], self.forgotten, inputs_embeds.shape[-1])
        made = rows.expand(positions, marks, is_image, starts, self.forgotten)
        embeds = torch.cat([inputs_embeds, skipped.to(inputs_embeds.dtype)])[made.order]
        return self._run(Forward(made.kept, made), made.positions, embeds)[made.kept]

    def _run(self, forward: Forward, positions: Tensor, embeds: Tensor) -> Tensor:
        """The language model's own layers, not compiled, with some of their calls in the hands of the hooks."""
        assert self.hooks is not None
        context = get_forward_context()
        with ExitStack() as stack:
            stack.callback(setattr, context, "skip_compiled", context.skip_compiled)
            context.skip_compiled = True  # a compiled model does not see that a forward has images
            stack.enter_context(self.hooks.running(forward))
            return self.language_model.model(None, positions, None, embeds)

    def _try_most_rows(self, embeds: Tensor) -> None:
        """In vLLM's trial run, which measures memory: a forward of T rows that are all of images, with skipped ones."""
        assert self.forgotten is not None
        self._most_rows = 0  # once: trial runs of other sizes are for graphs
        most = -(-len(embeds) * self.forgotten.length // len(self.forgotten.kept))
        order = torch.arange(most, device=embeds.device)
        made = rows.Expanded(order, order[: len(embeds)], torch.zeros_like(order), [])
        self._run(Forward(made.kept, made), made.positions, embeds.new_zeros(most, embeds.shape[1]))

    def _check_whole(self, marks: Tensor, starts: Tensor) -> None:
        """Raise RuntimeError if a prompt with images is not whole: its text would not see skipped rows, in silence."""
        if len(rows.check_whole(marks, starts)):
            raise RuntimeError(
                "A prompt with images came in parts, or a part of it from the prefix cache; a model that forgets "
                "(skip.forget_cache) needs it whole. The plug-in sets enable_prefix_caching and enable_chunked_prefill "
                "to false for it: do not change them afterwards."
            )

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """States -> logits [T, V]."""
        return self.language_model.compute_logits(hidden_states)

    # --- weights

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a saved model; layers of the tower behind the features may lack."""
        loaded = AutoWeightsLoader(self).load_weights(weights, mapper=NAMES)
        unused = [f"vision_tower.encoder.layers.{n}." for n in range(self.config.read_tower_layers, 999)]
        return loaded | {
            name for name, _ in self.named_parameters() if name.startswith((*unused, "vision_tower.post_"))
        }


def _sequence_starts() -> Tensor | None:
    """[R + 1], the first row of each sequence of this forward and the end of the last one; None in a trial run.

    Raises:
        RuntimeError: the attention backend does not say it.
    """
    found = get_forward_context().attn_metadata
    if not found:
        return None
    metadata = next(iter(found.values()))
    if (starts := getattr(metadata, "query_start_loc", None)) is None:
        raise RuntimeError(
            f"{type(metadata).__name__} does not say where sequences begin, which a model that forgets "
            "(skip.forget_cache) needs: start with --attention-backend FLASH_ATTN or TRITON_ATTN."
        )
    return starts
