"""What a fake model needs beside `answer` to take the place of `Generator`."""

from collections.abc import Callable, Sequence
from typing import Any


class AtOnce:
    """Prepares nothing ahead: `generate` calls the `answer` of the subclass."""

    cost = None

    def prepare(self, *asked: Any) -> Callable[[], Any]:
        return lambda: asked

    def generate(self, inputs: Any, max_new_tokens: int) -> list[str]:
        return self.answer(*inputs, max_new_tokens)

    def answer(self, prompts: Sequence[str], images: Any, max_new_tokens: int) -> list[str]:
        raise NotImplementedError
