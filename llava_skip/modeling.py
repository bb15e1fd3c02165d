"""The model: an image becomes one block of tokens, most of which skip the FFN of every decoder layer.

    front end -> visual tokens, the retained first -> merge the others -> a summary of each group
              -> retained | summary | skipped | summary -> image tokens -> decoder along the route -> logits

Shapes: B batch, T tokens of a sample, N images of a batch, P visual tokens of an image, L tokens of its block, D width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import (
    LlavaCausalLMOutputWithPast,
    LlavaModelOutputWithPast,
    LlavaPreTrainedModel,
)
from transformers.utils.generic import can_return_tuple

from llava_skip.arguments import read_arguments
from llava_skip.blocks import ImageBlocks
from llava_skip.cache import is_decode_step, num_seen
from llava_skip.configuration import IGNORE_INDEX, LlavaSkipConfig
from llava_skip.counts import TokenCounts, check_images, next_labels, num_supervised, supervised_tokens, with_counts
from llava_skip.decoder import build_language_model
from llava_skip.generation import SkippingGenerationMixin
from llava_skip.head import Head, slice_logits_to_keep, summed_loss
from llava_skip.head_rows import HeadRows, rows_for_head
from llava_skip.masking import find_real, forward_mask, latest_tokens, one_sequence
from llava_skip.per_sample import arguments_of_row
from llava_skip.reduction.config import ReductionConfig
from llava_skip.reduction.running import check_forward, make_runner, new_cache, restored
from llava_skip.reduction.stages import Stages
from llava_skip.routing import ImageTokens, Route, make_route, place_images, take_tokens, true_indices
from llava_skip.vision.stored import Pixels, TowerFeatures
from llava_skip_base.errors import UserError


@dataclass
class SkippingModelOutput(LlavaModelOutputWithPast):
    """transformers' output of LLaVA without its head, and where the supervised tokens are.

    Attributes:
        supervised: flat indices into [B * T] of the tokens whose next one has a label; None without labels.
    """

    supervised: Tensor | None = None


class LlavaSkipPreTrainedModel(LlavaPreTrainedModel):
    """What the model has with and without its head."""

    config_class = LlavaSkipConfig
    # A device map keeps each of these modules, which make an image's block, on one device.
    _no_split_modules = ["ClipTower", "SummaryLayer"]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        for name in ("query", "vectors"):  # the parameters that belong to no module of torch
            parameter = getattr(module, name, None)
            if isinstance(parameter, nn.Parameter) and not getattr(parameter, "has_start_values", False):
                init.trunc_normal_(parameter, std=0.02)


class LlavaSkipModel(ImageBlocks, LlavaSkipPreTrainedModel):
    """Vision tower, projector, summary layer and language model, without the language modelling head."""

    def __init__(self, config: LlavaSkipConfig) -> None:
        super().__init__(config)
        self.build_image_modules(config)
        self._no_split_modules = [*self._no_split_modules, type(self.multi_modal_projector).__name__]
        self.language_model = build_language_model(config.text_config, config.skip_config)
        self.post_init()

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        crop_counts: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Images -> `pooler_output`, see `encode_images`, and what the whole tower gives, as in transformers' LLaVA.

        The tower's layers after the features run for `last_hidden_state` alone, which no forward needs.
        """
        config = read_arguments(self.config, kwargs)
        blocks = self.encode_images(pixel_values, crop_counts, config)
        outputs = self.vision_tower.outputs(pixel_values, **kwargs)
        outputs.pooler_output = blocks
        return outputs

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        crop_counts: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        prompt_images: Tensor | None = None,
        generated: int = 0,
        use_cache: bool | None = None,
        supervised: Tensor | None = None,
        counts: TokenCounts | None = None,
        padded: bool | None = None,
        vision_features: TowerFeatures | None = None,
        head: HeadRows | None = None,
        **kwargs: Any,
    ) -> SkippingModelOutput:
        """States [B, T, D], or as `head` gives them; arguments as in LLaVA, `ImageTokens.of_forward`, `with_counts`.

        In a decode step `padded` says whether `attention_mask` has padding; None: it is not known.
        """
        config, images = read_arguments(self.config, kwargs), None
        use_cache, cache = self._default_cache(use_cache, past_key_values)
        found, encoded = self.find_images(input_ids, inputs_embeds), (mm_encoder_outputs or {}).get("image")
        check_forward(config, cache, attention_mask, position_ids, found.shape[1], kwargs)
        pixels: Pixels | None = pixel_values if vision_features is None else vision_features.of_images(pixel_values)
        if any(x is not None for x in (pixels, encoded, prompt_images)) or not is_decode_step(cache, found.shape[1]):
            images = ImageTokens.of_forward(found, self.config.skip_config, prompt_images, generated, num_seen(cache))
            latest = latest_tokens(images, cache)
            images = with_counts(images, counts, found, attention_mask, supervised, crop_counts, latest)
        features, nothing = self._images(pixels, crop_counts, encoded, config, images)
        embeds = self._embed(input_ids, inputs_embeds, features, nothing, images, whole=prompt_images is None)
        kwargs |= {"position_ids": position_ids, "use_cache": use_cache}
        rows = None if supervised is None else true_indices(supervised, num_supervised(images))
        head = None if head is None or images is None else head.counted(images.counts, rows)
        outputs = self._run(embeds, images, attention_mask, cache, supervised, padded, head, kwargs)
        return SkippingModelOutput(image_hidden_states=features, supervised=rows, **outputs)

    def _run(
        self,
        embeds: Tensor,
        images: ImageTokens | None,
        mask: Any,
        cache: Cache | None,
        supervised: Tensor | None,
        padded: bool | None,
        head: HeadRows | None,
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        """What the language model gives for embeddings [B, T, D] that hold the images."""
        route = Route() if images is None else make_route(images, find_real(mask, images)).with_head(head, images)
        runner = make_runner(self.config, self.language_model, route, images, mask, supervised)
        config, position_ids = self.language_model.config, kwargs["position_ids"]
        mask = forward_mask(config, embeds, mask, cache, route, images, position_ids, padded)
        counts, is_cut = None if images is None else images.counts, isinstance(runner, Stages)  # into fewer tokens
        if not is_cut and (row := arguments_of_row(config, len(embeds), mask, cache, position_ids, counts)):
            kwargs, position_ids = row | kwargs, None
        outputs = self.language_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            past_key_values=one_sequence(config, mask, cache, position_ids),
            route=route if runner is None else replace(route, runner=runner),
            **kwargs | {"return_dict": True},
        )
        return dict(restored(outputs, runner)) | {"past_key_values": cache}

    def _default_cache(self, use_cache: bool | None, cache: Cache | None) -> tuple[bool, Cache | None]:
        if use_cache is None:
            use_cache = self.config.text_config.use_cache and not self.training
        if use_cache and cache is None:
            cache = new_cache(self.config)
        return use_cache, cache

    def _images(
        self,
        pixel_values: Pixels | None,
        crop_counts: Tensor | Sequence[int] | None,
        encoded: BaseModelOutputWithPooling | None,
        config: LlavaSkipConfig,
        images: ImageTokens | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The blocks of all images [N * L, D], encoded now, or before (`generate` does, once for all beams).

        In training without images, also a zero in their place, see `_no_picture`.
        """
        if encoded is not None:
            if pixel_values is not None:
                raise UserError("Give pixel_values or mm_encoder_outputs, not both: both are the same images.")
            return torch.cat(list(encoded.pooler_output), dim=0), None
        if pixel_values is not None:
            counts = None if images is None else images.counts
            crop_counts = crop_counts if counts is None else counts.crops or crop_counts
            return torch.cat(list(self.encode_images(pixel_values, crop_counts, config)), dim=0), None
        return None, self._no_picture() if self.training and torch.is_grad_enabled() else None

    def _embed(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        features: Tensor | None,
        nothing: Tensor | None,
        images: ImageTokens | None,
        whole: bool,
    ) -> Tensor:
        """Embeddings [B, T, D] with the images [N * L, D] in their places; `whole` is whether none may be cut."""
        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if images is None:
            return embeds
        self._check_images(images, features, input_ids is None, whole)
        if features is None:
            return embeds if nothing is None else embeds + nothing
        return place_images(features, embeds, images)

    def find_images(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Where the image tokens are [B, T], in ids [B, T] or in their embeddings [B, T, D]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            return input_ids == self.config.image_token_id
        token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(dim=-1)

    def get_placeholder_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor, image_features: Tensor) -> Tensor:
        """[B, T, 1] bool, the image tokens; as in transformers' LLaVA, whose arguments these are."""
        found = self.find_images(input_ids, None if input_ids is not None else inputs_embeds)
        images = ImageTokens.of_forward(found, self.config.skip_config)
        images = with_counts(images, None, found)
        self._check_images(images, image_features.flatten(0, -2), embeddings=False, whole=True)
        return found.unsqueeze(-1)

    def _check_images(self, images: ImageTokens, features: Tensor | None, embeddings: bool, whole: bool) -> None:
        """See `check_images`; `features` [N * L, D] are the images."""
        length = None if features is None else len(features)
        check_images(images, length, embeddings, whole, self.config.image_seq_length)

    def _no_picture(self) -> Tensor:
        """A zero that depends on every parameter of the image path.

        A batch without images then still gives those parameters a gradient, of zero, and takes part in the
        collective operations of ZeRO, in which every rank must use the same modules in the same order: this one comes
        where images would, before the embedding.
        """
        pixel_values, crop_counts = self.front_end.blank(self.config)
        pixel_values = pixel_values.to(self.device, self.dtype)
        return 0.0 * torch.as_tensor(self.encode_images(pixel_values, crop_counts)).mean()


def _without_last(outputs: LlavaModelOutputWithPast) -> dict[str, Any]:
    return {name: value for name, value in outputs.items() if name not in ("last_hidden_state", "supervised")}


class LlavaSkipForConditionalGeneration(LlavaSkipPreTrainedModel, SkippingGenerationMixin):
    """LLaVA whose skipped visual tokens bypass the FFN; with `config.skip=None`, the dense LLaVA."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: LlavaSkipConfig) -> None:
        super().__init__(config)
        self.model = LlavaSkipModel(config)
        self.lm_head = Head(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def set_reduction(self, reduction: ReductionConfig | None) -> None:
        """From now on give the language model fewer tokens of an image by this rival method; None: by none.

        The processor must write as many image tokens: `processor.follow(model.config)`.

        Raises:
            UserError: the method does not fit the model.
        """
        changed = self.config.with_reduction(reduction)
        self.config.reduction = changed.reduction  # of the inner model, too: it is one object

    def get_image_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See `LlavaSkipModel.get_image_features`."""
        return self.model.get_image_features(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        crop_counts: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        logits_to_keep: int | Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> LlavaCausalLMOutputWithPast:
        """Logits [B, T, V] or a loss; arguments as in transformers' LLaVA.

        With `labels` [B, T] (-100 where there is none), `loss` is the mean cross entropy of the tokens that have a
        label (or their sum over `num_items_in_batch`); `shift_labels` [B, T] are the labels of each token's next one.
        In training only these reach the head, and `logits` is None, unless `logits_to_keep` asks for it.
        """
        targets = next_labels(labels) if shift_labels is None else shift_labels
        supervised = supervised_tokens(labels, targets)
        decoder, trains = self.model.language_model, self.training
        head = rows_for_head(self.config, decoder, input_ids, inputs_embeds, supervised, trains, logits_to_keep, kwargs)
        outputs = self.model(
            input_ids=input_ids, pixel_values=pixel_values, crop_counts=crop_counts, attention_mask=attention_mask,
            position_ids=position_ids, past_key_values=past_key_values, inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs, supervised=supervised, head=head, **kwargs | {"return_dict": True},
        )  # fmt: skip
        states, loss, logits = outputs.last_hidden_state, None, None
        if targets is not None:
            loss = self._supervised_loss(states, targets, outputs.supervised, num_items_in_batch)
        if loss is None or logits_to_keep is not None or not self.training:
            logits = self.lm_head(slice_logits_to_keep(states, 0 if logits_to_keep is None else logits_to_keep))
        return LlavaCausalLMOutputWithPast(loss=loss, logits=logits, **_without_last(outputs))

    def _supervised_loss(self, states: Tensor, targets: Tensor, tokens: Tensor, items: Tensor | int | None) -> Tensor:
        """Next-token cross entropy over the tokens [M] whose next token has a label; 0 if none has.

        `states` are those of all tokens, [B, T, D], or of these alone, [1, M, D].
        """
        own = take_tokens(states, tokens) if states.shape[:2] == targets.shape else states.squeeze(0)
        total = summed_loss(self.lm_head, own, take_tokens(targets, tokens))
        return total / ((targets != IGNORE_INDEX).sum().clamp(min=1) if items is None else items)
