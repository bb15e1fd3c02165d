"""What `generate` does otherwise for a skipping model: whatever the cache, generated rows do not see skipped rows.

A `ForgettingCache` has dropped them. A cache of another kind, which keeps every row, has their keys masked; without a
cache, `forward` masks them. The hooks are those of transformers' `GenerationMixin`, in the order of their calls.

Shapes: B batch, W rows of a sample so far.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llava_skip.cache import ForgettingCache
from llava_skip.configuration import SkipConfig
from llava_skip.masking import hide_skipped


class SkippingGenerationMixin(GenerationMixin):
    """transformers' `GenerationMixin` for a model whose `forward` takes `prompt_images`."""

    config: Any
    model: Any

    @property
    def _forgets(self) -> SkipConfig | None:
        """The method, if generated rows do not see skipped rows."""
        skip = self.config.skip_config
        return skip if skip is not None and skip.forget_cache else None

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any], model_input_name: str, generation_config: Any
    ) -> dict[str, Any]:
        """Encodes the pictures; also tells `forward` where the prompt has placeholders, and so where it ends."""
        model_kwargs = super()._maybe_prepare_encoder_kwargs_for_generation(
            inputs_tensor, model_kwargs, model_input_name, generation_config
        )
        rows = {model_input_name: inputs_tensor}
        is_image = self.model.find_images(rows.get("input_ids"), rows.get("inputs_embeds"))
        mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get("past_key_values")
        width = generation_config._mask_length if mask is None else mask.shape[1]
        is_image = nn.functional.pad(is_image, (width - is_image.shape[1], 0))  # a second turn may give new rows alone
        if cache is not None and cache.get_seq_length() > 0:
            earlier = is_image & (torch.arange(width, device=is_image.device) < cache.get_seq_length())
            encoded = model_kwargs.get("mm_encoder_outputs") or {}
            if encoded.get("image") is not None:  # a second turn may give the pictures of the first one again
                image = _new_pictures(encoded["image"], earlier[is_image])
                model_kwargs["mm_encoder_outputs"] = {**encoded, "image": image}
            # An assistant goes on behind what the other model has generated, which is text.
            is_image = is_image & ~earlier & (not generation_config.is_assistant)
            if self._forgets and not isinstance(cache, ForgettingCache):
                model_kwargs["attention_mask"] = hide_skipped(mask, earlier, self._forgets)
        return model_kwargs | {"prompt_images": is_image}

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        """The default cache is the forgetting one; a cache that was asked for stays as it is."""
        own_choice = model_kwargs.get("past_key_values") is not None
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        cache = model_kwargs.get("past_key_values")
        if not own_choice and cache is not None and type(cache) is DynamicCache and not cache.offloading:
            model_kwargs["past_key_values"] = ForgettingCache()

    def _get_candidate_generator(self, *, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        """An assistant, of whatever kind, gets what any model takes."""
        kept = {name: value for name, value in model_kwargs.items() if name != "prompt_images"}
        return super()._get_candidate_generator(model_kwargs=kept, **kwargs)

    def _prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], is_first_iteration: bool = True
    ) -> Any:
        """The prompt, perhaps in chunks, which see each other's skipped rows; an assistant sees its pictures too."""
        cache = model_kwargs.get("past_key_values")
        first = is_first_iteration or (cache is not None and cache.get_seq_length() == 0)
        in_chunks = generation_config.prefill_chunk_size is not None
        with cache.holding() if in_chunks and isinstance(cache, ForgettingCache) else nullcontext():
            return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=first)

    def create_masks_for_generate(self, attention_mask: Tensor | None, is_first_iteration: bool, **kwargs: Any) -> Any:
        """For a static cache: the mask of a decode step. `forward` makes that of a prompt, from what is skipped."""
        if is_first_iteration:
            return attention_mask
        return create_masks_for_generate(attention_mask=attention_mask, **kwargs)

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Once the prompt is through, masks its skipped rows in a cache that keeps them."""
        mask, is_image = model_kwargs.get("attention_mask"), model_kwargs["prompt_images"]
        cache, is_prompt = model_kwargs.get("past_key_values"), mask is None or mask.shape[1] == is_image.shape[1]
        keeps = cache is not None and not isinstance(cache, ForgettingCache)
        if keeps and is_prompt and self._forgets:
            model_kwargs["attention_mask"] = hide_skipped(mask, is_image, self._forgets)
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)


def _new_pictures(encoded: BaseModelOutputWithPooling, earlier: Tensor) -> BaseModelOutputWithPooling:
    """The rows of pictures without those in a cache already; `earlier` [rows] says which, if all have come."""
    rows = torch.cat(list(encoded.pooler_output))
    return encoded if len(rows) != len(earlier) else BaseModelOutputWithPooling(pooler_output=[rows[~earlier]])
