"""Load a saved model and let it answer batches of pictures and prompts, greedily."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

import llava_skip  # noqa: F401  registers the library's models with the Auto classes
from eval.answering.models import SavedModel
from eval.errors import EvalError
from eval.reading.images import PLACEHOLDER, Picture

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Numerics:
    """How a model computes; with all of it equal, so is the rounding.

    Attributes:
        device: "cuda" or "cpu".
        dtype: number format of weights and activations, one of ``DTYPES``.
        attn: attention implementation of transformers; None takes the model's default.
    """

    device: str
    dtype: str
    attn: str | None = None


def numerics(dtype: str | None = None, attn: str | None = None) -> Numerics:
    """Choose bfloat16 on CUDA where there is a GPU, float32 on CPU otherwise.

    Args:
        dtype: another number format.
        attn: another attention implementation, such as "eager" or "flash_attention_2".

    Raises:
        EvalError: if the number format is unknown.
    """
    if dtype is not None and dtype not in DTYPES:
        raise EvalError(f"--dtype is '{dtype}'; choose one of {', '.join(DTYPES)}.")
    cuda = torch.cuda.is_available()
    return Numerics("cuda" if cuda else "cpu", dtype or ("bfloat16" if cuda else "float32"), attn)


class Generator:
    """A model with its processor on one device; a bare language model answers questions without pictures."""

    def __init__(self, model: SavedModel, numerics: Numerics, rank: int = 0) -> None:
        """Load processor and weights.

        Args:
            model: the checked folder.
            numerics: device, number format and attention.
            rank: number of this process; each takes the next GPU.

        Raises:
            EvalError: if transformers cannot load the folder.
        """
        options: dict[str, Any] = {"dtype": getattr(torch, numerics.dtype)}
        if numerics.attn is not None:
            options["attn_implementation"] = numerics.attn
        try:
            kind = type(AutoConfig.from_pretrained(model.folder))
            self.takes_images = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or kind not in MODEL_FOR_CAUSAL_LM_MAPPING
            auto = AutoModelForImageTextToText if self.takes_images else AutoModelForCausalLM
            self.processor = (AutoProcessor if self.takes_images else AutoTokenizer).from_pretrained(model.folder)
            loaded: Any = auto.from_pretrained(model.folder, **options)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise EvalError(f"{model.folder}: cannot be loaded as a model with pictures and text: {error}") from error
        if not getattr(self.processor, "chat_template", None):
            raise EvalError(
                f"{model.folder}: its processor has no chat template; save it with the one it was trained on "
                "(python -m llava_skip.convert SOURCE OUTPUT --template NAME does)."
            )
        device = f"cuda:{rank % torch.cuda.device_count()}" if numerics.device == "cuda" else numerics.device
        self.model = loaded.to(device).eval()

    @torch.inference_mode()
    def answer(self, prompts: Sequence[str], images: Sequence[Sequence[Picture]], max_new_tokens: int) -> list[str]:
        """Answer a batch.

        Args:
            prompts: the questions.
            images: the pictures of each, shown before its question.
            max_new_tokens: limit of an answer's length.

        Returns:
            The answers, without special tokens and surrounding spaces.

        Raises:
            EvalError: if the batch does not fit into the GPU's memory, or a language model is shown a picture.
        """
        if not self.takes_images and any(images):
            raise EvalError("a bare language model cannot see pictures; ask it with --blind.")
        return self.reply([conversation(*pair) for pair in zip(prompts, images, strict=True)], max_new_tokens)

    @torch.inference_mode()
    def reply(self, conversations: Sequence[list[dict[str, Any]]], max_new_tokens: int) -> list[str]:
        """Continue conversations of transformers' format, pictures included, as ``answer`` does.

        Args:
            conversations: turns with ``role`` and ``content``.
            max_new_tokens: limit of an answer's length.
        """
        padding: dict[str, Any] = {"padding": True, "tokenizer_kwargs": {"padding_side": "left"}}
        if self.takes_images:
            padding = {"processor_kwargs": {"padding": True, "padding_side": "left"}}
        inputs = self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **padding,
        )
        inputs = {name: self._place(value) for name, value in inputs.items()}
        try:
            output = self.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens)
        except torch.OutOfMemoryError as error:
            raise EvalError(
                f"a batch of {len(conversations)} does not fit into the GPU's memory; give a smaller --batch-size."
            ) from error
        new = output[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]

    def _place(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)


def conversation(prompt: str, images: Sequence[Picture]) -> list[dict[str, Any]]:
    """Word one user turn of pictures and a question, as chat templates take it; without pictures it is plain text.

    Args:
        prompt: the question, with as many ``PLACEHOLDER`` as pictures, or none.
        images: its pictures, shown at their places, or before a question that names none.
    """
    texts = prompt.replace(f"{PLACEHOLDER}\n", PLACEHOLDER).split(PLACEHOLDER)  # templates end a picture's line
    if not images:
        return [{"role": "user", "content": "".join(texts).strip()}]
    if len(texts) == 1:
        texts = [""] * len(images) + texts
    content: list[dict[str, Any]] = []
    for text, picture in zip_longest(texts, images):
        content += [{"type": "text", "text": text}] if text else []
        content += [{"type": "image", "image": picture.open()}] if picture else []
    return [{"role": "user", "content": content}]
