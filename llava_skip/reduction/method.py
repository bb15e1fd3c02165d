"""The contract of a rival method, which gives the language model fewer tokens of an image, and the registry of all.

Shapes: N crops, P visual tokens of a crop, T rows of a crop that enter the language model, D its width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor

from llava_skip_base.errors import UserError
from llava_skip_base.texts import shortened

if TYPE_CHECKING:
    from llava_skip.configuration import LlavaSkipConfig
    from llava_skip.reduction.config import ReductionConfig
    from llava_skip.vision.view import View

Value = int | float | tuple[int, ...] | tuple[float, ...]
"""What an option of a method can be."""


@dataclass(frozen=True)
class Option:
    """A number, or a list of numbers, that a method takes beside TOKENS.

    Attributes:
        default: what holds if it is not given; None: it must be given, or the method works without.
        least: the smallest number that is allowed.
        most: the largest one.
        whole: whether only whole numbers are allowed.
        many: whether it is a list, written `31+29+30`.
    """

    default: Value | None = None
    least: float = 0
    most: float = math.inf
    whole: bool = True
    many: bool = False

    def read(self, name: str, value: Any) -> Value:
        """The value of the option from JSON or from a text.

        Raises:
            UserError: it is not of this kind.
        """
        if isinstance(value, str):
            entries = [_number(entry) for entry in value.split("+")]
        else:
            entries = list(value) if isinstance(value, (list, tuple)) else [value]
        kinds = (int,) if self.whole else (int, float)
        fits = entries and all(
            isinstance(entry, kinds) and not isinstance(entry, bool) and self.least <= entry <= self.most
            for entry in entries
        )
        if not fits or (len(entries) > 1 and not self.many):
            raise UserError(f"reduction: {name} is {shortened(repr(value))}; it must be {self._words()}.")
        numbers = [entry if self.whole else float(entry) for entry in entries]
        return tuple(numbers) if self.many else numbers[0]

    def _words(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        most = "" if math.isinf(self.most) else f" to {self.most}"
        return f"{kind} from {self.least}{most}" + (", or several, such as 31+29+30" if self.many else "")


def _number(text: str) -> Any:
    """The number that a text is; the text itself if it is none."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


class LayerRows(NamedTuple):
    """The tokens of one image in one decoder layer: those that ask, those that are asked, in the FFN, in the cache."""

    queries: int
    keys: int
    ffn: int
    cache: int


class Reduction:
    """A rival: what is not overridden gives every visual token to every layer.

    A subclass without state is enough: `register_reduction` takes an instance, and `method` of a `ReductionConfig` is
    its name. The methods take a `ReductionConfig`, which has the numbers, and the model's configuration.

    Attributes:
        name: in configurations and on the command line.
        options: what it takes beside TOKENS.
        needs_tokens: whether TOKENS must be given.
        in_decoder: whether it acts between the decoder's layers, and not before the language model.
        reads_patches: whether it reads the tower's patches, so that it needs a front end whose visual tokens they are.
    """

    name: str
    options: ClassVar[Mapping[str, Option]] = {}
    needs_tokens: ClassVar[bool] = True
    in_decoder: ClassVar[bool] = False
    reads_patches: ClassVar[bool] = False

    def check_numbers(self, reduction: ReductionConfig) -> None:
        """Raise UserError if the numbers do not fit each other, whatever the model."""

    def check(self, reduction: ReductionConfig, config: LlavaSkipConfig) -> None:
        """Raise UserError if the method does not fit the model; the front end has been looked at already."""

    def tokens_for(self, budget: int, config: LlavaSkipConfig) -> int:
        """TOKENS that makes `budget` tokens of a crop, or about as many, take the FFN, as a mean over the layers."""
        return budget

    def rows(self, reduction: ReductionConfig, tokens: int) -> int:
        """Rows of a crop of `tokens` visual tokens that enter the language model: P."""
        return tokens

    def tower_layers(self, reduction: ReductionConfig, config: LlavaSkipConfig) -> int:
        """Layers of the vision tower whose weights the method reads, from the first one on."""
        return config.used_tower_layers

    def layer_rows(self, reduction: ReductionConfig, config: LlavaSkipConfig, crops: int) -> list[LayerRows]:
        """For each decoder layer the tokens of an image with `crops` crops; costs follow from it."""
        rows = config.image_length(crops)
        return [LayerRows(rows, rows, rows, rows)] * config.text_config.num_hidden_layers

    def extra_flops(
        self,
        reduction: ReductionConfig,
        config: LlavaSkipConfig,
        crops: int,
        text_tokens: int,
        behind: int | None = None,
        asking: int | None = None,
    ) -> int:
        """FLOPs of the method itself in a prefill, beside those of the layers.

        Args:
            reduction: the numbers.
            config: of the model.
            crops: of the image.
            text_tokens: tokens beside the image's.
            behind: how many of them are behind the image; None: all.
            asking: how many tokens decide what is kept; None: what the method expects.
        """
        return 0


class Selection(Reduction):
    """A method that makes T rows of a crop's visual tokens before the language model; TOKENS is T."""

    def most_rows(self, tokens: int) -> int:
        """The largest T of a crop of `tokens` visual tokens."""
        return tokens

    def check(self, reduction: ReductionConfig, config: LlavaSkipConfig) -> None:
        """T is at most what there is."""
        tokens = config.visual_tokens(1)
        most = self.most_rows(tokens)
        if reduction.count > most:
            each = "image" if config.most_crops == 1 else "crop"
            raise UserError(
                f"reduction {reduction} keeps {reduction.tokens} tokens, but the {each} has {tokens}: give at most "
                f"{most}."
            )

    def rows(self, reduction: ReductionConfig, tokens: int) -> int:
        """T."""
        return reduction.count

    def states(self, reduction: ReductionConfig, config: LlavaSkipConfig) -> tuple[int, ...]:
        """Entries of the tower's list of hidden states that `select` reads, beside the features."""
        return ()

    def select(self, view: View, reduction: ReductionConfig) -> Tensor:
        """The rows of each crop that enter the language model, [N, T, D].

        Gradients flow through the rows that are kept; the choice has none.
        """
        raise NotImplementedError


_REDUCTIONS: dict[str, Reduction] = {}


def register_reduction(reduction: Reduction) -> None:
    """Make a method known by its name, before a configuration names it.

    Raises:
        UserError: another one has the name.
    """
    if reduction.name in _REDUCTIONS:
        raise UserError(f"There is a reduction {reduction.name!r} already: choose another name.")
    _REDUCTIONS[reduction.name] = reduction


def get_reduction(name: str) -> Reduction:
    """The method of a name.

    Raises:
        UserError: there is none; the message lists the known names.
    """
    if name not in _REDUCTIONS:
        raise UserError(f"reduction: the method is {name!r}; known: {', '.join(_REDUCTIONS)}.")
    return _REDUCTIONS[name]


def reduction_names() -> tuple[str, ...]:
    """The names of all methods."""
    return tuple(_REDUCTIONS)
