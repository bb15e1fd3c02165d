"""The chat template of a model: it is tried before the weights are loaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_skip.foreign_templates import EndlessTemplate, calling_template
from llava_skip_base.errors import UserError

_QUESTION = "Which?"
_PROBES: tuple[Any, ...] = (_QUESTION, [{"type": "image"}, {"type": "text", "text": _QUESTION}])
"""What a user can say, in the forms that templates take."""
_ADVICE = "correct it, or save the model with another one (llava-skip convert SOURCE OUTPUT --template NAME does)."


def check_template(folder: Path, processor: Any, takes_images: bool) -> None:
    """Refuse a chat template that writes no question of any form, before the weights are loaded.

    Raises:
        UserError: its error, or that it does not end.
    """
    errors = []
    for content in _PROBES if takes_images else _PROBES[:1]:
        try:
            render(folder, processor, [[{"role": "user", "content": content}]])
            return
        except EndlessTemplate:
            raise
        except UserError as error:
            errors.append(error)
    raise errors[-1]


def render(folder: Path, processor: Any, conversations: Sequence[list[dict[str, Any]]]) -> list[str]:
    """The texts of conversations by the processor's chat template; errors as `calling_template`."""
    with calling_template(f"{folder}: its chat template", _ADVICE):
        return processor.apply_chat_template(list(conversations), add_generation_prompt=True, tokenize=False)
