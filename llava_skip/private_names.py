"""Every private name of a dependency that the project uses, and why no public one does the same.

`tests/test_private_names.py` checks that each still exists, with the parameters that are used. Add a line here before
you use another one.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PrivateName:
    """A private name of a dependency.

    Attributes:
        name: dotted, from the module on: `transformers.trainer.Trainer._get_num_items_in_batch`.
        used_in: the module of this project that uses or overrides it.
        reason: why no public name does.
        parameters: of those that a function has, the ones that are used by name or position.
    """

    name: str
    used_in: str
    reason: str
    parameters: tuple[str, ...] = ()


PRIVATE_NAMES: tuple[PrivateName, ...] = ()
