"""The method as data: `SkipConfig`, and the model's configuration around it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlavaConfig

IGNORE_INDEX = -100
"""Label of a token that is not learnt."""


@dataclass(frozen=True)
class SkipConfig:
    """Which visual tokens of a picture take the whole decoder and which ones skip its FFN (paper, section 3).

    A picture becomes one block of `rows` rows, in attention order:
    `retained | summary of the retained | skipped | summary of the skipped`.

    Attributes:
        retained: R, the tokens that go through attention and FFN in every layer.
        skipped: S, the tokens that the rest is merged to; attention only.
        forget_cache: drop the keys and values of the skipped rows once the prefill has passed them.
    """

    retained: int
    skipped: int
    forget_cache: bool = True

    def __post_init__(self) -> None:
        for name in ("retained", "skipped"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"skip.{name} is {value!r}; it must be a whole number of at least 1.")
        if not isinstance(self.forget_cache, bool):
            raise ValueError(f"skip.forget_cache is {self.forget_cache!r}; it must be true or false.")

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SkipConfig:
        """Build from the `skip` entry of a config.json; an unknown field is an error."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise ValueError(f"skip has the unknown fields {unknown}; known fields are {sorted(known)}.")
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data, for config.json."""
        return asdict(self)

    @property
    def rows(self) -> int:
        """Rows of one picture in the language model: R + 1 + S + 1."""
        return self.retained + self.skipped + 2

    @property
    def kept_rows(self) -> int:
        """Rows of one picture that take the FFN and stay in the cache: R + 2."""
        return self.rows - self.skipped

    @property
    def skipped_span(self) -> tuple[int, int]:
        """First and one-past-last row of the skipped tokens inside a picture's block."""
        return self.retained + 1, self.retained + 1 + self.skipped

    def check_patches(self, patches: int) -> None:
        """Raise ValueError if a picture of `patches` visual tokens cannot be split into R and S."""
        if self.retained >= patches:
            raise ValueError(
                f"skip.retained is {self.retained}, but the vision tower gives only {patches} tokens a picture: "
                f"choose R below {patches}."
            )
        if self.retained + self.skipped > patches:
            raise ValueError(
                f"skip.retained + skip.skipped is {self.retained} + {self.skipped}, but the vision tower gives only "
                f"{patches} tokens a picture: merging can only make the {patches - self.retained} others fewer."
            )


@strict
class LlavaSkipConfig(LlavaConfig):
    """transformers' `LlavaConfig` with `skip`, the fields of a `SkipConfig`; None is the dense LLaVA.

    `preset` is the name that the numbers come from, for reports. `image_seq_length`, the placeholder rows that a
    picture takes, always follows from the rest.
    """

    model_type = "llava_skip"
    skip: dict | None = None
    preset: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if not isinstance(self.vision_feature_layer, int):
            raise ValueError(f"vision_feature_layer must be one number; got {self.vision_feature_layer!r}.")
        skip = self.skip_config
        if skip is not None:
            if self.vision_feature_select_strategy != "default":
                raise ValueError(
                    "Skipping ranks patches against the class token, which must not be one of them: set "
                    f"vision_feature_select_strategy to 'default' (it is {self.vision_feature_select_strategy!r})."
                )
            skip.check_patches(self.patches)
        self.image_seq_length = self.patches if skip is None else skip.rows

    @property
    def skip_config(self) -> SkipConfig | None:
        """The validated `skip` entry, None for a dense model."""
        return None if self.skip is None else SkipConfig.from_dict(self.skip)

    @property
    def patches(self) -> int:
        """Visual tokens that the tower gives for one picture; the class token counts only if it is selected."""
        grid = (self.vision_config.image_size // self.vision_config.patch_size) ** 2
        return grid + (self.vision_feature_select_strategy == "full")
