"""What a trade-off compares: models as they are, and dense models with rival methods at several budgets."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from eval.answering.models import SavedModel, check_model, with_seeds
from llava_skip.configuration import LlavaSkipConfig
from llava_skip.reduction import ReductionConfig, get_reduction, reduction_names
from llava_skip_base.errors import UserError, first_few
from llava_skip_base.texts import shortened

ALL_METHODS = "all"


@dataclass(frozen=True)
class Candidate:
    """A model of the trade-off.

    Attributes:
        model: the model, with the rival method with which it answers.
        dense: the dense model that it is compared with; for a dense model, itself.
        series: what the figures name it: the method, or the model's own name.
    """

    model: SavedModel
    dense: SavedModel
    series: str

    @property
    def name(self) -> str:
        """The model's name in results."""
        return self.model.name

    @property
    def is_dense(self) -> bool:
        """Whether it is a dense model, as it is."""
        return self.model.folder == self.dense.folder and self.model.reduction is None

    @property
    def configuration(self) -> LlavaSkipConfig:
        """How it answers."""
        return _configuration(self.model)


@dataclass(frozen=True)
class Plan:
    """The candidates, the dense ones first and those of one folder together, and what was left out, with the reason."""

    candidates: list[Candidate]
    left_out: list[str]


def read_methods(text: str) -> list[tuple[str, str]]:
    """Methods and their options of `--methods`: `random,fastv,first_layer=1` are two, the second with an option.

    `all` are all methods that are registered.

    Raises:
        UserError: an unknown or repeated method, or an option in front of all.
    """
    if text.strip() == ALL_METHODS:
        return [(name, "") for name in reduction_names()]
    found: list[tuple[str, str]] = []
    for entry in (part.strip() for part in text.split(",")):
        if "=" in entry and found:
            name, options = found.pop()
            found.append((name, f"{options},{entry}"))
        elif entry:
            get_reduction(entry)
            found.append((entry, ""))
    if doubled := sorted({"".join(own) for own in found if found.count(own) > 1}):
        raise UserError(f"--methods names {first_few(doubled)} twice; leave one out.")
    return found


def read_budgets(text: str) -> list[int]:
    """The numbers of tokens of `--budgets`.

    Raises:
        UserError: one is no whole number from 1 on, or comes twice.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if wrong := [part for part in parts if not (part.isascii() and part.isdigit() and 0 < int(part[:9]))]:
        raise UserError(f"--budgets has {shortened(wrong[0])}; give numbers of tokens from 1 on, such as 18,12,6.")
    budgets = [int(part) for part in parts]
    if len(set(budgets)) < len(budgets):
        raise UserError(f"--budgets is '{shortened(text)}'; give each number once.")
    return budgets


def plan_candidates(folders: Sequence[Path], methods: str, budgets: str, reductions: Sequence[str]) -> Plan:
    """Check the models, and each dense one with each method at each budget.

    Args:
        folders: of the models; a folder of seeds stands for the model of each.
        methods: see `read_methods`.
        budgets: see `read_budgets`.
        reductions: further methods with their numbers, as `METHOD:TOKENS[,NAME=VALUE...]`.

    Raises:
        UserError: a model is broken or not the library's, none is dense, or a method, a budget or one of `reductions`
            fits none of the dense models.
    """
    named, numbers = read_methods(methods), read_budgets(budgets)
    if named and not numbers:
        raise UserError("--methods is given without --budgets: give numbers of tokens, such as --budgets 18,12,6.")
    explicit = [ReductionConfig.parse(text) for text in reductions]
    models = [check_model(own) for folder in folders for own in with_seeds(folder)]
    configurations = [_configuration(model) for model in models]
    is_dense = [own.skip is None and own.reduction is None for own in configurations]
    dense = [model for model, own in zip(models, is_dense, strict=True) if own]
    if not dense:
        raise UserError(
            f"none of {first_few([model.name for model in models])} is dense, so there is nothing to compare with; "
            "give the dense model as well: --model DENSE."
        )
    candidates: list[Candidate] = []
    left_out: list[str] = []
    fitting, reasons = set(), dict[str, str]()
    for model in dense:
        candidates.append(Candidate(model, model, model.name))
        asked = [_at_budget(model, name, options, budget) for name, options in named for budget in numbers]
        asked += [_Asked(_series(own), str(own), (f"--reduction {own}",)) for own in explicit]
        for own in asked:
            try:
                reduced = model.reduced(ReductionConfig.parse(own.text))
            except UserError as error:
                left_out.append(f"{model.name}: {str(error).removeprefix(f'{model.folder}: ')}")
                reasons |= dict.fromkeys(own.options, str(error))
                continue
            fitting |= {*own.options}
            if reduced.name not in {other.name for other in candidates}:
                candidates.append(Candidate(reduced, model, own.series))
    if wrong := sorted(reasons.keys() - fitting):  # a mistake, not a method that cannot have so few tokens
        raise UserError(f"{wrong[0]} fits no dense model. {reasons[wrong[0]]}")
    others = [model for model, own in zip(models, is_dense, strict=True) if not own]
    candidates += [Candidate(model, _dense_of(model, dense), model.name) for model in others]
    return Plan(candidates, left_out)


class _Asked(NamedTuple):
    """A rival: what the figures name it, its text form, and the options of the command line that ask for it."""

    series: str
    text: str
    options: tuple[str, ...]


def _at_budget(model: SavedModel, method: str, options: str, budget: int) -> _Asked:
    tokens = get_reduction(method).tokens_for(budget, _configuration(model))
    return _Asked(f"{method}{options}", f"{method}:{tokens}{options}", (f"--methods {method}", f"--budgets {budget}"))


def _series(reduction: ReductionConfig) -> str:
    options = str(reduction).partition(":")[2].split(",")
    return ",".join([reduction.method, *(option for option in options if "=" in option)])


def _configuration(model: SavedModel) -> LlavaSkipConfig:
    if model.configuration is None:
        raise UserError(
            f"{model.folder}: is a {model.config.get('model_type')!r}, whose tokens and FLOPs are not known; convert "
            f"it: llava-skip convert {model.folder} OUTPUT."
        )
    return model.configuration


def _dense_of(model: SavedModel, dense: Sequence[SavedModel]) -> SavedModel:
    """The dense model that a model is compared with: that of its front end and sizes.

    Raises:
        UserError: there is none.
    """
    for other in dense:
        if _kind(_configuration(other)) == _kind(_configuration(model)):
            return other
    raise UserError(
        f"{model.folder}: none of the dense models {first_few([own.name for own in dense])} has its front end "
        f"{_configuration(model).front_end!r} and its sizes; give its dense twin as well."
    )


def _kind(config: LlavaSkipConfig) -> tuple[object, ...]:
    text, tower = config.text_config, config.vision_config
    sizes = text.hidden_size, text.num_hidden_layers, text.intermediate_size, text.vocab_size
    return config.front_end, config.visual_tokens(1), *sizes, tower.hidden_size
