"""The method as data: `SkipConfig`, and the model's configuration around it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlavaConfig

from llava_skip.folder_code import config_map, write_module
from llava_skip.reduction.config import ReductionConfig
from llava_skip.vision import get_front_end
from llava_skip.vision.resampler import ResamplerConfig
from llava_skip_base.errors import UserError

MOST_TOKENS = 1_000_000
"""More tokens than any image has."""
IGNORE_INDEX = -100
"""Label of a token that is not supervised."""


SUMMARY_STARTS = ("pooled", "mean", "learned")
"""How a summary token starts: softmax-pooled by a small layer (the paper), the plain mean, or a learned vector."""


@dataclass(frozen=True)
class SkipConfig:
    """Which visual tokens of an image take the whole decoder and which ones skip its FFN (paper, section 3).

    An image becomes one block of `length` tokens: its R + S tokens, and after the last token of each span of
    `summaries` the summary of that span. By default that is
    `retained | summary of the retained | skipped | summary of the skipped`.

    Attributes:
        retained: R, the tokens that go through attention and FFN in every layer.
        skipped: S, the tokens that the rest is merged to; attention only.
        summaries: spans (first, one past the last) of the R + S tokens, one summary each, in the order of their ends;
            None stands for the two above, () for no summary.
        summary_start: one of `SUMMARY_STARTS`.
        ffn_head: number of leading skipped tokens that still go through the FFN.
        ffn_tail: number of trailing skipped tokens that still go through the FFN.
        ffn_every: every k-th skipped token, from the first on, still goes through the FFN; None: none.
        layers: indices of the layers in which tokens skip the FFN; None: all layers.
        text_sees_skipped: whether the tokens after an image may attend to its skipped tokens in the prefill.
        forget_cache: drop the keys and values of the skipped tokens after the prefill.
    """

    retained: int
    skipped: int
    summaries: tuple[tuple[int, int], ...] | None = None
    summary_start: str = "pooled"
    ffn_head: int = 0
    ffn_tail: int = 0
    ffn_every: int | None = None
    layers: tuple[int, ...] | None = None
    text_sees_skipped: bool = True
    forget_cache: bool = True

    def __post_init__(self) -> None:
        _check_count("retained", self.retained, 1)
        _check_count("skipped", self.skipped, 1)
        _check_count("ffn_head", self.ffn_head, 0)
        _check_count("ffn_tail", self.ffn_tail, 0)
        if self.ffn_every is not None:
            _check_count("ffn_every", self.ffn_every, 2)
        for name in ("text_sees_skipped", "forget_cache"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"skip.{name} is {getattr(self, name)!r}; it must be true or false.")
        if self.summary_start not in SUMMARY_STARTS:
            raise UserError(f"skip.summary_start is {self.summary_start!r}; known: {', '.join(SUMMARY_STARTS)}.")
        # JSON has only lists; tuples make the configuration hashable.
        for name in ("summaries", "layers"):
            object.__setattr__(self, name, _as_tuples(getattr(self, name)))
        self._check_summaries()
        self._check_layers()
        if not any(self.skipping):
            raise UserError(
                f"With ffn_head {self.ffn_head}, ffn_tail {self.ffn_tail} and ffn_every {self.ffn_every} each of the "
                f"{self.skipped} skipped tokens takes the FFN: exempt fewer, or use skip=None."
            )
        if not self.text_sees_skipped and not self.forget_cache:
            raise UserError(
                "skip.text_sees_skipped and forget_cache are both false: generated text would attend to cached tokens "
                "that text of the prompt may not attend to. Set forget_cache to true."
            )

    def _check_summaries(self) -> None:
        tokens, last = self.retained + self.skipped, 0
        for span in self.spans:
            if len(span) != 2 or not all(isinstance(n, int) for n in span) or not 0 <= span[0] < span[1] <= tokens:
                raise UserError(
                    f"skip.summaries has the span {span}; it must be first, end with 0 <= first < end <= {tokens}."
                )
            if span[1] < last:
                raise UserError(f"skip.summaries is {self.spans}; the spans must be in the order of their ends.")
            last = span[1]

    def _check_layers(self) -> None:
        layers = self.layers
        if layers is None:
            return
        if not layers or not all(isinstance(n, int) and n >= 0 for n in layers) or len(set(layers)) != len(layers):
            raise UserError(f"skip.layers is {layers}; it must be different numbers from 0 on, or null for all layers.")

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SkipConfig:
        """Build from the `skip` entry of a config.json; an unknown field is an error."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise UserError(f"skip has the unknown fields {unknown}; known fields are {sorted(known)}.")
        if missing := sorted({"retained", "skipped"} - set(data)):
            raise UserError(f"skip lacks {missing}: give both numbers, or null for a dense model.")
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """The sizes and every field that is not at its default, as plain data for config.json."""
        always = ("retained", "skipped", "forget_cache")
        chosen = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            f.name: _as_lists(chosen[f.name]) for f in fields(self) if f.name in always or chosen[f.name] != f.default
        }

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """The spans of the summaries, with the default resolved."""
        if self.summaries is None:
            return ((0, self.retained), (self.retained, self.retained + self.skipped))
        return self.summaries

    @property
    def length(self) -> int:
        """Tokens of a block: R + S and the summaries."""
        return self.retained + self.skipped + len(self.spans)

    @property
    def summary_positions(self) -> tuple[int, ...]:
        """The positions of the summaries in a block: each after its span and the earlier summaries."""
        return tuple(end + number for number, (_, end) in enumerate(self.spans))

    @cached_property
    def skipping(self) -> tuple[bool, ...]:
        """For each token of a block, in the order of the sequence, whether it skips the FFN."""
        first, end = self.retained, self.retained + self.skipped
        ends = [span[1] for span in self.spans]
        block: list[bool] = []
        for token in range(end):
            index = token - first
            exempt = index < self.ffn_head or token >= end - self.ffn_tail
            exempt = exempt or (self.ffn_every is not None and index % self.ffn_every == 0)
            block += [token >= first and not exempt, *[False] * ends.count(token + 1)]
        return tuple(block)

    @property
    def num_skipping(self) -> int:
        """Tokens of a block that skip the FFN, and that a forgetting cache drops."""
        return sum(self.skipping)

    @property
    def num_kept(self) -> int:
        """Tokens of a block that go through the FFN in every layer: R, the summaries and the exceptions."""
        return self.length - self.num_skipping

    def mean_num_skipping(self, layers: int) -> float:
        """`num_skipping`, averaged over the first `layers` decoder layers."""
        return self.num_skipping * (1.0 if self.layers is None else sum(n < layers for n in self.layers) / layers)

    def check_layers(self, layers: int) -> None:
        """Raise UserError if `layers` names a layer that a decoder with this number of layers does not have."""
        if self.layers is not None and max(self.layers) >= layers:
            raise UserError(f"skip.layers names layer {max(self.layers)}, but the language model has {layers} layers.")

    def check_patches(self, patches: int) -> None:
        """Raise UserError if an image of `patches` visual tokens cannot be split into R and S."""
        if self.retained >= patches:
            raise UserError(
                f"skip.retained is {self.retained}, but the vision tower gives only {patches} tokens an image: "
                f"choose R below {patches}."
            )
        if self.retained + self.skipped > patches:
            raise UserError(
                f"skip.retained + skip.skipped is {self.retained} + {self.skipped}, but the vision tower gives only "
                f"{patches} tokens an image: merging can only make the {patches - self.retained} others fewer."
            )


def _check_count(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MOST_TOKENS:
        raise UserError(f"skip.{name} is {value!r}; it must be a whole number from {least} to {MOST_TOKENS}.")


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(entry) for entry in value) if isinstance(value, (list, tuple)) else value


def _as_lists(value: Any) -> Any:
    return [_as_lists(entry) for entry in value] if isinstance(value, tuple) else value


_SKIPS: dict[Any, SkipConfig] = {}
_REDUCTIONS: dict[Any, ReductionConfig] = {}
_RESAMPLERS: dict[Any, ResamplerConfig] = {}


def _parsed(entry: dict, kind: Any, known: dict[Any, Any]) -> Any:
    """A validated entry of a config.json, parsed once for each content; a graph that is traced only looks it up."""
    key = _frozen(entry)
    if key not in known:
        known[key] = kind.from_dict(json.loads(json.dumps(entry)))
    return known[key]


def _frozen(value: Any) -> Any:
    """Plain data as something that a table can have as a key."""
    if isinstance(value, dict):
        return tuple([(name, _frozen(entry)) for name, entry in value.items()])
    if isinstance(value, (list, tuple)):
        return tuple([_frozen(entry) for entry in value])
    return type(value).__name__, value  # 1 is not True


@strict
class LlavaSkipConfig(LlavaConfig):
    """transformers' `LlavaConfig` with a front end and `skip`, the fields of a `SkipConfig`; None is the dense model.

    `front_end` is the name of a registered front end. `max_tiles` and `pad_pictures` belong to `hd` (the largest grid,
    and whether images are padded to a square, which gives every image the same length), `resampler` to `cos` (the
    fields of a `ResamplerConfig`). `preset` is the name that the numbers come from, for reports. `image_seq_length`
    always follows from the rest. `reduction` has the fields of a `ReductionConfig`: a rival method instead of
    `skip`.
    """

    model_type = "llava_skip"
    front_end: str = "llava"
    max_tiles: int = 4
    pad_pictures: bool = True
    resampler: dict | None = None
    skip: dict | None = None
    reduction: dict | None = None
    preset: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Raise UserError if the fields do not fit each other."""
        if not isinstance(self.vision_feature_layer, int):
            raise UserError(f"vision_feature_layer must be one number; got {self.vision_feature_layer!r}.")
        get_front_end(self.front_end).check(self)
        if (skip := self.skip_config) is not None:
            self._check_skip(skip)
        if (reduction := self.reduction_config) is not None:
            self._check_reduction(reduction)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; what the keyword arguments change is checked as well."""
        made = super().from_dict(config_dict, **kwargs)
        (made[0] if isinstance(made, tuple) else made).check()
        return made

    @property
    def image_seq_length(self) -> int:
        """The most image tokens that an image takes."""
        return self.image_length(self.most_crops)

    @image_seq_length.setter
    def image_seq_length(self, value: int) -> None:
        """Takes the number of a saved configuration, which follows from the rest."""

    def to_dict(self) -> dict[str, Any]:
        """As in transformers; with the image tokens of an image, for those who read them, and without no reduction."""
        fields = super().to_dict() | {"image_seq_length": self.image_seq_length}
        if self.reduction is None:
            fields.pop("reduction", None)
        return fields

    @property
    def auto_map(self) -> dict[str, str]:
        """The classes of the module in saved folders, by the Auto class that takes them."""
        return config_map()

    @auto_map.setter
    def auto_map(self, value: Any) -> None:
        """Takes the map of a saved configuration, which may name other code."""

    def to_json_string(self, use_diff: bool = True) -> str:
        """As in transformers; with the classes of the module that `to_json_file` writes."""
        values = json.loads(super().to_json_string(use_diff)) | {"auto_map": self.auto_map}
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """As in transformers; with the module by which the folder is read without `import llava_skip`."""
        super().to_json_file(json_file_path, use_diff)
        write_module(json_file_path)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Does nothing: transformers would copy the file of the class into saved folders, and load it from there."""

    def _check_skip(self, skip: SkipConfig) -> None:
        if self.vision_feature_select_strategy != "default":
            raise UserError(
                "Skipping ranks patches against the class token, which must not be one of them: set "
                f"vision_feature_select_strategy to 'default' (it is {self.vision_feature_select_strategy!r})."
            )
        get_front_end(self.front_end).check_skip(self, skip)
        skip.check_layers(self.text_config.num_hidden_layers)

    def _check_reduction(self, reduction: ReductionConfig) -> None:
        if self.skip is not None:
            raise UserError(
                f"skip and reduction {reduction} are both set, and a model has one of them: set the other to null "
                "(a dense preset, such as llava, leaves skip out)."
            )
        if self.vision_feature_select_strategy != "default":
            raise UserError(
                f"reduction {reduction} reads the class token apart from the patches: set "
                f"vision_feature_select_strategy to 'default' (it is {self.vision_feature_select_strategy!r})."
            )
        rule, front_end = reduction.rule, get_front_end(self.front_end)
        layer, depth = self.vision_feature_layer, self.vision_config.num_hidden_layers
        if front_end.reads_one_layer and (not -depth <= layer <= depth or layer == 0):
            raise UserError(f"vision_feature_layer is {layer}, but the tower has {depth} layers.")
        if rule.reads_patches and not front_end.gives_patches:
            raise UserError(
                f"reduction {reduction} reads the patches of one layer of the tower, and the tokens of the front end "
                f"{self.front_end!r} are none: choose another method or front end."
            )
        rule.check(reduction, self)

    def with_reduction(self, reduction: ReductionConfig | None) -> LlavaSkipConfig:
        """The same model's configuration with this reduction, or without any.

        Raises:
            UserError: it does not fit the model.
        """
        fields = {"reduction": None if reduction is None else reduction.to_dict()}
        return type(self).from_dict(self.to_dict() | fields)

    @property
    def used_tower_layers(self) -> int:
        """Layers of the tower before the features that are used; later layers need no weights and are not trained."""
        return get_front_end(self.front_end).used_tower_layers(self)

    @property
    def read_tower_layers(self) -> int:
        """Layers of the tower that need weights: those before the features, and what a reduction reads beyond them."""
        reduction = self.reduction_config
        return self.used_tower_layers if reduction is None else reduction.rule.tower_layers(reduction, self)

    @property
    def skip_config(self) -> SkipConfig | None:
        """The validated `skip` entry, None for a dense model."""
        return None if self.skip is None else _parsed(self.skip, SkipConfig, _SKIPS)

    @property
    def reduction_config(self) -> ReductionConfig | None:
        """The validated `reduction` entry, None without one."""
        return None if self.reduction is None else _parsed(self.reduction, ReductionConfig, _REDUCTIONS)

    @property
    def forgets(self) -> bool:
        """Whether a cache drops tokens after the prefill."""
        return (skip := self.skip_config) is not None and skip.forget_cache

    @property
    def resampler_config(self) -> ResamplerConfig | None:
        """The validated `resampler` entry, None without one."""
        return None if self.resampler is None else _parsed(self.resampler, ResamplerConfig, _RESAMPLERS)

    @property
    def patches(self) -> int:
        """Features that the tower gives for one crop; the class token counts only if it is selected."""
        grid = (self.vision_config.image_size // self.vision_config.patch_size) ** 2
        return grid + (self.vision_feature_select_strategy == "full")

    @property
    def most_crops(self) -> int:
        """The most crops that an image has: 1, or a thumbnail and its tiles."""
        return get_front_end(self.front_end).most_crops(self)

    def visual_tokens(self, crops: int = 1) -> int:
        """Visual tokens of an image with `crops` crops, before merging."""
        return get_front_end(self.front_end).visual_tokens(self, crops)

    def image_length(self, crops: int = 1) -> int:
        """Image tokens of an image with `crops` crops: the length of its block."""
        if (skip := self.skip_config) is not None:
            return skip.length
        if (reduction := self.reduction_config) is not None:
            return crops * reduction.rule.rows(reduction, self.visual_tokens(1))
        return self.visual_tokens(crops)
