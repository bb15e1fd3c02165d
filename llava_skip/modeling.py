"""The model: a picture becomes one block of rows, most of which skip the FFN of every decoder layer.

    front end -> visual tokens, the retained first -> merge the others -> a summary of each group
              -> retained | summary | skipped | summary -> placeholders -> decoder along the route -> logits

Shapes: B batch, T rows of a sample, N pictures of a batch, P visual tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.llava.modeling_llava import (
    LlavaCausalLMOutputWithPast,
    LlavaModelOutputWithPast,
    LlavaPreTrainedModel,
)
from transformers.utils.generic import can_return_tuple

from llava_skip.cache import ForgettingCache
from llava_skip.configuration import IGNORE_INDEX, LlavaSkipConfig
from llava_skip.decoder import build_language_model
from llava_skip.errors import UserError
from llava_skip.generation import SkippingGenerationMixin
from llava_skip.masking import is_two_dimensional, mask_skipped
from llava_skip.routing import Pictures, Route, make_route
from llava_skip.tokens import SummaryLayer, merge_tokens
from llava_skip.vision import get_front_end
from llava_skip.vision.clip import ClipTower


class LlavaSkipPreTrainedModel(LlavaPreTrainedModel):
    """What the model has with and without its head."""

    config_class = LlavaSkipConfig
    # A device map keeps what makes a picture's rows together, each of these on one device.
    _no_split_modules = ["ClipTower", "SummaryLayer"]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        for name in ("query", "vectors"):  # the parameters that belong to no module of torch
            if isinstance(parameter := getattr(module, name, None), nn.Parameter):
                init.trunc_normal_(parameter, std=0.02)


class LlavaSkipModel(LlavaSkipPreTrainedModel):
    """Vision tower, projector, summary layer and language model, without the language modelling head."""

    def __init__(self, config: LlavaSkipConfig) -> None:
        super().__init__(config)
        self.vision_tower = ClipTower(config.vision_config)
        self.front_end = get_front_end(config.front_end)
        self.multi_modal_projector = self.front_end.build_projector(config)
        self._no_split_modules = [*self._no_split_modules, type(self.multi_modal_projector).__name__]
        self.summary = _build_summary(config)
        self.language_model = build_language_model(config.text_config, config.skip_config)
        self.post_init()

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor, crop_counts: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Pictures -> `pooler_output`, the rows [N, rows, D] that replace their placeholders.

        It is a list of N tensors [rows, D] where pictures take different numbers of rows. Arguments as those of
        `FrontEnd.encode`.
        """
        tower, projector = self.vision_tower, self.multi_modal_projector
        groups = self.front_end.encode(tower, projector, pixel_values, crop_counts, self.config)
        blocks = [self.block(group.tokens) for group in groups]
        if len(groups) == 1:
            return BaseModelOutputWithPooling(pooler_output=blocks[0])
        rows = {
            p: r for group, block in zip(groups, blocks, strict=True) for p, r in zip(group.indices, block, strict=True)
        }
        return BaseModelOutputWithPooling(pooler_output=[rows[place] for place in sorted(rows)])

    def block(self, tokens: Tensor) -> Tensor:
        """Visual tokens [N, P, D], the retained first -> rows of the language model [N, rows, D]."""
        skip = self.config.skip_config
        if skip is None:
            return tokens
        retained, others = tokens.tensor_split([skip.retained], dim=1)
        return self.assemble(torch.cat([retained, merge_tokens(others, skip.skipped)], dim=1))

    def assemble(self, tokens: Tensor) -> Tensor:
        """Tokens of a picture, retained then skipped, [N, R + S, D] -> its block with the summaries [N, rows, D]."""
        assert self.config.skip_config is not None  # a dense model has no block
        pieces, start = [], 0
        for group, (first, end) in enumerate(self.config.skip_config.spans):
            assert self.summary is not None  # it is missing only where there are no spans
            pieces += [tokens[:, start:end], self.summary(tokens[:, first:end], group)]
            start = end
        return torch.cat([*pieces, tokens[:, start:]], dim=1)

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
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> LlavaModelOutputWithPast:
        """Hidden states [B, T, D]. Arguments as in transformers' LLaVA; `prompt_images` as in `Pictures.among`."""
        if use_cache is None:
            use_cache = self.config.text_config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = ForgettingCache()
        features = self._image_rows(pixel_values, crop_counts, mm_encoder_outputs)
        nothing = self._no_picture() if features is None and self.training and torch.is_grad_enabled() else None
        is_image = self.find_images(input_ids, inputs_embeds)
        inputs_embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        route, pictures = Route(), None
        if not _is_decode_step(past_key_values, inputs_embeds, features):
            pictures = Pictures.among(is_image, prompt_images, _seen(past_key_values))
            inputs_embeds = self._place(features, inputs_embeds, pictures.in_new, nothing)
            route = make_route(pictures, _not_padding(attention_mask, pictures.new), self.config.skip_config)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=self._mask(attention_mask, past_key_values, inputs_embeds, route, pictures, position_ids),
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            route=route,
            return_dict=True,
            **kwargs,
        )
        return LlavaModelOutputWithPast(image_hidden_states=features, **outputs)

    def _image_rows(
        self, pixel_values: Tensor | None, crop_counts: Tensor | None, encoded: dict | None
    ) -> Tensor | None:
        """Rows of all pictures [N * rows, D]: encoded now, or before (`generate` does, once for all beams)."""
        if encoded and pixel_values is not None:
            raise UserError("Give pixel_values or mm_encoder_outputs, not both: each stands for the same pictures.")
        if pixel_values is not None:
            encoded = {"image": self.get_image_features(pixel_values, crop_counts, return_dict=True)}
        if encoded and encoded.get("image") is not None:
            return torch.cat(list(encoded["image"].pooler_output), dim=0)
        return None

    def find_images(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Where the image tokens are [B, T], in ids [B, T] or in their embeddings [B, T, D]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            return input_ids == self.config.image_token_id
        token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(dim=-1)

    def _place(self, features: Tensor | None, embeddings: Tensor, is_image: Tensor, nothing: Tensor | None) -> Tensor:
        """Put the rows of the pictures [N * rows, D] in the places of their placeholders, in order; or add nothing."""
        rows = 0 if features is None else features.shape[0]
        if (placeholders := int(is_image.sum())) != rows:
            raise UserError(
                f"The text holds {placeholders} image placeholders, the pictures fill {rows} "
                f"({self.config.image_seq_length} a picture): give text and pictures to the processor together."
            )
        if features is not None:
            return embeddings.masked_scatter(is_image.unsqueeze(-1), features.to(embeddings))
        return embeddings if nothing is None else embeddings + nothing

    def _mask(
        self,
        mask: Tensor | None,
        cache: Cache | None,
        rows: Tensor,
        route: Route,
        pictures: Pictures | None,
        position_ids: Tensor | None,
    ) -> Tensor | None:
        """The attention mask over stored and new rows; also tells a forgetting cache which of the new ones stay."""
        if isinstance(cache, ForgettingCache):
            stored_mask = cache.begin(route, rows)
            mask = stored_mask if is_two_dimensional(mask) else mask
        if pictures is None:  # a decode step reads no configuration
            return mask
        config = self.language_model.config
        return mask_skipped(config, self.config.skip_config, rows, mask, cache, pictures, position_ids)

    def _no_picture(self) -> Tensor:
        """A zero that depends on every parameter of the picture path.

        A batch without pictures then still gives those parameters a gradient, of zero, and takes part in the
        collective operations of ZeRO, in which every rank must use the same modules in the same order: this one comes
        where pictures would, before the embedding.
        """
        pixel_values, crop_counts = self.front_end.blank(self.config)
        pixel_values = pixel_values.to(self.device, self.dtype)
        return 0.0 * self.get_image_features(pixel_values, crop_counts, return_dict=True).pooler_output.mean()


def _build_summary(config: LlavaSkipConfig) -> SummaryLayer | None:
    skip = config.skip_config
    if skip is None or not skip.spans:
        return None
    return SummaryLayer(config.text_config.hidden_size, skip.summary_start, len(skip.spans))


def _without_last(outputs: LlavaModelOutputWithPast) -> dict[str, Any]:
    return {name: value for name, value in outputs.items() if name != "last_hidden_state"}


def _is_decode_step(cache: Cache | None, rows: Tensor, features: Tensor | None) -> bool:
    """One new row a sample for a cache, without pictures: nothing to route, and no synchronisation."""
    single = features is None and rows.shape[1] == 1 and cache is not None
    return single and not (isinstance(cache, ForgettingCache) and cache.is_holding)


def _seen(cache: Cache | None) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _not_padding(mask: Any, new: int) -> Tensor | None:
    """[B, T] bool, False on padding among the `new` rows; None if none of them is padding."""
    if mask is None or not is_two_dimensional(mask):
        return None
    real = mask[:, -new:].bool()
    return None if bool(real.all()) else real


class LlavaSkipForConditionalGeneration(LlavaSkipPreTrainedModel, SkippingGenerationMixin):
    """LLaVA whose skipped visual tokens bypass the FFN; with `config.skip=None`, the dense LLaVA."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: LlavaSkipConfig) -> None:
        super().__init__(config)
        self.model = LlavaSkipModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor, crop_counts: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """See `LlavaSkipModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, crop_counts, **kwargs)

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
        logits_to_keep: int | Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> LlavaCausalLMOutputWithPast:
        """Logits [B, T, V] or a loss; arguments as in transformers' LLaVA.

        With `labels` [B, T] (-100 where nothing is learnt), `loss` is the mean cross entropy of the rows that have a
        label (or their sum over `num_items_in_batch`). In training only these reach the head, and `logits` is None,
        unless `logits_to_keep` asks for it.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            crop_counts=crop_counts,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        hidden_states, loss, logits = outputs.last_hidden_state, None, None
        if labels is not None:
            loss = self._supervised_loss(hidden_states, labels, num_items_in_batch)
        if labels is None or logits_to_keep is not None or not self.training:
            logits = self.lm_head(slice_logits_to_keep(hidden_states, 0 if logits_to_keep is None else logits_to_keep))
        return LlavaCausalLMOutputWithPast(loss=loss, logits=logits, **_without_last(outputs))

    def _supervised_loss(self, hidden_states: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
        """Next-token cross entropy over the rows whose next token has a label; 0 if none has."""
        targets = labels[:, 1:]
        supervised = targets != IGNORE_INDEX
        logits = self.lm_head(hidden_states[:, :-1][supervised]).float()
        total = nn.functional.cross_entropy(logits, targets[supervised], reduction="sum")
        return total / (supervised.sum().clamp(min=1) if items is None else items)
