"""Load a saved model and let it answer batches of images and prompts, greedily."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile, zip_longest
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AttentionInterface,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    LogitsProcessorList,
)

import llava_skip  # noqa: F401  registers the library's models with the Auto classes
from eval.answering.clock import Clock, device_name
from eval.answering.costs import BatchCost
from eval.answering.models import SavedModel
from eval.answering.templates import check_template, render
from eval.reading.images import PLACEHOLDER, ImageSource
from llava_skip.checkpoints.loading import check_native
from llava_skip.checkpoints.processor import load_processor
from llava_skip.checkpoints.schema import read_config
from llava_skip.checkpoints.tokenizer import load_tokenizer
from llava_skip.configuration import LlavaSkipConfig
from llava_skip.ends import Ends, ends_of
from llava_skip.number_formats import dtype_name
from llava_skip.vision.values import AS_BYTES, PixelValues
from llava_skip_base.console import hide_bars_in_files
from llava_skip_base.errors import UserError

Turns = list[dict[str, Any]]
"""A conversation, each turn with `role` and `content`; images are in the content, opened or not."""
Inputs = dict[str, Any]
"""What `generate` takes, on the host."""


@dataclass(frozen=True)
class Numerics:
    """How a model computes; with all of it equal, so is the rounding.

    Attributes:
        device: "cuda" or "cpu".
        dtype: number format of weights and activations, one of `llava_skip.number_formats.DTYPES`.
        attn: attention implementation of transformers; None takes the model's default.
    """

    device: str
    dtype: str
    attn: str | None = None

    def load(self, model: SavedModel, rank: int) -> "Generator":
        """A model that answers; arguments and errors as those of `Generator`."""
        return Generator(model, self, rank)


def numerics(dtype: str | None = None, attn: str | None = None) -> Numerics:
    """Choose bfloat16 on CUDA where there is a GPU, float32 on CPU otherwise.

    Args:
        dtype: another number format.
        attn: another attention implementation, such as "eager" or "flash_attention_2".

    Raises:
        UserError: one of them is unknown.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = dtype_name(dtype, device)
    known = ("eager", *AttentionInterface().valid_keys())
    if attn is not None and attn not in known and "/" not in attn:  # owner/name is a kernel of the hub
        raise UserError(f"--attn is '{attn}'; choose one of {', '.join(known)}.")
    return Numerics(device, dtype, attn)


class Generator:
    """A model with its processor on one device; a bare language model answers questions without images.

    Attributes:
        cost: what the last batch cost.
    """

    cost: BatchCost | None = None

    def __init__(self, model: SavedModel, numerics: Numerics, rank: int = 0) -> None:
        """Load processor and weights.

        Args:
            model: the checked folder.
            numerics: device, number format and attention.
            rank: number of this process; each takes the next GPU.

        Raises:
            UserError: the folder is no model with a chat template, or a file of it is broken.
        """
        options: dict[str, Any] = {"dtype": getattr(torch, numerics.dtype)}
        if numerics.attn is not None:
            options["attn_implementation"] = numerics.attn
        if read_config(model.folder).get("model_type") == LlavaSkipConfig.model_type:
            options["config"] = check_native(model.folder, model.reduction)
        ends = self._read_processor(model)
        auto = AutoModelForImageTextToText if self.takes_images else AutoModelForCausalLM
        with _readable(model.folder):
            loaded: Any = auto.from_pretrained(model.folder, **options)
        device = f"cuda:{rank % torch.cuda.device_count()}" if numerics.device == "cuda" else numerics.device
        self._take(model.folder, loaded.to(device), ends)
        self.answer_as(model)

    def _read_processor(self, model: SavedModel) -> Ends:
        """Read processor and tokenizer of a folder, and find how its answers end."""
        self.takes_images = _takes_images(model)
        self.tokenizer = load_tokenizer(model.folder)  # the processor's too, for the message if it is broken
        self.processor: Any = self.tokenizer
        hide_bars_in_files()
        if self.takes_images:
            self.processor = load_processor(model.folder)
        if not getattr(self.processor, "chat_template", None):
            raise UserError(
                f"{model.folder}: its processor has no chat template; save it with the one it was trained on "
                "(llava-skip convert SOURCE OUTPUT --template NAME does)."
            )
        check_template(model.folder, self.processor, self.takes_images)
        return ends_of(self.processor)

    @classmethod
    def of_loaded(cls, folder: Path, model: Any, processor: Any) -> "Generator":
        """One around a model with images that is loaded, on its device, and its processor.

        Args:
            folder: where it is from, for messages.
            model: `LlavaSkipForConditionalGeneration` or one of transformers.
            processor: with a chat template.
        """
        made = cls.__new__(cls)
        made.takes_images, made.processor, made.tokenizer = True, processor, processor.tokenizer
        made._take(folder, model, ends_of(processor))
        return made

    def _take(self, folder: Path, model: Any, ends: Ends) -> None:
        self.model = model.eval()
        self._values = PixelValues.of(self.processor) if self.takes_images else None
        self._begin(folder, ends, self.model.generation_config)

    def _begin(self, folder: Path, ends: Ends, config: GenerationConfig) -> None:
        self.folder = folder
        self._helper = ThreadPoolExecutor(1, "prepare")
        self.ends = ends.with_strings(config.stop_strings)  # an older folder names only the ids
        self.ends.save_in(config)
        self._config = config

    def answer_as(self, model: SavedModel) -> None:
        """From now on answer as the same folder with another reduction, or with none."""
        if model.configuration is not None:
            self.model.set_reduction(model.configuration.reduction_config)
            self.processor.follow(model.configuration)

    def answer(self, prompts: Sequence[str], images: Sequence[Sequence[ImageSource]], max_new_tokens: int) -> list[str]:
        """Answer a batch.

        Args:
            prompts: the questions.
            images: the images of each, shown before its question or at its placeholders.
            max_new_tokens: limit of an answer's length.

        Returns:
            The answers, without their end, special tokens and surrounding spaces.

        Raises:
            UserError: the batch does not fit into the GPU's memory, or a language model is given an image.
        """
        return self.reply(self.ask(prompts, images), max_new_tokens)

    def reply(self, conversations: Sequence[Turns], max_new_tokens: int) -> list[str]:
        """Continue conversations."""
        self._check(conversations)
        return self.generate(self._prepare(conversations), max_new_tokens)

    def ask(self, prompts: Sequence[str], images: Sequence[Sequence[ImageSource]]) -> list[Turns]:
        """Questions as conversations; arguments as those of `answer`.

        Raises:
            UserError: a language model is given an image.
        """
        if not self.takes_images and any(images):
            raise UserError("a bare language model cannot see images; ask it with --blind.")
        return [conversation(*pair) for pair in zip(prompts, images, strict=True)]

    def prepare(self, prompts: Sequence[str], images: Sequence[Sequence[ImageSource]]) -> Callable[[], Inputs]:
        """Start to open, resize and tokenise a batch, beside whatever the model does; arguments as those of `answer`.

        Returns:
            Waits for the inputs of `generate` and gives them, or raises what went wrong: a UserError, as `answer` does.
        """
        try:
            conversations = self.ask(prompts, images)
            self._check(conversations)  # here: only the main thread can end a template that does not end itself
        except UserError as error:
            return partial(_raise, error)
        if self.tokenizer is getattr(self.processor, "tokenizer", self.processor):
            return partial(self._prepare, conversations)  # in two threads one tokenizer raises "Already borrowed"
        return self._helper.submit(self._prepare, conversations).result

    def _check(self, conversations: Sequence[Turns]) -> None:
        """Render the conversations, for the errors of the template and its time, before it is called with images."""
        render(self.folder, self.processor, conversations)

    def _prepare(self, conversations: Sequence[Turns]) -> Inputs:
        """The inputs of a batch on the host; pixels as bytes where their values can be looked up."""
        padding: dict[str, Any] = {"padding": True, "tokenizer_kwargs": {"padding_side": "left"}}
        if self.takes_images:
            pixels = {} if self._values is None else {"images_kwargs": AS_BYTES}
            padding = {"processor_kwargs": {"padding": True, "padding_side": "left"} | pixels}
        return dict(
            self.processor.apply_chat_template(
                [opened(turns) for turns in conversations],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                **padding,
            )
        )

    @torch.inference_mode()
    def generate(self, inputs: Inputs, max_new_tokens: int) -> list[str]:
        """Answer a batch that is prepared; result and errors as `answer`."""
        inputs = {name: self._to_device(value) for name, value in inputs.items()}
        options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens}
        clock, num_questions = Clock(self.model.device), len(inputs["input_ids"])
        try:
            output = self.model.generate(
                **inputs, tokenizer=self.tokenizer, logits_processor=LogitsProcessorList([clock]), **options
            )
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"a batch of {num_questions} does not fit into the GPU's memory; give a smaller --batch-size."
            ) from error
        seconds, memory = clock.stop(), clock.peak_memory()
        rows = output[:, inputs["input_ids"].shape[1] :].tolist()
        new = [self._new_tokens(row) for row in rows]
        num_new = sum(min(len(own) + 1, len(row)) for own, row in zip(new, rows, strict=True))
        device, is_warm = device_name(self.model.device), self.cost is not None
        self.cost = BatchCost(len(rows), *seconds, num_new, *memory, device, is_warm)
        return self._texts(new)

    @property
    def _stops(self) -> set[int]:
        """The tokens that end an answer."""
        return set(self._config.eos_token_id or ())

    def _new_tokens(self, row: Sequence[int]) -> list[int]:
        """The tokens of an answer before the one that ends it."""
        stops = self._stops
        return list(takewhile(lambda token: token not in stops, row))

    def _texts(self, new: list[list[int]]) -> list[str]:
        """The texts of answers, cut at their ends."""
        return [self.ends.cut(text).strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def _to_device(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if value.dtype == torch.uint8 and self._values is not None:
            return self._values(value.to(self.model.device), self.model.dtype)
        return value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)


def _takes_images(model: SavedModel) -> bool:
    """Whether the model takes images and text; otherwise it is a language model."""
    kind = model.config.get("model_type")
    if kind in CONFIG_MAPPING:
        config = CONFIG_MAPPING[kind]
        if config in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or config in MODEL_FOR_CAUSAL_LM_MAPPING:
            return config in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    raise UserError(
        f"{model.folder}: cannot be loaded as a model with images and text, nor as a language model: "
        f"transformers has none of the type {kind!r} that its config.json names."
    )


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Around calls of transformers: what a broken file or a missing package raises becomes one message."""
    try:
        yield
    except (OSError, ImportError, SafetensorError, StrictDataclassError) as error:
        raise UserError(f"{folder}: cannot be loaded: {error}") from error


def _raise(error: UserError) -> Inputs:
    raise error


def opened(turns: Turns) -> Turns:
    """A conversation whose images are opened."""

    def part(given: Any) -> Any:
        is_closed = isinstance(given, dict) and isinstance(given.get("image"), ImageSource)
        return given | {"image": given["image"].open()} if is_closed else given

    return [turn | {"content": [part(own) for own in turn["content"]]} if isinstance(turn["content"], list) else turn
            for turn in turns]  # fmt: skip


def conversation(prompt: str, images: Sequence[ImageSource]) -> Turns:
    """One user turn of images, not opened yet, and a question, as chat templates take it; without images plain text.

    Args:
        prompt: the question, with one `PLACEHOLDER` for each image, or none.
        images: its images, shown at the placeholders, or before a question without any.
    """
    texts = prompt.replace(f"{PLACEHOLDER}\n", PLACEHOLDER).split(PLACEHOLDER)  # templates add the newline
    if not images:
        return [{"role": "user", "content": "".join(texts).strip()}]
    if len(texts) == 1:
        texts = [""] * len(images) + texts
    content: list[dict[str, Any]] = []
    for text, image in zip_longest(texts, images):
        content += [{"type": "text", "text": text}] if text else []
        content += [{"type": "image", "image": image}] if image else []
    return [{"role": "user", "content": content}]
