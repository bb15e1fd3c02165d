"""The model card (README.md) beside a model's weights: what it is, what it was made from, and how it is used.

The header is the metadata of the Hugging Face hub (https://huggingface.co/docs/hub/model-cards).
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llava_skip.configuration import LlavaSkipConfig
from llava_skip.flops import image_cost
from llava_skip.folder_code import FILE, INSTALL
from llava_skip_base.errors import UserError
from llava_skip_base.files import local_path, read_text, write_text
from llava_skip_base.plain_markdown import markdown_table, markdown_text
from llava_skip_base.texts import plain

CARD = "README.md"
_MARK = (
    "<!-- Written by llava-skip, which writes it again with the model. Delete this line, and your changes are kept. -->"
)
_PEFTS_OWN = "# Model Card for Model ID"
"""Title of the empty form that PEFT leaves beside an adapter."""
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)

_PIPELINE = """\
from transformers import pipeline

answer = pipeline("image-text-to-text", model={name!r}, trust_remote_code=True)
content = [{{"type": "image", "path": "picture.png"}}, {{"type": "text", "text": "What is in the picture?"}}]
print(answer(text=[{{"role": "user", "content": content}}], return_full_text=False)[0]["generated_text"])"""


@dataclass(frozen=True)
class CardFacts:
    """What a way of saving knows beside the configuration. All texts may come from anybody.

    Attributes:
        sources: what the model was made from, such as `{"language model": "lmsys/vicuna-7b-v1.5"}`: folders or hub
            names; None is left out.
        rows: of its training: data, steps, losses, scores.
        parameters: of the whole model; None if they were not counted.
        note: a sentence about its state; empty for none.
        is_adapter: the folder holds a LoRA adapter, not a whole model.
    """

    sources: Mapping[str, str | None]
    rows: Sequence[tuple[str, str]] = ()
    parameters: int | None = None
    note: str = ""
    is_adapter: bool = False
    named: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "named", {what: source for what, source in self.sources.items() if source})


def write_card(folder: Path, config: LlavaSkipConfig, facts: CardFacts) -> None:
    """Write the card of a model into its folder, unless somebody else has written one there.

    Args:
        folder: the model's.
        config: the model's.
        facts: what else is known of it.
    """
    file = folder / CARD
    if os.path.lexists(file) and not _is_own(file):
        return
    write_text(file, card_text(folder.resolve().name, config, facts))


def card_text(name: str, config: LlavaSkipConfig, facts: CardFacts) -> str:
    """The card of a model.

    Args:
        name: of its folder.
        config: the model's.
        facts: what else is known of it.
    """
    made = [(what, source_name(source)) for what, source in facts.named.items()]
    rows = _model_rows(config, facts.parameters)
    parts = [
        f"---\n{yaml.safe_dump(_header(facts), allow_unicode=True)}---",
        _MARK,
        f"# {markdown_text(name)}",
        _sentence(config),
        *([markdown_text(facts.note)] if facts.note else []),
        "\n".join(["## The model", "", *markdown_table([("an image", "tokens"), *_image_rows(config)])]),
        "\n".join(markdown_table([("part", "size"), *rows])),
        *(["\n".join(["## Made from", "", *markdown_table([("part", "source"), *made])])] if made else []),
        *(["\n".join(["## Training", "", *markdown_table([("what", "value"), *facts.rows])])] if facts.rows else []),
        "## Use",
        *_use(" ".join(plain(name).split()), facts.is_adapter),
    ]
    return "\n\n".join(parts) + "\n"


def source_name(source: str) -> str:
    """A hub name as it is; of a path the last part, since a card is read on other machines; of several paths, each."""
    path = Path(source) if "\\" in source else local_path(source)
    if path is None:
        return source
    if "," in source and not path.exists():
        return ", ".join(source_name(part.strip()) for part in source.split(",") if part.strip())
    return re.split(r"[\\/]", path.resolve().name)[-1]  # Windows' paths have the one, and names here may have it too


def _is_own(file: Path) -> bool:
    """Whether something under the card's name is a card that may be written again; what cannot be read is not."""
    try:
        return any(mark in read_text(file) for mark in (_MARK, _PEFTS_OWN))
    except (UserError, OSError):
        return False


def _header(facts: CardFacts) -> dict[str, Any]:
    """The hub's metadata. Bases are the sources of weights that have a hub's name, and are no folders here."""
    weights = [source for what, source in facts.named.items() if what != "tokenizer"]
    bases = [source for source in weights if local_path(source) is None and _HUB_NAME.fullmatch(source)]
    header: dict[str, Any] = {
        "library_name": "peft" if facts.is_adapter else "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["llava", "llava-skip", "skip-vision", *(["lora"] if facts.is_adapter else [])],
    }
    return header | ({"base_model": bases} if bases else {})


def _sentence(config: LlavaSkipConfig) -> str:
    preset = f", preset {markdown_text(config.preset)}" if config.preset else ""
    if config.skip is not None:
        what = "most visual tokens of an image attend, but skip the FFN of the decoder layers"
        forgets = ", and leave the cache after the prompt" if config.forgets else ""
        return f"A LLaVA with Skip-Vision{preset}: {what}{forgets}."
    if config.reduction is not None:
        return f"A LLaVA with the reduction {markdown_text(str(config.reduction_config))}{preset}."
    return f"A dense LLaVA{preset}: every visual token goes through the whole language model."


def _image_rows(config: LlavaSkipConfig) -> list[tuple[str, str]]:
    """Tokens of an image with the most crops that it can have, as `llava-skip costs` counts them."""
    cost, skip = image_cost(config), config.skip_config
    rows = [("visual tokens before the language model", f"{config.visual_tokens(config.most_crops):,}")]
    if skip is not None:
        rows += [
            ("retained (R)", f"{skip.retained:,}"),
            ("skipped (S)", f"{skip.skipped:,}"),
            ("summaries", f"{len(skip.spans)}"),
        ]
    return [
        *rows,
        ("in attention", f"{cost.attention_tokens:,.10g}"),
        ("in the FFN, mean of the layers", f"{cost.ffn_tokens:,.10g}"),
        ("in the cache after the prompt", f"{cost.cache_tokens:,.10g}"),
    ]


def _model_rows(config: LlavaSkipConfig, parameters: int | None) -> list[tuple[str, str]]:
    text, tower = config.text_config, config.vision_config
    rows = [
        ("front end", str(config.front_end)),
        ("vision tower", f"{tower.num_hidden_layers} layers of width {tower.hidden_size}, {tower.image_size} pixels"),
        ("language model", f"{text.model_type}, {text.num_hidden_layers} layers of width {text.hidden_size}"),
    ]
    return rows + ([] if parameters is None else [("parameters", f"{parameters:,}")])


def _use(name: str, is_adapter: bool) -> list[str]:
    quoted = shlex.quote(name)
    if is_adapter:
        lines = [f"llava-skip merge-lora {quoted} --output MERGED"]
        told = f"This is a LoRA adapter. With the project ({INSTALL}), merge it into its model:"
        return [told, _fenced("bash", lines)]
    told = f"With the project ({INSTALL}), from the folder that this one is in:"
    lines = [f"llava-skip chat {quoted}", f"llava-skip eval --model {quoted}"]
    return [
        told,
        _fenced("python", [_PIPELINE.format(name=name)]),
        f"`trust_remote_code=True` runs `{FILE}`, a few lines that import the project's package; after `import "
        "llava_skip` it is not needed.",
        _fenced("bash", lines),
    ]


def _fenced(language: str, lines: Sequence[str]) -> str:
    return "\n".join([f"```{language}", *lines, "```"])
