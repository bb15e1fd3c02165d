"""A rival method and its numbers as data: `ReductionConfig`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llava_skip.reduction.method import Reduction, Value, get_reduction
from llava_skip_base.errors import UserError
from llava_skip_base.texts import shortened

_FORM = "METHOD:TOKENS[,NAME=VALUE...], such as visionzip:64 or random:64,seed=1"
_MOST = 1_000_000
"""More tokens than any image has."""


@dataclass(frozen=True)
class ReductionConfig:
    """Which rival method gives the language model fewer tokens of an image, and how many.

    Attributes:
        method: name of a registered method.
        tokens: of a selection, the rows of each crop that enter the language model; of a method inside the decoder, the
            mean of an image's tokens over the layers, or what its page says. None if it follows from the options.
        options: (name, value) of the method's options that are not at their defaults, in the method's order.
    """

    method: str
    tokens: int | None = None
    options: tuple[tuple[str, Value], ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.method, str):
            raise UserError(f"reduction: the method is {shortened(repr(self.method))}; it must be a name.")
        known, given = self.rule.options, dict(self.options)
        if unknown := sorted(map(str, set(given) - set(known))):
            has = f"its options are {', '.join(known)}" if known else "it has none"
            raise UserError(f"reduction: {self.method} does not take {', '.join(unknown)}; {has}.")
        values = {name: known[name].read(name, given[name]) for name in known if name in given}
        chosen = tuple((name, value) for name, value in values.items() if value != known[name].default)
        object.__setattr__(self, "options", chosen)
        self._check_tokens()
        self.rule.check_numbers(self)

    def _check_tokens(self) -> None:
        tokens = self.tokens
        if tokens is None and self.rule.needs_tokens:
            raise UserError(f"reduction: {self.method} needs the number of tokens: give {_FORM}.")
        if tokens is not None and (not isinstance(tokens, int) or isinstance(tokens, bool) or not 1 <= tokens <= _MOST):
            raise UserError(
                f"reduction: tokens is {shortened(repr(tokens))}; it must be a whole number from 1 to {_MOST}."
            )

    @classmethod
    def parse(cls, text: str) -> ReductionConfig:
        """Read the text form `METHOD:TOKENS[,NAME=VALUE...]`; `str` gives it back.

        Raises:
            UserError: another form, an unknown method (the known ones are listed), or numbers that do not fit.
        """
        found = re.fullmatch(r"\s*([^:,\s]+)(?::(\S+))?\s*", text)
        if not found:
            raise UserError(f"reduction is {shortened(repr(text))}; it must be {_FORM}.")
        method, tokens, options = found[1], None, {}
        for number, entry in enumerate(filter(None, (found[2] or "").split(","))):
            name, equals, value = entry.partition("=")
            if not equals and number == 0 and re.fullmatch(r"[0-9]{1,9}", entry):
                tokens = int(entry)
            elif not equals or not name or name in options:
                raise UserError(f"reduction is {shortened(repr(text))}, with {shortened(repr(entry))}; write {_FORM}.")
            else:
                options[name] = value
        return cls(method, tokens, tuple(options.items()))  # type: ignore[arg-type]  # texts are read there

    def __str__(self) -> str:
        entries = [] if self.tokens is None else [str(self.tokens)]
        entries += [f"{name}={_text(value)}" for name, value in self.options]
        return self.method + (f":{','.join(entries)}" if entries else "")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ReductionConfig:
        """Build from the `reduction` entry of a config.json; an unknown field is an error."""
        if "method" not in data:
            raise UserError("reduction lacks 'method': name one, or set reduction to null.")
        options = tuple((name, value) for name, value in data.items() if name not in ("method", "tokens"))
        return cls(data["method"], data.get("tokens"), options)

    def to_dict(self) -> dict[str, Any]:
        """Method, tokens and the options that are not at their defaults, as plain data for config.json."""
        options = {name: list(value) if isinstance(value, tuple) else value for name, value in self.options}
        return {"method": self.method, "tokens": self.tokens} | options

    @property
    def rule(self) -> Reduction:
        """The method.

        Raises:
            UserError: none of this name is registered.
        """
        return get_reduction(self.method)

    @property
    def count(self) -> int:
        """`tokens` of a method that cannot do without."""
        assert self.tokens is not None  # checked when it was made
        return self.tokens

    def __getitem__(self, option: str) -> Any:
        """The value of an option, with its default."""
        return dict(self.options).get(option, self.rule.options[option].default)


def _text(value: Value) -> str:
    return "+".join(map(repr, value)) if isinstance(value, tuple) else repr(value)
