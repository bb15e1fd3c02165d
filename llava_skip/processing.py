"""Pictures and conversations -> model inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from llava_skip.configuration import IGNORE_INDEX, LlavaSkipConfig
from llava_skip.conversation import Messages, Span, load_template, render, supervised_tokens
from llava_skip.errors import UserError
from llava_skip.vision import get_front_end

IMAGE_TOKEN = "<image>"


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
            UserError: no `image_seq_length`, or a tokenizer that does not know the placeholder.
        """
        if image_seq_length is None:
            raise UserError("image_seq_length is missing: give the image_seq_length of the model's configuration.")
        self.image_seq_length = image_seq_length
        self.crop_rows = crop_rows
        self.image_token = image_token
        self.image_token_id = find_image_token(tokenizer, image_token)
        tokenizer.padding_side = "left"  # generation goes on at the right end; training pads its batches itself
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
            UserError: the tokenizer and the configuration disagree on the image token, or an unknown template.
        """
        side = config.vision_config.image_size
        sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        front_end = get_front_end(config.front_end)
        images, crop_rows = front_end.image_processor(config, sizes), front_end.crop_length(config)
        chat_template = load_template(template) if template else None
        processor = cls(images, tokenizer, config.image_seq_length, chat_template=chat_template, crop_rows=crop_rows)
        if processor.image_token_id != config.image_token_id:
            raise UserError(
                f"The tokenizer's id of {processor.image_token!r} is {processor.image_token_id}, the model's "
                f"image_token_index is {config.image_token_id}: they must be the same."
            )
        return processor

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """The placeholders of one picture (called by transformers for each `<image>`)."""
        if self.crop_rows is not None:
            return self.image_token * (self.crop_rows * int(image_inputs["crop_counts"][image_idx]))
        return self.image_token * self.image_seq_length

    def image_length(self, width: int, height: int) -> int:
        """Rows that a picture of so many pixels takes in the language model."""
        if self.crop_rows is None:
            return self.image_seq_length
        return self.crop_rows * self.image_processor.count_crops(width, height)

    @property
    def length_depends_on_size(self) -> bool:
        """Whether pictures of different sizes take different numbers of rows."""
        return self.crop_rows is not None and not self.image_processor.do_pad

    def encode_conversation(self, messages: Messages, images: list[Any]) -> dict[str, Any]:
        """One training sample: the conversation under the chat template, its answers labelled.

        Args:
            messages: `{"role": ..., "content": ...}` turns in transformers' format; text may hold `<image>`.
            images: the pictures, in the order of their placeholders.

        Returns:
            `input_ids` and `labels` (lists of T, -100 where nothing is learnt), and `pixel_values`
            [N, 3, side, side] if there are pictures.

        Raises:
            UserError: pictures and placeholders differ in number, or see `llava_skip.conversation.render`.
        """
        text, spans = self.render_conversation(messages)
        if (shown := text.count(self.image_token)) != len(images):
            raise UserError(f"The template shows {shown} of {len(images)} images.")
        encoded = self(
            images=[images] if images else None,
            text=[text],
            add_special_tokens=self._adds_special_tokens(text),
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
        )
        input_ids = encoded["input_ids"][0]
        replaced = encoded["text_replacement_offsets"] or [[]]
        learnt = supervised_tokens(encoded["offset_mapping"][0], spans, replaced[0])
        labels = [
            token if learn and token != self.image_token_id else IGNORE_INDEX
            for token, learn in zip(input_ids, learnt, strict=True)
        ]
        sample = {"input_ids": input_ids, "labels": labels}
        if images:
            sample |= {name: encoded[name] for name in ("pixel_values", "crop_counts") if name in encoded}
        return sample

    def render_conversation(self, messages: Messages) -> tuple[str, list[Span]]:
        """A conversation under the chat template: its text, one `<image>` a picture, and the learnt characters."""
        return render(self.chat_template, messages, self.tokenizer.special_tokens_map)

    def tokenize_conversation(self, messages: Messages) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [T] of a conversation, each `<image>` one token, and which of them are learnt [T] bool.

        The same tokens as in `encode_conversation`, without the pictures.
        """
        text, spans = self.render_conversation(messages)
        special = self._adds_special_tokens(text)
        encoded = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        ids = np.array(encoded["input_ids"])
        return ids, supervised_tokens(encoded["offset_mapping"], spans, []) & (ids != self.image_token_id)

    def _adds_special_tokens(self, text: str) -> bool:
        """As `apply_chat_template`: a template that writes the first token itself gets no second one."""
        return not (self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token))


def find_image_token(tokenizer: PreTrainedTokenizerBase, image_token: str = IMAGE_TOKEN) -> int:
    """The id of the image token.

    Raises:
        UserError: the tokenizer does not know it as one token.
    """
    ids = tokenizer.encode(image_token, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise UserError(
            f"The tokenizer does not know the image token {image_token!r} as one token (it encodes to {ids}): add it "
            f"with tokenizer.add_tokens([{image_token!r}], special_tokens=True) and resize the model's embeddings."
        )
    return ids[0]
