"""How an answer ends: what the conversation template writes after it, as ids and texts at which `generate` stops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from llava_skip.conversation import render
from llava_skip.foreign_templates import EndlessTemplate
from llava_skip_base.errors import UserError

_ANSWER = "wxyz"
"""An answer that no template writes by itself."""


@dataclass(frozen=True)
class Ends:
    """The ends of an answer; none of them if the template writes nothing after it.

    Attributes:
        ids: of the control token that ends it, and of the tokenizer's own end of text.
        strings: a text that ends it, where no control token does.
        texts: all of them as text.
    """

    ids: tuple[int, ...]
    strings: tuple[str, ...]
    texts: tuple[str, ...]

    def save_in(self, config: GenerationConfig) -> None:
        """Let `generate` stop there: at these ids besides those that the configuration has, and at these texts alone.

        A control token of another template ends nothing else; a text like `###` may be part of an answer.
        """
        config.eos_token_id = list(dict.fromkeys([*self.ids, *_listed(config.eos_token_id)])) or None
        config.stop_strings = list(self.strings) or None

    def with_strings(self, others: str | Sequence[str] | None) -> Ends:
        """These ends and other texts."""
        strings = dict.fromkeys([*self.strings, *_listed(others)])
        return replace(self, strings=tuple(strings), texts=tuple(dict.fromkeys([*self.texts, *strings])))

    def cut(self, text: str) -> str:
        """A new text up to its first end."""
        return min((text.partition(end)[0] for end in self.texts), key=len, default=text)


def find_ends(template: str | None, tokenizer: PreTrainedTokenizerBase) -> Ends:
    """The ends of an answer in a conversation template; without one the tokenizer's own.

    Args:
        template: Jinja, as `llava_skip.conversation.render` takes it.
        tokenizer: the language model's.
    """
    end = "" if template is None else _text_after_an_answer(template, tokenizer.special_tokens_map)
    place, control = _first_control_token(end, tokenizer)
    before = end[:place]
    if control is None and before.strip():
        before = before.rstrip()  # "###\n" is over at "###"
    # A line end may end a caption; a space ends nothing, nor does what stands between an answer and its control token.
    is_end = before.strip() or (control is None and "\n" in before)
    strings = (before,) if is_end else ()
    ids = [tokenizer.convert_tokens_to_ids(token) for token in (control, tokenizer.eos_token) if token is not None]
    return Ends(tuple(dict.fromkeys(ids)), strings, strings if control is None else (*strings, control))


def learn_ends(model: Any, processor: Any) -> None:
    """Let a model's `generate` stop where the template of its processor, or tokenizer, ends an answer."""
    ends_of(processor).save_in(model.generation_config)


def ends_of(processor: Any) -> Ends:
    """The ends of an answer in the template of a processor, or of a tokenizer."""
    template = processor.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    return find_ends(template, getattr(processor, "tokenizer", processor))


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _text_after_an_answer(template: str, special_tokens: dict[str, str]) -> str:
    """What is supervised after an answer; empty if the template does not show the answer as it is."""
    for parts in (False, True):  # some templates know text only as a list of parts
        turns = [("user", "?"), ("assistant", _ANSWER)]
        messages: list[dict[str, Any]] = [
            {"role": role, "content": [{"type": "text", "text": text}] if parts else text} for role, text in turns
        ]
        try:
            text, spans = render(template, messages, special_tokens)
        except EndlessTemplate:
            raise
        except UserError:  # it refuses this form, and a conversation that it does take will be shown to it later
            continue
        for first, end in spans:
            _, answer, after = text[first:end].partition(_ANSWER)
            if answer:
                return after
    return ""


def _first_control_token(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, str | None]:
    """Place of the first control token in a text, and the token; the text's length and None without one."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    tokens: Sequence[str] = [token for token in {*added, *tokenizer.all_special_tokens} if token.strip()]
    found = [(text.index(token), -len(token), token) for token in tokens if token in text]
    if not found:
        return len(text), None
    place, _, token = min(found)
    return place, token
