"""Parts of the model: which are trainable, at which rate; each of their parameters is optimised exactly once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from llava_skip.configuration import LlavaSkipConfig
from llava_skip_base.errors import UserError, first_few

PART_PREFIXES: dict[str, tuple[str, ...]] = {
    "vision_tower": ("model.vision_tower.",),
    "multi_modal_projector": ("model.multi_modal_projector.",),
    "summary": ("model.summary.",),
    "language_model": ("model.language_model.", "lm_head."),
}
"""Parts that can be trained or frozen -> how the names of their parameters begin."""

PEFT_PREFIX = "base_model.model."
"""What PEFT puts before the names of a model that it wraps."""

_TOWER_END = re.compile(r"\.(?:post_layernorm|encoder\.layers\.(\d+))\.")


def part_of(name: str) -> str:
    """The part that a parameter belongs to, by its name, in a plain model or one that PEFT wraps.

    Raises:
        UserError: it belongs to no part.
    """
    native = name.removeprefix(PEFT_PREFIX)
    for part, prefixes in PART_PREFIXES.items():
        if native.startswith(prefixes):
            return part
    raise UserError(f"The parameter {name} belongs to none of the parts {', '.join(PART_PREFIXES)}.")


def choose_trained(model: nn.Module, parts: Collection[str]) -> None:
    """Make the parameters of some parts trainable and freeze the others; quantised ones are always frozen."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in parts and parameter.is_floating_point())


def freeze_unused(model: nn.Module, config: LlavaSkipConfig) -> None:
    """Freeze the tower's layers after the features that are used: they never get a gradient."""
    for name, parameter in model.named_parameters():
        if part_of(name) == "vision_tower" and (found := _TOWER_END.search(name)):
            if found[1] is None or int(found[1]) >= config.used_tower_layers:
                parameter.requires_grad_(False)


def parameter_groups(
    model: nn.Module, decays: Collection[str], rates: Mapping[str, float], learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: one for each learning rate, with and without weight decay.

    Args:
        model: its trainable parameters are grouped.
        decays: names of the parameters with weight decay; norms and biases have none.
        rates: part -> peak learning rate, for parts that have one of their own.
        learning_rate: of the other parts; their groups are first, where Trainer reads the rate that it logs.
        weight_decay: of the parameters in `decays`.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((rates.get(part_of(name), learning_rate), name in decays), []).append(parameter)
    ordered = sorted(groups, key=lambda key: (key[0] != learning_rate, key[0], not key[1]))
    return [
        {"params": groups[rate, decay], "lr": rate, "weight_decay": weight_decay if decay else 0.0}
        for rate, decay in ordered
    ]


def check_groups(model: nn.Module, groups: Iterable[Mapping[str, Any]]) -> None:
    """Every trainable parameter must be in exactly one group of the optimizer, and no frozen one in any.

    Raises:
        UserError: names the parameters that are wrong.
    """
    held = Counter(id(parameter) for group in groups for parameter in group["params"])
    names = {id(parameter): (name, parameter.requires_grad) for name, parameter in model.named_parameters()}
    wrong = [f"{name} (in {held[key]} groups)" for key, (name, trainable) in names.items() if held[key] != trainable]
    if foreign := len(set(held) - set(names)):
        wrong.append(f"{foreign} parameters of no name")
    if wrong:
        raise UserError(
            f"Trainable parameters must be optimised exactly once, frozen ones never; these are not: "
            f"{first_few(wrong)}."
        )


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Part -> (number of parameters, number of trainable ones)."""
    counts = {part: (0, 0) for part in PART_PREFIXES}
    for name, parameter in model.named_parameters():
        if ".original_module." in name:  # PEFT's copy of a module that is trained in full
            continue
        # Under ZeRO-3 a parameter is an empty tensor that remembers its size.
        size = getattr(parameter, "ds_numel", parameter.numel())
        whole, trainable = counts[part_of(name)]
        counts[part_of(name)] = (whole + size, trainable + size * parameter.requires_grad)
    return counts
