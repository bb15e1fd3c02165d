"""Load a saved model and let it answer batches of pictures and prompts, greedily."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import llava_skip  # noqa: F401  registers the library's models with the Auto classes
from eval.errors import EvalError
from eval.images import Picture
from eval.models import SavedModel


class Generator:
    """A model with its processor, on the device there is: bfloat16 on CUDA, float32 on CPU."""

    def __init__(self, model: SavedModel, max_new_tokens: int) -> None:
        """Load processor and weights.

        Args:
            model: the checked folder.
            max_new_tokens: limit of an answer's length.

        Raises:
            EvalError: if transformers cannot load the folder.
        """
        device, dtype = placement()
        try:
            self.processor = AutoProcessor.from_pretrained(model.folder)
            loaded: Any = AutoModelForImageTextToText.from_pretrained(model.folder, dtype=getattr(torch, dtype))
        except (OSError, ValueError, KeyError) as error:
            raise EvalError(f"{model.folder}: cannot be loaded as a model with pictures and text: {error}") from error
        self.model = loaded.to(device).eval()
        self.max_new_tokens = max_new_tokens

    @torch.inference_mode()
    def answer(self, prompts: Sequence[str], images: Sequence[Sequence[Picture]]) -> list[str]:
        """Answer a batch.

        Args:
            prompts: the questions.
            images: the pictures of each, shown before its question.

        Returns:
            The answers, without special tokens and surrounding spaces.
        """
        conversations = [_conversation(prompt, own) for prompt, own in zip(prompts, images, strict=True)]
        inputs = self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        inputs = {name: self._place(value) for name, value in inputs.items()}
        output = self.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=self.max_new_tokens)
        new = output[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]

    def _place(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)


def placement() -> tuple[str, str]:
    """Return the device and the name of the number format that models run in here."""
    return ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")


def _conversation(prompt: str, images: Sequence[Picture]) -> list[dict[str, Any]]:
    pictures = [{"type": "image", "image": picture.open()} for picture in images]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": prompt}]}]
