"""What `generate` does for a skipping model: whatever the cache, generated tokens do not see skipped ones.

A `ForgettingCache` has dropped them. In a cache of another kind, which keeps every token, their keys are masked;
without a cache, `forward` masks them. All of this needs to know where the prompt has image tokens and where it ends.

Shapes: B batch, P tokens of the prompt, W tokens of a sample so far.
"""

from __future__ import annotations

from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationMixin, PreTrainedTokenizerBase
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llava_skip.arguments import features_config
from llava_skip.cache import ForgettingCache, num_seen
from llava_skip.configuration import SkipConfig
from llava_skip.counts import TokenCounts, count_tokens
from llava_skip.reduction.running import check_chunks, own_cache
from llava_skip.routing import ImageTokens, skipped_tokens
from llava_skip.static_cache import StaticForgettingCache
from llava_skip_base.errors import UserError


@dataclass
class Prompt:
    """The prompt of one call of `generate`, and how much of it the forwards have had.

    Attributes:
        is_image: [B, P] bool, its image tokens, without those that the cache has already.
        skipped: [B, P] bool, the skipped tokens among them; None if generated tokens may see them.
        skipped_before: [B, P] bool, the skipped tokens of earlier turns in the cache; None if there are none.
        num_ids: number of ids of the prompt; fewer than P if `generate` was given embeddings or the cache of a turn.
        position: number of tokens of the prompt that are in the cache.
        counts: of the prompt; None if it is not all of ids and mask.
        chunks: open while the prompt comes in chunks.
    """

    is_image: Tensor
    skipped: Tensor | None
    skipped_before: Tensor | None
    num_ids: int
    position: int
    counts: TokenCounts | None = None
    chunks: ExitStack = field(default_factory=ExitStack)

    @property
    def length(self) -> int:
        """P."""
        return self.is_image.shape[1]

    @property
    def is_done(self) -> bool:
        """Whether the cache has the whole prompt, so that all new tokens were generated."""
        return self.position >= self.length

    def repeat_for(self, samples: int) -> None:
        """Repeat each sample for its beams, as `generate` has done with the ids."""
        repeats = samples // len(self.is_image)
        for name in ("is_image", "skipped", "skipped_before"):
            if repeats > 1 and (tensor := getattr(self, name)) is not None:
                setattr(self, name, tensor.repeat_interleave(repeats, dim=0))
        if repeats > 1 and self.counts is not None:
            self.counts = self.counts.repeated(repeats)

    def hide_skipped(self, mask: Tensor | None, width: int) -> Tensor | None:
        """The mask [B, W] of a forward over a cache that keeps every token: skipped ones keep position, lose key."""
        hidden = self.skipped_before
        if self.is_done and self.skipped is not None:
            hidden = self.skipped if hidden is None else hidden | self.skipped
        if hidden is None:
            return mask
        mask = torch.ones(len(hidden), width, dtype=torch.long, device=hidden.device) if mask is None else mask
        return mask.masked_fill(nn.functional.pad(hidden, (0, mask.shape[1] - self.length)), 0)

    def is_padded(self, cache: Cache | None) -> bool | None:
        """Whether the mask of a decode step has padding, or hides tokens; None: it is not known."""
        if self.counts is None or isinstance(cache, ForgettingCache):
            return None
        return self.counts.padding > 0 or self.skipped is not None

    def advance(self, cache: Cache | None, num_new: int) -> dict[str, Any]:
        """Count the new tokens of a forward; returns the arguments that say where its image tokens are."""
        if self.is_done and num_new == 1:
            return {"padded": self.is_padded(cache)}
        if self.is_done:
            return {"prompt_images": self.is_image[:, :0], "generated": num_new}
        end = self.position + num_new
        if isinstance(cache, ForgettingCache) and end < self.length and not cache.in_chunks:
            self.chunks.enter_context(cache.chunked_prefill())
        counts = self.counts if self.position == 0 and end == self.length else None
        self.position = 0 if cache is None else end
        return {"prompt_images": self.is_image[:, :end], "generated": max(0, end - self.length), "counts": counts}


NEW_TOKENS = 20
"""Tokens that `generate` makes if nothing says how many."""
_OF_GENERATE = ("tokenizer", "assistant_tokenizer")
"""Arguments of `generate` that it hands on to the forward, which does not know them."""

# Not a keyword argument of the forwards: transformers would hand it on to an assistant of another kind, which refuses.
_PROMPT: ContextVar[Prompt | None] = ContextVar("prompt", default=None)


class SkippingGenerationMixin(GenerationMixin):
    """transformers' `GenerationMixin` for a model whose `forward` takes `prompt_images` and `generated`."""

    config: Any
    model: Any
    _tokenizer: PreTrainedTokenizerBase | None = None
    _most_places = 0  # of the static caches of earlier calls: one of the same size needs no new compiled step

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the default cache of a model that forgets is a `ForgettingCache`."""
        is_assistant = getattr(generation_config, "is_assistant", False)
        if is_assistant or "prepare_inputs_for_generation" in vars(self):
            # In chunks, transformers gives an assistant no images, and PEFT, which replaces that method to put vectors
            # before a prompt, gives each chunk all of them. What a prompt becomes does not depend on its chunks.
            kwargs["prefill_chunk_size"] = None
        check_chunks(self.config, self._chosen("prefill_chunk_size", generation_config, kwargs))
        made = self._choose_cache(inputs, generation_config, kwargs)
        self._give_tokenizer(generation_config, kwargs)
        prompt = self._read_prompt(inputs, is_assistant, kwargs)
        token = _PROMPT.set(prompt)
        try:
            with prompt.chunks:
                return super().generate(inputs, generation_config, *args, **kwargs)
        finally:
            _PROMPT.reset(token)
            self._most_places = max(self._most_places, 0 if made is None else made.places)

    def _chosen(self, name: str, generation_config: Any, kwargs: dict[str, Any]) -> Any:
        """A setting of `generate`: its argument, else that of the given configuration, else that of the model's own."""
        places = kwargs.get(name), getattr(generation_config, name, None), getattr(self.generation_config, name)
        return next((value for value in places if value is not None), None)

    def _give_tokenizer(self, generation_config: Any, kwargs: dict[str, Any]) -> None:
        """Add the tokenizer to the arguments of `generate` where the answer ends with a text (see `llava_skip.ends`).

        A pipeline of transformers gives none.
        """
        stops = self._chosen("stop_strings", generation_config, kwargs)
        if not stops or kwargs.get("tokenizer") is not None:
            return
        if self._tokenizer is None:
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(self.name_or_path or "no folder")
            except (OSError, ValueError) as error:
                raise UserError(
                    f"The model ends an answer with the text {stops}, and its tokenizer, which finds it, is not in "
                    f"{self.name_or_path or 'a folder'!r}: give generate tokenizer=processor.tokenizer."
                ) from error
        kwargs["tokenizer"] = self._tokenizer

    def _choose_cache(
        self, inputs: Tensor | None, generation_config: Any, kwargs: dict[str, Any]
    ) -> StaticForgettingCache | None:
        """Add the model's own kind of cache to the arguments of `generate`, unless they ask for another one or none.

        Returns:
            The cache, if it is a new static one.
        """
        if isinstance(given := kwargs.get("past_key_values"), StaticForgettingCache):
            given.give_room(self._count_new(inputs, generation_config, kwargs))
        if (own := own_cache(self.config)) is None:
            return None
        kind = self._chosen("cache_implementation", generation_config, kwargs)
        uses_cache = self._chosen("use_cache", generation_config, kwargs) is not False
        uses_cache = uses_cache or kwargs.get("inputs_embeds") is not None
        if self.config.forgets and kind == "static":
            least = max(self._most_places, self._chosen("max_cache_len", generation_config, kwargs) or 0)
            own, kind = StaticForgettingCache(self._count_new(inputs, generation_config, kwargs), least), "dynamic"
        if uses_cache and kwargs.get("past_key_values") is None and kind in (None, "dynamic"):
            kwargs["past_key_values"] = own
            if kind is not None:  # transformers takes a cache or a name, not both
                kwargs["cache_implementation"] = None
            return own if isinstance(own, StaticForgettingCache) else None
        return None

    def _count_new(self, inputs: Tensor | None, generation_config: Any, kwargs: dict[str, Any]) -> int:
        """The most tokens that `generate` will make."""
        new = self._chosen("max_new_tokens", generation_config, kwargs)
        if new is not None:
            return new
        most = self._chosen("max_length", generation_config, kwargs)
        ids = kwargs.get("input_ids") if inputs is None else inputs
        return NEW_TOKENS if most is None else max(1, most - (0 if ids is None else ids.shape[1]))

    def _read_prompt(self, inputs: Tensor | None, is_assistant: bool, kwargs: dict[str, Any]) -> Prompt:
        """The prompt in the arguments of `generate`; completes them in place."""
        ids, embeddings = kwargs.get("input_ids") if inputs is None else inputs, kwargs.get("inputs_embeds")
        if ids is None and embeddings is None:  # transformers starts with the token that begins a sequence
            ids = torch.full((1, 1), -1, device=self.device)
        is_image = self._find_images(ids, embeddings)
        if embeddings is not None and kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = torch.ones_like(is_image, dtype=torch.long)  # of the ids, where both are given
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        counts = self._count(is_image, embeddings, kwargs)
        self._encode_images(kwargs, counts)
        width = is_image.shape[1] if mask is None else mask.shape[1]
        if width < is_image.shape[1]:
            raise UserError(f"attention_mask has {width} columns for a prompt of {is_image.shape[1]} tokens.")
        is_image = nn.functional.pad(is_image, (width - is_image.shape[1], 0))  # a second turn may give new ids alone
        position, before = num_seen(cache), None
        if 0 < width <= position:
            raise UserError(
                f"The cache has {position} tokens, ids and attention_mask {width}: give generate the ids of the whole "
                "conversation, or at least the whole mask, of the tokens in the cache and the new ones."
            )
        if position > 0:
            before = is_image & (torch.arange(width, device=is_image.device) < position)
            self._drop_earlier_images(kwargs, before[is_image])
            is_image = is_image & ~before
            if is_assistant:  # all that is new to it was generated by the other model
                is_image, before = is_image[:, :position], before[:, :position]
        skip: SkipConfig | None = self.config.skip_config
        skipped, skipped_before = (
            None if skip is None or not skip.forget_cache or images is None else skipped_tokens(images, skip)
            for images in (is_image, before)
        )
        num_ids = (0 if ids is None else ids.shape[1]) + is_image.shape[1] - width
        return Prompt(is_image, skipped, skipped_before, num_ids, position, counts)

    def _count(self, is_image: Tensor, embeddings: Tensor | None, kwargs: dict[str, Any]) -> TokenCounts | None:
        """The counts of a prompt [B, P] that is all of ids and mask, read before the tower runs."""
        mask, begun = kwargs.get("attention_mask"), num_seen(kwargs.get("past_key_values")) > 0
        if embeddings is not None or begun or mask is None or mask.shape != is_image.shape:
            return None
        images = ImageTokens.of_forward(is_image, self.config.skip_config, is_image)
        return count_tokens(images, is_image, mask, crop_counts=kwargs.get("crop_counts"))

    def _find_images(self, ids: Tensor | None, embeddings: Tensor | None) -> Tensor:
        """The image tokens [B, T] of what is given; of embeddings that hold the images already, the ids say where.

        Raises:
            UserError: both have image tokens, but at different places.
        """
        if embeddings is None or ids is None or not (known := self.model.find_images(ids, None)).any():
            return self.model.find_images(ids if embeddings is None else None, embeddings)
        found = self.model.find_images(None, embeddings)
        known = nn.functional.pad(known, (found.shape[1] - known.shape[1], 0))
        if bool(found.any()) and bool((wrong := found != known).any()):
            raise UserError(f"The image tokens of input_ids and inputs_embeds differ in {int(wrong.sum())} positions.")
        return known

    def _encode_images(self, kwargs: dict[str, Any], counts: TokenCounts | None) -> None:
        """Replace the pixels in the arguments of `generate` by their blocks."""
        config = features_config(self.config, kwargs)
        given = {name: kwargs.pop(name, None) for name in ("pixel_values", "crop_counts")}
        if given["pixel_values"] is None:
            return
        encoded = kwargs.get("mm_encoder_outputs") or {}
        if encoded.get("image") is not None:
            raise UserError("Give pixel_values or mm_encoder_outputs, not both: both are the same images.")
        if counts is not None and counts.crops:
            given["crop_counts"] = counts.crops
        blocks = self.model.encode_images(**given, config=config)
        kwargs["mm_encoder_outputs"] = {**encoded, "image": BaseModelOutputWithPooling(pooler_output=blocks)}

    def _drop_earlier_images(self, kwargs: dict[str, Any], earlier: Tensor) -> None:
        """If a second turn gives all images again, leave out those that the cache has.

        Args:
            kwargs: of `generate`; changed in place.
            earlier: for each image token of the prompt, whether it is in the cache.
        """
        encoded = kwargs.get("mm_encoder_outputs") or {}
        if encoded.get("image") is None:
            return
        tokens = torch.cat(list(encoded["image"].pooler_output))
        if len(tokens) == len(earlier):
            left = BaseModelOutputWithPooling(pooler_output=[tokens[~earlier]])
            kwargs["mm_encoder_outputs"] = {**encoded, "image": left}

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in transformers; also where the forward has image tokens, and which stored tokens it may not see."""
        prompt, arguments = _PROMPT.get(), {}
        kwargs = {name: value for name, value in kwargs.items() if name not in _OF_GENERATE}
        if prompt is not None:
            prompt.repeat_for(len(input_ids))
            if prompt.is_done:
                prompt.chunks.close()
            # The first forward of an assistant has images too, which transformers leaves out.
            is_first_iteration = is_first_iteration or (past_key_values is not None and prompt.position == 0)
            tokens = inputs_embeds if is_first_iteration and inputs_embeds is not None else input_ids
            num_new = min(next_sequence_length or tokens.shape[1], tokens.shape[1])
            if past_key_values is not None and not isinstance(past_key_values, ForgettingCache):
                generated = input_ids.shape[1] - prompt.num_ids
                width = prompt.length + generated if prompt.is_done else prompt.position + num_new
                attention_mask = prompt.hide_skipped(attention_mask, width)
            arguments = prompt.advance(past_key_values, num_new)
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        return inputs | arguments

    def create_masks_for_generate(self, attention_mask: Tensor | None, is_first_iteration: bool, **kwargs: Any) -> Any:
        """For a static cache: the mask of a decode step. `forward` makes that of a prompt, from what is skipped."""
        cache, single = kwargs.get("past_key_values"), kwargs["inputs_embeds"].shape[1] == 1
        if isinstance(cache, StaticForgettingCache) and single and not (is_first_iteration or cache.in_chunks):
            cache.fix()
            attention_mask = cache.step_mask(len(kwargs["inputs_embeds"]))
        elif is_first_iteration or isinstance(cache, StaticForgettingCache):
            return attention_mask
        return create_masks_for_generate(attention_mask=attention_mask, **kwargs)
