"""The model: an image becomes one block of tokens, most of which skip the FFN of every decoder layer.

    front end -> visual tokens, the retained first -> merge the others -> a summary of each group
              -> retained | summary | skipped | summary -> image tokens -> decoder along the route -> logits

Shapes: B batch, T tokens of a sample, N images of a batch, P visual tokens of an image, L tokens of its block, D width,
V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
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

from llava_skip.arguments import read_arguments
from llava_skip.cache import ForgettingCache
from llava_skip.configuration import IGNORE_INDEX, LlavaSkipConfig
from llava_skip.decoder import build_language_model
from llava_skip.generation import SkippingGenerationMixin
from llava_skip.head_rows import HeadRows, next_labels, rows_for_head
from llava_skip.masking import is_two_dimensional, mask_skipped
from llava_skip.reduction.config import ReductionConfig
from llava_skip.reduction.running import check_forward, make_runner, new_cache, restored, supervised_tokens
from llava_skip.routing import ImageTokens, Route, make_route
from llava_skip.tokens import SummaryLayer, merge_tokens
from llava_skip.vision import get_front_end
from llava_skip.vision.clip import ClipTower
from llava_skip_base.errors import UserError


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

    def encode_images(
        self, pixel_values: Tensor, crop_counts: Tensor | None = None, config: LlavaSkipConfig | None = None
    ) -> Tensor | list[Tensor]:
        """Images -> the blocks [N, L, D] that replace their image tokens.

        It is a list of N tensors [L, D] where images have different lengths. Arguments as those of
        `FrontEnd.encode`.
        """
        tower, projector = self.vision_tower, self.multi_modal_projector
        groups = self.front_end.encode(tower, projector, pixel_values, crop_counts, config or self.config)
        blocks = [self.block(group.tokens) for group in groups]
        if len(groups) == 1:
            return blocks[0]
        rows = {
            p: r for group, block in zip(groups, blocks, strict=True) for p, r in zip(group.indices, block, strict=True)
        }
        return [rows[place] for place in sorted(rows)]

    def block(self, tokens: Tensor) -> Tensor:
        """Visual tokens [N, P, D], the retained first -> tokens of the language model [N, L, D]."""
        skip = self.config.skip_config
        if skip is None:
            return tokens
        retained, others = tokens.tensor_split([skip.retained], dim=1)
        return self.assemble(torch.cat([retained, merge_tokens(others, skip.skipped)], dim=1))

    def assemble(self, tokens: Tensor) -> Tensor:
        """Tokens of an image, retained then skipped, [N, R + S, D] -> its block with the summaries [N, L, D]."""
        assert self.config.skip_config is not None  # a dense model has no block
        pieces, start = [], 0
        for group, (first, end) in enumerate(self.config.skip_config.spans):
            assert self.summary is not None  # built if there are spans
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
        generated: int = 0,
        use_cache: bool | None = None,
        supervised: Tensor | None = None,
        head: HeadRows | None = None,
        **kwargs: Any,
    ) -> LlavaModelOutputWithPast:
        """States [B, T, D], or as `head` gives them; arguments as in LLaVA, `ImageTokens.of_forward`, `make_runner`."""
        config = read_arguments(self.config, kwargs)
        use_cache, cache = self._default_cache(use_cache, past_key_values)
        features, nothing = self._images(pixel_values, crop_counts, mm_encoder_outputs, config)
        found, inputs_embeds = self._embed(input_ids, inputs_embeds)
        check_forward(config, cache, attention_mask, position_ids, found.shape[1], kwargs)
        route, images = Route(), None
        if prompt_images is not None or not _is_decode_step(cache, inputs_embeds, features):
            images = ImageTokens.of_forward(found, config.skip_config, prompt_images, generated, _num_seen(cache))
            self._check_images(images, found, features, input_ids is None, prompt_images is None)
            inputs_embeds = _place(features, inputs_embeds, images, nothing)
            route = make_route(images, _not_padding(attention_mask, images.new)).with_head(head, images)
        runner = make_runner(self.config, self.language_model, route, images, attention_mask, supervised)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=self._mask(attention_mask, cache, inputs_embeds, route, images, position_ids),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=use_cache,
            route=route if runner is None else replace(route, runner=runner),
            **kwargs | {"return_dict": True},
        )
        return LlavaModelOutputWithPast(image_hidden_states=features, **restored(outputs, runner))

    def _default_cache(self, use_cache: bool | None, cache: Cache | None) -> tuple[bool, Cache | None]:
        if use_cache is None:
            use_cache = self.config.text_config.use_cache and not self.training
        if use_cache and cache is None:
            cache = new_cache(self.config)
        return use_cache, cache

    def _images(
        self, pixel_values: Tensor | None, crop_counts: Tensor | None, encoded: dict | None, config: LlavaSkipConfig
    ) -> tuple[Tensor | None, Tensor | None]:
        """The blocks of all images [N * L, D], encoded now, or before (`generate` does, once for all beams).

        In training without images, also a zero in their place, see `_no_picture`.
        """
        if encoded and pixel_values is not None:
            raise UserError("Give pixel_values or mm_encoder_outputs, not both: both are the same images.")
        if pixel_values is not None:
            return torch.cat(list(self.encode_images(pixel_values, crop_counts, config)), dim=0), None
        if encoded and encoded.get("image") is not None:
            return torch.cat(list(encoded["image"].pooler_output), dim=0), None
        return None, self._no_picture() if self.training and torch.is_grad_enabled() else None

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[Tensor, Tensor]:
        """Where the image tokens are [B, T], and embeddings [B, T, D]."""
        found = self.find_images(input_ids, inputs_embeds)
        return found, self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds

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
        self._check_images(images, found, image_features.flatten(0, -2), embeddings=False, whole=True)
        return found.unsqueeze(-1)

    def _check_images(
        self, images: ImageTokens, found: Tensor, features: Tensor | None, embeddings: bool, whole: bool
    ) -> None:
        """Raise UserError if the image tokens of a forward are not those of the images.

        Args:
            images: where image tokens must be.
            found: [B, T] bool, where they are.
            features: [N * L, D], the images; None if there are none.
            embeddings: whether embeddings were given, which may hold the images already.
            whole: whether no image may be cut.
        """
        if torch.compiler.is_exporting():  # a graph cannot depend on values
            return
        is_image, length = images.in_new, 0 if features is None else len(features)
        differ = (is_image != found)[:, : images.new - images.generated]
        size = 1 if images.skip is None or not whole else images.skip.length
        cut = is_image.sum(dim=1) % size
        counts = torch.stack([is_image.sum(), found.sum(), differ.sum(), cut.sum()]).tolist()
        num_tokens, num_found, num_wrong, num_cut = counts
        if embeddings and features is None and num_found == 0:
            return
        if num_wrong:
            raise UserError(
                f"prompt_images and the tokens of this forward differ in {num_wrong} positions: its columns are the "
                "tokens of the prompt up to the last new one."
            )
        if num_tokens != length:
            raise UserError(
                f"The text has {num_tokens} image tokens, the images fill {length} "
                f"({self.config.image_seq_length} an image): give text and images to the processor together."
            )
        if num_cut:
            raise UserError(
                f"A sample has a part of an image, whose block is {size} tokens: give whole images, or the image "
                "tokens of the whole prompt so far as prompt_images."
            )

    def _mask(
        self,
        mask: Tensor | None,
        cache: Cache | None,
        inputs_embeds: Tensor,
        route: Route,
        images: ImageTokens | None,
        position_ids: Tensor | None,
    ) -> Tensor | None:
        """The attention mask over stored and new tokens; also says to a forgetting cache which new ones stay."""
        if isinstance(cache, ForgettingCache):
            stored_mask = cache.begin(route, inputs_embeds)
            mask = stored_mask if is_two_dimensional(mask) else mask
        if images is None:  # a decode step
            return mask
        return mask_skipped(self.language_model.config, inputs_embeds, mask, cache, images, position_ids)

    def _no_picture(self) -> Tensor:
        """A zero that depends on every parameter of the image path.

        A batch without images then still gives those parameters a gradient, of zero, and takes part in the
        collective operations of ZeRO, in which every rank must use the same modules in the same order: this one comes
        where images would, before the embedding.
        """
        pixel_values, crop_counts = self.front_end.blank(self.config)
        pixel_values = pixel_values.to(self.device, self.dtype)
        return 0.0 * torch.as_tensor(self.encode_images(pixel_values, crop_counts)).mean()


def _build_summary(config: LlavaSkipConfig) -> SummaryLayer | None:
    skip = config.skip_config
    if skip is None or not skip.spans:
        return None
    return SummaryLayer(config.text_config.hidden_size, skip.summary_start, len(skip.spans))


def _place(features: Tensor | None, embeddings: Tensor, images: ImageTokens, nothing: Tensor | None) -> Tensor:
    """Replace the image tokens by the blocks of the images [N * L, D], in order; or add `nothing`."""
    if features is not None:
        return embeddings.masked_scatter(images.in_new.unsqueeze(-1), features.to(embeddings))
    return embeddings if nothing is None else embeddings + nothing


def _without_last(outputs: LlavaModelOutputWithPast) -> dict[str, Any]:
    return {name: value for name, value in outputs.items() if name != "last_hidden_state"}


def _is_decode_step(cache: Cache | None, inputs_embeds: Tensor, features: Tensor | None) -> bool:
    """One new token a sample for a cache, without images: nothing to route, and no synchronisation."""
    single = features is None and inputs_embeds.shape[1] == 1 and cache is not None
    return single and not (isinstance(cache, ForgettingCache) and cache.in_chunks)


def _num_seen(cache: Cache | None) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _not_padding(mask: Any, new: int) -> Tensor | None:
    """[B, T] bool, False on padding among the `new` tokens; None if none of them is padding, or a graph asks."""
    if mask is None or not is_two_dimensional(mask) or torch.compiler.is_exporting():
        return None
    real = mask[:, -new:].bool()
    return None if bool(real.all()) else real


class LlavaSkipForConditionalGeneration(LlavaSkipPreTrainedModel, SkippingGenerationMixin):
    """LLaVA whose skipped visual tokens bypass the FFN; with `config.skip=None`, the dense LLaVA."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: LlavaSkipConfig) -> None:
        super().__init__(config)
        self.model = LlavaSkipModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
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
        head = rows_for_head(self.config, input_ids, inputs_embeds, targets, self.training, logits_to_keep, kwargs)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            crop_counts=crop_counts,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            supervised=supervised_tokens(self.config, labels, shift_labels),
            head=head,
            **kwargs | {"return_dict": True},
        )
        loss, logits = self._read(outputs.last_hidden_state, targets, head, logits_to_keep, num_items_in_batch)
        return LlavaCausalLMOutputWithPast(loss=loss, logits=logits, **_without_last(outputs))

    def _read(
        self, states: Tensor, targets: Tensor | None, head: HeadRows | None, keep: int | Tensor | None, items: Any
    ) -> tuple[Tensor | None, Tensor | None]:
        """Loss and logits, each None where nothing asks for it."""
        loss = None if targets is None else self._supervised_loss(states, targets, head, items)
        if self.training and loss is not None and keep is None:
            return loss, None
        return loss, self.lm_head(slice_logits_to_keep(states, 0 if keep is None else keep))

    def _supervised_loss(
        self, hidden_states: Tensor, targets: Tensor, head: HeadRows | None, items: Tensor | int | None
    ) -> Tensor:
        """Next-token cross entropy over the tokens whose next token has a label; 0 if none has."""
        if head is None or head.tokens is None:
            supervised = targets != IGNORE_INDEX
            hidden_states, targets = hidden_states[supervised], targets[supervised]
        else:
            hidden_states, targets = hidden_states.squeeze(0), targets.flatten().index_select(0, head.tokens)
        total = nn.functional.cross_entropy(self.lm_head(hidden_states).float(), targets, reduction="sum")
        return total / (max(1, len(targets)) if items is None else items)
