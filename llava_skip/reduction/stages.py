"""Runs a method that drops image tokens between decoder layers: "from this layer on, these tokens are left".

The tokens of a forward between two cuts are a stage. Behind a cut the hidden states have fewer tokens, packed to the
right where samples keep different numbers; the stage has their mask, their positions and the tokens that take the FFN.
Whatever the attention implementation, no attention map is made: the few tokens that ask are scored on their own.

Shapes: B batch, T tokens of a forward, N tokens of a stage, K tokens that a layer has stored, Q asking tokens, H heads,
E head width, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.masking_utils import create_causal_mask

from llava_skip.cache import join_masks, unless_all
from llava_skip.head_rows import HeadRows
from llava_skip.reduction.cache import StagedCache, Stored
from llava_skip.reduction.in_decoder import Choice, Cut, DropRule
from llava_skip.reduction.scoring import CutView, KeyRecorder, keys_of, rows_of, wide
from llava_skip.routing import align_right

if TYPE_CHECKING:
    from llava_skip.decoder import SkippingLayer
    from llava_skip.reduction.config import ReductionConfig


@dataclass(frozen=True)
class PromptTokens:
    """What a method can know of the tokens of a forward before the decoder runs.

    Attributes:
        is_image: [B, T] bool.
        real: [B, T] bool, False on padding.
        supervised: [B, T] bool, the tokens whose next one has a label; None without labels.
        generated: number of tokens at the end that come after the prompt.
    """

    is_image: Tensor
    real: Tensor
    supervised: Tensor | None = None
    generated: int = 0

    @property
    def answers(self) -> Tensor:
        """[B, T] bool, the tokens just before an answer begins; only with labels."""
        assert self.supervised is not None
        before = torch.nn.functional.pad(self.supervised[:, :-1], (1, 0))
        return self.supervised & ~before

    @property
    def predicts(self) -> Tensor:
        """[B, T] bool, the tokens whose next one matters: those with a label, without labels the last one."""
        return _last_of(self.real) if self.supervised is None else self.supervised

    @property
    def in_prompt(self) -> Tensor:
        """[B, T] bool, the tokens up to the last one of the prompt; with labels, up to the first answer."""
        prompt = self.real.clone()
        prompt[:, prompt.shape[1] - self.generated :] = False
        if self.supervised is None:
            return prompt
        return prompt & (self.supervised.cumsum(dim=1) - self.supervised.long() == 0)

    @property
    def last(self) -> Tensor:
        """[B, T] bool, the last token of the prompt; with labels, the one just before the first answer."""
        return _last_of(self.in_prompt)

    @property
    def behind_images(self) -> Tensor:
        """[B, T] bool, the text of the prompt behind the first image token."""
        return self.in_prompt & ~self.is_image & (self.is_image.cumsum(dim=1) > 0)

    def pack(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Where chosen tokens [B, T] are: index [B, Q] into T, packed to the right, and [B, Q] bool, which count."""
        return align_right(chosen)


@dataclass(frozen=True)
class Stage:
    """The tokens of a forward from one cut on.

    Attributes:
        places: [B, N], where in the forward a token comes from.
        live: [B, N] bool, False on padding.
        is_image: [B, N] bool, merged tokens included.
        is_new: [B, N] bool, tokens that a method has merged; None if there are none.
        index: [B, N], where in the stage before (and then the merged tokens) a token comes from; None: as it was.
        merged: weights of the merged tokens, see `Choice`.
        positions: [B or 1, N].
        arguments: mask, positions and rotary embedding for the layers; empty: those that the model gives.
        ffn_tokens: [M], flat indices of the tokens that take the FFN; None if all do.
        whole: whether no token of this forward has been dropped.
    """

    places: Tensor
    live: Tensor
    is_image: Tensor
    positions: Tensor
    is_new: Tensor | None = None
    index: Tensor | None = None
    merged: Tensor | None = None
    arguments: dict[str, Any] | None = None
    ffn_tokens: Tensor | None = None
    whole: bool = True

    def to(self, device: torch.device) -> Stage:
        """On a device: a device map may have put the layers of a cut on another one than the first layer."""
        moved: dict[str, Any] = {
            field.name: value.to(device)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor) and value.device != device
        }
        return replace(self, **moved) if moved else self

    def take(self, hidden_states: Tensor) -> Tensor:
        """The hidden states of the stage before -> [B, N, D]."""
        if self.index is None:
            return hidden_states
        if self.merged is not None:
            new = (self.merged.to(hidden_states) @ hidden_states).to(hidden_states.dtype)
            hidden_states = torch.cat([hidden_states, new], dim=1)
        return hidden_states.gather(1, wide(self.index.to(hidden_states.device), hidden_states))

    def after(self, choice: Choice) -> Stage:
        """The tokens behind a cut, packed to the right; without positions and arguments."""
        keep, new = self.live & choice.keep, 0 if choice.merged is None else choice.merged.shape[1]
        places, images, is_new = (
            self.places,
            self.is_image,
            torch.zeros_like(keep) if self.is_new is None else self.is_new,
        )
        order = torch.arange(keep.shape[1], device=keep.device).expand_as(places) * (new + 1)
        if choice.merged is not None:
            assert choice.is_merged is not None
            last = (self.is_image * torch.arange(keep.shape[1], device=keep.device)).amax(dim=1, keepdim=True)
            behind = last * (new + 1) + 1 + torch.arange(new, device=keep.device)
            order, keep = torch.cat([order, behind], dim=1), torch.cat([keep, choice.is_merged], dim=1)
            added = torch.ones_like(choice.is_merged)
            places = torch.cat([places, places.gather(1, last).expand(-1, new)], dim=1)
            images, is_new = torch.cat([images, added], dim=1), torch.cat([is_new, added], dim=1)
        sequence = order.argsort(dim=1, stable=True)
        packed, live = align_right(keep.gather(1, sequence))
        index = sequence.gather(1, packed)
        return Stage(
            places=places.gather(1, index),
            live=live,
            is_image=images.gather(1, index) & live,
            positions=self.positions,
            is_new=is_new.gather(1, index),
            index=index,
            merged=choice.merged,
            ffn_tokens=None if bool(live.all()) else live.flatten().nonzero().squeeze(1),
            whole=False,
        )


class Stages:
    """The stages of one forward. A layer that runs again for its gradient finds what was decided the first time."""

    def __init__(
        self,
        reduction: ReductionConfig,
        cuts: tuple[Cut, ...],
        language_model: Any,
        prompt: PromptTokens | None,
        has_images: bool,
        ffn_tokens: Tensor | None,
        mask: Tensor | None,
        head: HeadRows | None = None,
    ) -> None:
        """Before the first layer.

        Args:
            reduction: a `DropRule` with its numbers.
            cuts: where tokens are dropped.
            language_model: has the configuration and the rotary embedding.
            prompt: the tokens; None in a decode step, where all are text.
            has_images: whether image tokens are among them.
            ffn_tokens: flat indices of the tokens that take the FFN before the first cut; None if all do.
            mask: [B, K + T] of the forward, False or 0 on padding; None if nothing is padded.
            head: what the last layer computes; None: all tokens.
        """
        assert isinstance(reduction.rule, DropRule)
        self.rule, self.reduction = reduction.rule, reduction
        self.cuts = {cut.layer: cut for cut in cuts}
        self.config: PreTrainedConfig = language_model.config
        self.rotary = language_model.rotary_emb
        self.prompt, self.has_images, self.ffn_tokens = prompt, has_images, ffn_tokens
        self._mask, self._before = mask, {0: Stored()}
        self.head = head
        self._stages: dict[int, Stage] = {}
        self._asking: Tensor | None = None
        self._stays: Tensor | None = None

    def run(self, layer: SkippingLayer, hidden_states: Tensor, arguments: dict[str, Any]) -> Tensor:
        """A decoder layer on the tokens of its stage: [B, N, D] -> [B, N, D], fewer if a cut is decided behind it."""
        index = layer.self_attn.layer_idx
        if not self._stages:
            self._begin(hidden_states, arguments)
        if self.rule.scores_before and index in self.cuts:
            if index not in self._stages:
                self._decide(index, layer, hidden_states, None, arguments)
            hidden_states = self._stages[index].take(hidden_states)
        stage, behind = self._stage_of(index), index + 1
        arguments = arguments | _on(hidden_states.device, stage.arguments or {})
        if self.head is not None and index == self.head.layer:
            return self._head_of(self.head, stage).run(layer, hidden_states, arguments)
        if self.rule.scores_before or behind not in self.cuts:
            return layer.run(hidden_states, stage.ffn_tokens, arguments)
        recorder = KeyRecorder(arguments.get("past_key_values"))
        outputs = layer.run(hidden_states, stage.ffn_tokens, arguments | {"past_key_values": recorder})
        if behind not in self._stages:
            self._decide(behind, layer, hidden_states, outputs, arguments, recorder.keys)
        return self._stages[behind].take(outputs)

    def restore(self, hidden_states: Tensor) -> Tensor:
        """The tokens of the last stage at their places: [B, N, D] -> [B, T, D], zeros where one was dropped.

        Those that reach the head are there, in their order.
        """
        stage = self._stage_of(max(self._stages))
        if stage.whole or self.head is not None:
            return hidden_states
        first = self._stages[0]
        length = first.places.shape[1]
        stays = stage.live if stage.is_new is None else stage.live & ~stage.is_new
        place = torch.where(stays, stage.places, length).to(hidden_states.device)
        room = hidden_states.new_zeros(len(place), length + 1, hidden_states.shape[2])
        return room.scatter(1, wide(place, hidden_states), hidden_states)[:, :length]

    def _head_of(self, head: HeadRows, stage: Stage) -> HeadRows:
        """What the last layer computes, among the tokens of its stage; what is not among them gives zeros."""
        if stage.whole:
            return head
        stay = None if stage.ffn_tokens is None else ~stage.live
        batch, length = self._stages[0].places.shape
        width = stage.places.shape[1]
        own = stage.live if stage.is_new is None else stage.live & ~stage.is_new
        if head.tokens is None:  # the last one alone
            return replace(head, stay=stay, gone=~own[:, -1:] | (stage.places[:, -1:] < length - 1))
        order = torch.arange(width, device=own.device).expand(batch, -1)
        room = torch.full((batch, length + 1), -1, device=own.device)
        here = room.scatter(1, torch.where(own, stage.places, length), order)[:, :length]
        tokens = head.tokens.to(own.device)
        here = here.flatten().index_select(0, tokens)
        tokens, gone = tokens // length * width + here.clamp(min=0), here < 0
        # All are asked: where the first of these is, the device knows.
        return replace(head, number=width, tokens=tokens, stay=stay, gone=gone)

    def _stage_of(self, layer: int) -> Stage:
        return self._stages[max(start for start in self._stages if start <= layer)]

    @torch.no_grad()
    def _begin(self, hidden_states: Tensor, arguments: dict[str, Any]) -> None:
        batch, tokens = hidden_states.shape[:2]
        places = torch.arange(tokens, device=hidden_states.device).expand(batch, -1)
        nothing = torch.zeros(batch, tokens, dtype=torch.bool, device=hidden_states.device)
        live, images = (~nothing, nothing) if self.prompt is None else (self.prompt.real, self.prompt.is_image)
        self._stages[0] = Stage(places, live, images, arguments["position_ids"], ffn_tokens=self.ffn_tokens)
        if isinstance(cache := arguments.get("past_key_values"), StagedCache):
            self._before |= cache.stored
        if self.prompt is not None and self.has_images:
            if self._mask is not None and self._mask.shape[1] > tokens:
                self._before[0] = Stored(self._mask[:, :-tokens].bool())
            self._asking = self.rule.asking(self.prompt, hidden_states)
            # An image at the end of a prompt, as with the captions of stage 1: its last token gives the next one.
            self._stays = self.prompt.predicts & images

    @torch.no_grad()
    def _decide(
        self,
        start: int,
        layer: SkippingLayer,
        inputs: Tensor,
        outputs: Tensor | None,
        arguments: dict[str, Any],
        keys: Tensor | None = None,
    ) -> None:
        """Decide which tokens the layers from `start` on see, and store what that means for them."""
        stage, cache = self._stage_of(start - 1).to(inputs.device), arguments.get("past_key_values")
        arguments = arguments | _on(inputs.device, stage.arguments or {})
        stored = self._before.get(start, Stored())
        behind = replace(stage, index=None, merged=None)
        if self._asking is not None:
            if keys is None:
                stored_keys = cache.keys_of(start) if isinstance(cache, StagedCache) else None
                keys = keys_of(layer, inputs, arguments["position_embeddings"], stored_keys)
            before = stored if self.rule.scores_before else self._stored_in(start - 1)
            asking, stays = (self._here(tokens, stage) for tokens in (self._asking, self._stays))
            num_images = self._stages[0].is_image.sum(dim=1).to(inputs.device)
            embeddings = arguments["position_embeddings"]
            view = CutView(layer, inputs, outputs, keys, before.mask, embeddings, stage, asking, stays, num_images)
            choice = self.rule.choose(view, self.cuts[start], self.reduction)
            if bool((stage.live & ~choice.keep).any()):
                behind = stage.after(choice)
        self._stages[start] = self._placed(start, behind, stored, cache, inputs, arguments)

    @staticmethod
    def _here(tokens: Tensor | None, stage: Stage) -> Tensor:
        """Which tokens [B, N] of a stage are among tokens [B, T] of the forward; merged ones are none of them."""
        assert tokens is not None  # there are images
        here = tokens.to(stage.places.device).gather(1, stage.places) & stage.live
        return here if stage.is_new is None else here & ~stage.is_new

    def _stored_in(self, layer: int) -> Stored:
        """What a layer had stored before this forward."""
        return self._before[max(start for start in self._before if start <= layer)]

    def _placed(
        self, start: int, stage: Stage, stored: Stored, cache: Cache | None, like: Tensor, arguments: dict[str, Any]
    ) -> Stage:
        """The stage with its positions and its mask; says to the cache what its layers will hold."""
        positions, embeddings, shift = self._positions(stage, stored, like, arguments)
        live = unless_all(stage.live)
        if not isinstance(cache, StagedCache):
            mask, cache = live, None
        else:
            mask = join_masks(stored.mask, cache.get_query_offset(start), live, stage.live.shape[1], like)
            cache.store_from(start, Stored(mask, shift), None if stage.whole else self._tail())
        shape = like.new_empty(0).expand(*stage.places.shape, 0)  # the mask reads sizes, type and device alone
        made = create_causal_mask(self.config, shape, mask, cache, layer_idx=start)
        # Flash attention would take positions with gaps for several sequences in one.
        ids = arguments["position_ids"] if stage.whole and stored.shift is None else None
        changed = {"attention_mask": made, "position_ids": ids, "position_embeddings": embeddings}
        return replace(stage, positions=positions, arguments=changed)

    def _positions(
        self, stage: Stage, stored: Stored, like: Tensor, arguments: dict[str, Any]
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
        """Positions of the tokens of a stage, their rotary embedding, and how much smaller they are at the end."""
        first = self._stages[0].to(like.device)
        whole = first.positions.expand(len(stage.places), -1)
        shift = stored.shift
        if stage.whole and shift is None:
            return stage.positions, arguments["position_embeddings"], None
        if stage.whole and shift is not None:
            positions = whole - shift
        elif not self.rule.renumbered(self.reduction):
            own, tables = stage.places, arguments["position_embeddings"]
            index = own if stage.index is None else stage.index
            assert stage.merged is None  # a merged token has no position of its own
            positions = stage.positions.expand(len(own), -1)
            if stage.index is not None:
                positions, tables = positions.gather(1, index), tuple(rows_of(table, index) for table in tables)
            return positions, tables, None
        else:
            begin = whole.gather(1, first.live.to(torch.uint8).argmax(dim=1, keepdim=True))
            positions = (begin - (0 if shift is None else shift) + stage.live.cumsum(dim=1) - 1).clamp(min=0)
            shift = whole.gather(1, stage.places[:, -1:]) - positions[:, -1:]
        return positions, self.rotary(like, positions), shift

    def _tail(self) -> int:
        """How many of the last tokens are text in all samples, so that each layer stores them as the last ones."""
        first = self._stages[0]
        text = (first.live & ~first.is_image).all(dim=0)
        return int(text.flip(0).to(torch.uint8).cumprod(dim=0).sum())


def _last_of(tokens: Tensor) -> Tensor:
    """The last one of each sample among tokens [B, T] bool."""
    return tokens & (tokens.flip(1).cumsum(dim=1).flip(1) == 1)


def _on(device: torch.device, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments on a device: a device map may have put this layer on another one."""

    def moved(value: Any) -> Any:
        return tuple(map(moved, value)) if isinstance(value, tuple) else value.to(device) if value is not None else None

    return {name: moved(value) for name, value in arguments.items()}
