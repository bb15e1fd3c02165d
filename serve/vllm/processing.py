"""Images for vLLM: the library's processor, and how many rows of a sequence an image takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)

from llava_skip.configuration import LlavaSkipConfig
from llava_skip.processing import LlavaSkipProcessor


class SkipInfo(BaseProcessingInfo):
    """What vLLM asks of a model's images."""

    def get_hf_config(self) -> LlavaSkipConfig:
        """The model's configuration."""
        return self.ctx.get_hf_config(LlavaSkipConfig)

    def get_hf_processor(self, **kwargs: object) -> LlavaSkipProcessor:
        """The saved processor, following the configuration, which may be of another reduction."""
        processor = self.ctx.get_hf_processor(LlavaSkipProcessor, **kwargs)
        processor.follow(self.get_hf_config())
        return processor

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """As many images as there is room for."""
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """The most rows of an image."""
        return {"image": self.rows(None)}

    def rows(self, size: tuple[int, int] | None) -> int:
        """Rows of an image of this width and height in pixels, or the most that one has."""
        config, skip = self.get_hf_config(), self.get_hf_config().skip_config
        if skip is not None and skip.forget_cache:
            return skip.num_kept
        return config.image_seq_length if size is None else self.get_hf_processor().image_length(*size)


class SkipDummyInputs(BaseDummyInputsBuilder[SkipInfo]):
    """An image with the most crops."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """Placeholders alone."""
        return self.info.get_hf_processor().image_token * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> Any:
        """A stripe that is cut into the most tiles, where images are cut."""
        config = self.info.get_hf_config()
        side = config.vision_config.image_size
        width = side * max(1, config.most_crops - 1)
        return {"image": [Image.new("RGB", (width, side))] * mm_counts.get("image", 0)}


class SkipImageProcessor(BaseMultiModalProcessor[SkipInfo]):
    """Pixels by the library's processor, and the rows of images in prompts."""

    def _get_hf_mm_text(self, mm_counts: Mapping[str, int]) -> str:
        return self.dummy_inputs.get_dummy_text(mm_counts)

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        if "crop_counts" not in hf_inputs:
            return {"pixel_values": MultiModalFieldConfig.batched("image")}
        counts = torch.as_tensor(hf_inputs["crop_counts"])
        pixels = MultiModalFieldConfig.flat_from_sizes("image", counts)
        return {"pixel_values": pixels, "crop_counts": MultiModalFieldConfig.batched("image")}

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptReplacement]:
        token = self.info.get_hf_config().image_token_id

        def rows(index: int) -> list[int]:
            size = mm_items.get_items("image", ImageProcessorItems).get_image_size(index)
            return [token] * self.info.rows((size.width, size.height))

        return [PromptReplacement(modality="image", target=[token], replacement=rows)]

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM; the range of the last image then reaches to the prompt's end, with the rest as no part of it.

        By that the model knows the prompt's end where vLLM hands it generated tokens along with the prompt: beam search
        does, and so may a request that begins again after it was preempted.
        """
        made = super().apply(*args, **kwargs)
        if not self.info.get_hf_config().forgets:
            return made
        ranges, length = list(made["mm_placeholders"].get("image", ())), len(made["prompt_token_ids"])
        if ranges:
            last = max(range(len(ranges)), key=lambda index: ranges[index].offset)
            reach = length - ranges[last].offset
            is_image = torch.arange(reach) < ranges[last].length
            ranges[last] = replace(ranges[last], length=reach, is_embed=is_image)
            made["mm_placeholders"] = {**made["mm_placeholders"], "image": ranges}
        return made
