"""Conversation templates: a conversation as text, and which characters of it are supervised.

A template is a Jinja file of `templates/`, or the tokenizer's own. The library's templates mark supervised text with
`generation` blocks. If a tokenizer's template has none, the supervised spans are found by rendering the conversation up
to each answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import resources
from typing import Any

import numpy as np
from transformers.utils.chat_template_utils import render_jinja_template

from llava_skip.foreign_templates import calling_template
from llava_skip_base.errors import UserError

Messages = list[dict[str, Any]]
Span = tuple[int, int]

LLAVA_VERSIONS = {
    "v0": "v1",  # LLaVA's own default: this name chooses the padding token there and leaves the template at v1
    "v0.5": "v1",
    "v1": "v1",
    "vicuna_v1": "v1",
    "llava_v0": "v0",
    "llava_v1": "llava_v1",
    "llava_llama_2": "llava_llama_2",
    "llama_2": "llama_2",
    "mistral_instruct": "mistral",
    "mistral_direct": "chatml",
    "chatml_direct": "chatml",
    "mpt": "mpt",
    "plain": "plain",
    "v0_plain": "plain",
    "llama3": "llama3_double_bos",
    "llama3-plain": "llama3_plain",
}
"""`--version` of LLaVA and of the paper's code -> the template that renders the same text."""

_INCLUDE = re.compile(r"\{%- include '(\w+)\.jinja' -%\}")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def template_names() -> list[str]:
    """Names of the conversation templates that come with the library."""
    folder = resources.files("llava_skip") / "templates"
    return sorted(entry.name.removesuffix(".jinja") for entry in folder.iterdir() if entry.name.endswith(".jinja"))


def load_template(name: str) -> str:
    """A conversation template by name, with its includes inserted: one string, as a saved processor needs it.

    Raises:
        UserError: an unknown name, with a list of the known ones.
    """
    if name not in template_names():
        raise UserError(f"Unknown conversation template {name!r}; known: {', '.join(template_names())}.")
    text = (resources.files("llava_skip") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    return _INCLUDE.sub(lambda match: load_template(match[1]), text)


def render(template: str, messages: Messages, special_tokens: dict[str, str]) -> tuple[str, list[Span]]:
    """A conversation as text, and its supervised spans of characters.

    Args:
        template: Jinja, with or without `generation` blocks.
        messages: `{"role": ..., "content": ...}` turns; an answer with `"supervised": False` has no span.
        special_tokens: the variables of templates for special tokens (`bos_token`, `eos_token`, ...).

    Raises:
        UserError: the template refuses the conversation, fails or does not end, or has no `generation` blocks and
            renders an earlier turn differently when a later one follows, so that the supervised spans cannot be found.
    """

    def rendered(turns: Messages, prompt: bool = False, mark: bool = False) -> tuple[str, list[Span]]:
        with calling_template("The conversation template", "correct it, or name one of the library with --template."):
            texts, spans = render_jinja_template(
                [turns], chat_template=template, add_generation_prompt=prompt, return_assistant_tokens_mask=mark,
                **special_tokens,
            )  # fmt: skip
        return texts[0], spans[0] if mark else []

    if _GENERATION.search(template):
        text, spans = rendered(messages, mark=True)
    else:
        eos_token = special_tokens.get("eos_token")
        text, spans = _spans_by_prefixes(lambda *turns: rendered(*turns)[0], messages, eos_token)
    return text, _wanted_spans(messages, spans)


def _wanted_spans(messages: Messages, spans: list[Span]) -> list[Span]:
    """The spans of the answers that are to be supervised."""
    wanted = [message.get("supervised") is not False for message in messages if message["role"] == "assistant"]
    if all(wanted):
        return spans
    if len(spans) != len(wanted):
        raise UserError(
            f"The conversation template has {len(spans)} supervised texts for {len(wanted)} answers, so one answer "
            "alone cannot be left out: name a template of the library with --template."
        )
    return [span for span, is_wanted in zip(spans, wanted, strict=True) if is_wanted]


def _spans_by_prefixes(
    text_of: Callable[..., str], messages: Messages, eos_token: str | None
) -> tuple[str, list[Span]]:
    """An answer is the difference between the text up to its question and the text up to its end token, included."""
    text, spans = text_of(messages), []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = text_of(messages[:turn], True), text_of(messages[: turn + 1])
        if not (text.startswith(before) and text.startswith(after) and after.startswith(before)):
            raise UserError(
                "The tokenizer's chat template has no {% generation %} blocks, and renders turn "
                f"{turn} differently alone than inside the conversation, so the supervised text cannot be found: name "
                f"a template of the library with --template ({', '.join(template_names())})."
            )
        end = text.rfind(eos_token, len(before), len(after)) if eos_token else -1
        spans.append((len(before), end + len(eos_token) if eos_token and end >= 0 else len(after)))
    return text, spans


def supervised_tokens(offsets: list[Span], spans: list[Span], replaced: list[dict[str, Any]]) -> np.ndarray:
    """Which tokens [T] overlap a supervised span: bool.

    Args:
        offsets: characters of each token, in the text in which placeholders were replaced.
        spans: supervised characters of the text before that.
        replaced: transformers' replacements, each with its `span` before and `new_span` after, in order.
    """
    first, end = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    placeholder_ends = [change["span"][1] for change in replaced]
    gained = [0, *(change["new_span"][1] - change["span"][1] for change in replaced)]
    supervised = np.zeros(len(offsets), dtype=bool)
    for span in spans:
        start, stop = (char + gained[int(np.searchsorted(placeholder_ends, char, "right"))] for char in span)
        supervised |= (first < stop) & (end > start)
    return supervised
