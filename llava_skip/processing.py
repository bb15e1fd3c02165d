"""Pictures and conversations -> model inputs."""

from __future__ import annotations

from importlib import resources
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from llava_skip.configuration import IGNORE_INDEX, LlavaSkipConfig
from llava_skip.vision.tiling import TilingImageProcessorPil

IMAGE_TOKEN = "<image>"


def template_names() -> list[str]:
    """Names of the conversation templates that come with the library."""
    folder = resources.files("llava_skip") / "templates"
    return sorted(entry.name.removesuffix(".jinja") for entry in folder.iterdir() if entry.name.endswith(".jinja"))


def load_template(name: str) -> str:
    """A conversation template (Jinja, with the learnt parts in `generation` blocks) by name.

    Raises:
        ValueError: an unknown name, with the list of the known ones.
    """
    if name not in template_names():
        raise ValueError(f"Unknown conversation template {name!r}; known: {', '.join(template_names())}.")
    return (resources.files("llava_skip") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


class LlavaSkipProcessor(ProcessorMixin):
    """Image processor and tokenizer in one; each `<image>` of a text becomes the placeholder rows of a picture.

    Text alone, several pictures a sample and batches of both work: `processor(images=..., text=...)` and
    `processor.apply_chat_template(...)` as for any processor of transformers.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_length: int | None = None,
        image_token: str = IMAGE_TOKEN,
        chat_template: str | None = None,
        crop_rows: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Join the two.

        Args:
            image_processor: gives `pixel_values` of the vision tower's size.
            tokenizer: knows `image_token` as one token.
            image_seq_length: rows that a picture takes, `config.image_seq_length` of the model.
            image_token: the placeholder.
            chat_template: a Jinja conversation template; None takes the tokenizer's.
            crop_rows: rows of one crop, where a picture takes as many times that as it has crops; None where every
                picture takes `image_seq_length`.
            **kwargs: unused fields of a saved processor.

        Raises:
            ValueError: no `image_seq_length`, or a tokenizer that does not know the placeholder.
        """
        if image_seq_length is None:
            raise ValueError("image_seq_length is missing: give the image_seq_length of the model's configuration.")
        self.image_seq_length = image_seq_length
        self.crop_rows = crop_rows
        self.image_token = image_token
        self.image_token_id = find_image_token(tokenizer, image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)

    @classmethod
    def for_config(
        cls, config: LlavaSkipConfig, tokenizer: PreTrainedTokenizerBase, template: str | None = None
    ) -> LlavaSkipProcessor:
        """The processor of a model: pictures padded to a square and resized to the tower's size, as LLaVA-1.5 does.

        Args:
            config: the model's configuration.
            tokenizer: the language model's tokenizer, with the image token.
            template: name of a conversation template; None keeps the tokenizer's own.

        Raises:
            ValueError: the tokenizer and the configuration disagree on the image token, or an unknown template.
        """
        side = config.vision_config.image_size
        sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        pictures, crop_rows = LlavaImageProcessorPil(**sizes, do_pad=True), None
        if config.front_end == "hd":
            pictures = TilingImageProcessorPil(config.max_tiles, **sizes, do_pad=config.pad_pictures)
            crop_rows = config.patches if config.skip is None else None
        chat_template = load_template(template) if template else None
        processor = cls(pictures, tokenizer, config.image_seq_length, chat_template=chat_template, crop_rows=crop_rows)
        if processor.image_token_id != config.image_token_id:
            raise ValueError(
                f"The tokenizer's id of {processor.image_token!r} is {processor.image_token_id}, the model's "
                f"image_token_index is {config.image_token_id}: they must be the same."
            )
        return processor

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """The placeholders of one picture (called by transformers for each `<image>`)."""
        if self.crop_rows is not None:
            return self.image_token * (self.crop_rows * int(image_inputs["crop_counts"][image_idx]))
        return self.image_token * self.image_seq_length

    def encode_conversation(self, messages: list[dict[str, Any]], images: list[Any]) -> dict[str, Any]:
        """One training sample: the conversation under the chat template, its answers labelled.

        Args:
            messages: `{"role": ..., "content": ...}` turns in transformers' format; text may hold `<image>`.
            images: the pictures, in the order of their placeholders.

        Returns:
            `input_ids` and `labels` (lists of T, -100 where nothing is learnt), and `pixel_values`
            [N, 3, side, side] if there are pictures.

        Raises:
            ValueError: pictures and placeholders differ in number, or the template marks no learnt part.
        """
        encoded = self.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            processor_kwargs={
                "images": images or None,
                "return_offsets_mapping": True,
                "return_text_replacement_offsets": True,
            },
        )
        input_ids = encoded["input_ids"][0]
        labels = [
            i if learnt else IGNORE_INDEX for i, learnt in zip(input_ids, encoded["assistant_masks"][0], strict=True)
        ]
        sample = {"input_ids": input_ids, "labels": labels}
        if images:
            sample |= {name: encoded[name] for name in ("pixel_values", "crop_counts") if name in encoded}
        return sample


def find_image_token(tokenizer: PreTrainedTokenizerBase, image_token: str = IMAGE_TOKEN) -> int:
    """The id of the image token.

    Raises:
        ValueError: the tokenizer does not know it as one token.
    """
    ids = tokenizer.encode(image_token, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise ValueError(
            f"The tokenizer does not know the image token {image_token!r} as one token (it encodes to {ids}): add it "
            f"with tokenizer.add_tokens([{image_token!r}], special_tokens=True) and resize the model's embeddings."
        )
    return ids[0]
