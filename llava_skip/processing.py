"""Images and conversations -> model inputs."""

from __future__ import annotations

import os
import re
from typing import Any

import numpy as np
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, ProcessorMixin
from transformers.processing_utils import MultiModalData

from llava_skip.configuration import IGNORE_INDEX, LlavaSkipConfig
from llava_skip.conversation import Messages, Span, load_template, render, supervised_tokens
from llava_skip.ends import ends_of
from llava_skip.folder_code import processor_map, write_module
from llava_skip.vision import get_front_end
from llava_skip.vision.square import SquareImageProcessorPil
from llava_skip.vision.values import AS_BYTES
from llava_skip_base.errors import UserError
from llava_skip_base.images import MOST_PIXELS, work_pixels

IMAGE_TOKEN = "<image>"


class LlavaSkipProcessor(ProcessorMixin):
    """Image processor and tokenizer in one; each `<image>` of a text becomes the image tokens of an image.

    Text alone, several images in a sample and batches of both work: `processor(images=..., text=...)` and
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
            tokenizer: has `image_token` as one token.
            image_seq_length: image tokens that an image takes, `config.image_seq_length` of the model.
            image_token: the placeholder.
            chat_template: a Jinja conversation template; None takes the tokenizer's.
            crop_rows: image tokens of one crop if an image takes that many for each of its crops; None if every image
                takes `image_seq_length`.
            **kwargs: unused fields of a saved processor.

        Raises:
            UserError: no `image_seq_length`, or a tokenizer without the placeholder.
        """
        if image_seq_length is None:
            raise UserError("image_seq_length is missing: give the image_seq_length of the model's configuration.")
        self.image_seq_length = image_seq_length
        self.crop_rows = crop_rows
        self.image_token = image_token
        self.image_token_id = find_image_token(tokenizer, image_token)
        add_llamas_first_token(tokenizer)
        self._space_begins_text = begins_text_with_space(tokenizer)
        self._special = (image_token, *(t.content for t in tokenizer.added_tokens_decoder.values() if t.special))
        tokenizer.padding_side = "left"  # generation appends on the right; training pads its batches itself
        image_processor = SquareImageProcessorPil.like(image_processor)  # a saved one has the name of transformers' own
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)

    @classmethod
    def for_config(
        cls, config: LlavaSkipConfig, tokenizer: PreTrainedTokenizerBase, template: str | None = None
    ) -> LlavaSkipProcessor:
        """The processor of a model: images are padded to a square and resized to the tower's size, as in LLaVA-1.5.

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

    def follow(self, config: LlavaSkipConfig) -> None:
        """Give an image as many tokens as a model of this configuration, whose reduction was changed, takes."""
        self.image_seq_length = config.image_seq_length
        self.crop_rows = get_front_end(config.front_end).crop_length(config)

    def to_dict(self) -> dict[str, Any]:
        """As in transformers; with the class of the module that `to_json_file` writes."""
        return super().to_dict() | {"auto_map": processor_map()}

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """As in transformers; with the module by which the folder is read without `import llava_skip`."""
        super().to_json_file(json_file_path)
        write_module(json_file_path)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoProcessor") -> None:
        """Does nothing: transformers would copy the file of the class into saved folders, and load it from there."""

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """The image tokens of one image (called by transformers for each `<image>`)."""
        if self.crop_rows is not None:
            return self.image_token * (self.crop_rows * int(image_inputs["crop_counts"][image_idx]))
        return self.image_token * self.image_seq_length

    def get_text_with_replacements(self, *args: Any, **kwargs: Any) -> tuple[list[str], list[list[dict[str, Any]]]]:
        """Transformers' step that writes the image tokens; the text behind an image then begins as in LLaVA."""
        texts, replaced = super().get_text_with_replacements(*args, **kwargs)
        return [self._begin_texts(text, own) for text, own in zip(texts, replaced, strict=True)], replaced

    def _begin_texts(self, text: str, replaced: list[dict[str, Any]]) -> str:
        """The text with a space behind each image where LLaVA has the token of one, which counts as the image's.

        LLaVA tokenises the text behind an image for itself, and a SentencePiece tokenizer begins each text as if with a
        space. In one text it does so or not, depending on its flags; a space that is written is a token in any case.
        """
        added = 0
        for change in replaced:
            start, end = (place + added for place in change["new_span"])
            if self._space_begins_text and end < len(text) and not text.startswith(self._special, end):
                text, end, added = f"{text[:end]} {text[end:]}", end + 1, added + 1
            change |= {"new_span": (start, end), "replacement": text[start:end]}
        return text

    def image_length(self, width: int, height: int, **kwargs: Any) -> int:
        """Image tokens that an image of this size in pixels takes, under the image processor's arguments of a call."""
        if self.crop_rows is None:
            return self.image_seq_length
        return self.crop_rows * self.image_processor.count_crops(width, height, **kwargs)

    def _get_num_multimodal_tokens(
        self, image_sizes: list[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Image tokens and crops of images of these heights and widths; engines ask transformers' processors for it."""
        if image_sizes is None:
            return MultiModalData()
        given = kwargs | (kwargs.pop("images_kwargs", None) or {})
        count = getattr(self.image_processor, "count_crops", lambda width, height, **kwargs: 1)
        return MultiModalData(
            num_image_tokens=[self.image_length(width, height, **given) for height, width in image_sizes],
            num_image_patches=[count(width, height, **given) for height, width in image_sizes],
        )

    @property
    def length_depends_on_size(self) -> bool:
        """Whether images of different sizes take different numbers of tokens."""
        return self.crop_rows is not None and not self.image_processor.do_pad

    def check_image_size(self, width: int, height: int) -> None:
        """Refuse an image that would take too much time and memory.

        Raises:
            UserError: the image processor would make an image of more than `MOST_PIXELS` pixels of it.
        """
        images = self.image_processor
        scales = not images.do_pad and images.do_resize and not hasattr(images, "count_crops")  # tiles have their size
        side = images.size["shortest_edge"] if scales else None
        if not (scales or images.do_pad):
            return
        if (pixels := work_pixels(width, height, side)) > MOST_PIXELS:
            what = "padded to a square" if side is None else f"scaled to {side} pixels on its shorter side"
            raise UserError(
                f"{width} x {height} pixels would become {pixels / 1e6:,.0f} million, {what}; at most "
                f"{MOST_PIXELS / 1e6:,.0f} million are made: cut the image, or scale it down."
            )

    def encode_conversation(self, messages: Messages, images: list[Any], as_bytes: bool = False) -> dict[str, Any]:
        """One training sample: the conversation as the chat template renders it, with labels on the answers.

        Args:
            messages: `{"role": ..., "content": ...}` turns in transformers' format; text may hold `<image>`.
            images: in the order of their placeholders.
            as_bytes: whether pixels stay bytes, for `PixelValues` to rescale and normalise on a device.

        Returns:
            `input_ids` and `labels` (lists of T, -100 on tokens that are not supervised), and `pixel_values`
            [N, 3, side, side] if there are images.

        Raises:
            UserError: images and placeholders differ in number, or see `llava_skip.conversation.render`.
        """
        text, spans = self.render_conversation(messages)
        if (shown := text.count(self.image_token)) != len(images):
            raise UserError(f"The template shows {shown} of {len(images)} images.")
        encoded = self(
            images=[images] if images else None,
            text=[text],
            add_special_tokens=self.adds_special_tokens(text),
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
            images_kwargs=AS_BYTES if as_bytes else {},
        )
        input_ids = encoded["input_ids"][0]
        replaced = encoded["text_replacement_offsets"] or [[]]
        supervised = supervised_tokens(encoded["offset_mapping"][0], spans, replaced[0])
        labels = [
            token if has_label and token != self.image_token_id else IGNORE_INDEX
            for token, has_label in zip(input_ids, supervised, strict=True)
        ]
        sample = {"input_ids": input_ids, "labels": labels}
        if images:
            sample |= {name: encoded[name] for name in ("pixel_values", "crop_counts") if name in encoded}
        return sample

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """The texts of `generate`'s outputs [B, T], prompt and answer; without the end of the answer, as with others.

        `generate` stops with the token that completes an end. That token may be an ordinary one, which is not left
        out as a special one is.
        """
        ends = ends_of(self).texts if skip_special_tokens else ()
        special = {token for token, added in self.tokenizer.added_tokens_decoder.items() if added.special}
        rows = generated_outputs.tolist() if hasattr(generated_outputs, "tolist") else generated_outputs
        texts = []
        for row in rows if isinstance(rows[0], list) else [rows]:
            shorter = [token for token in row if token not in special][:-1]
            text, before = (
                self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, **kwargs) for ids in (row, shorter)
            )
            completed = [text.rindex(end) for end in ends if text.count(end) > before.count(end)]
            texts.append(text[: min(completed, default=None)])
        return texts

    def render_conversation(self, messages: Messages) -> tuple[str, list[Span]]:
        """A conversation as the chat template renders it: text, one `<image>` an image, and its supervised spans."""
        return render(self.chat_template, messages, self.tokenizer.special_tokens_map)

    def tokenize_conversation(self, messages: Messages) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [T] of a conversation, each `<image>` one token, and which of them are supervised [T] bool.

        The same tokens as in `encode_conversation`, without the images.
        """
        text, spans = self.render_conversation(messages)
        special = self.adds_special_tokens(text)
        text, replaced = self._begin_texts_behind_images(text)
        encoded = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        ids = np.array(encoded["input_ids"])
        return ids, supervised_tokens(encoded["offset_mapping"], spans, replaced) & (ids != self.image_token_id)

    def text_to_tokenize(self, text: str) -> str:
        """A text with one `<image>` an image as it is given to the tokenizer where image tokens are written later."""
        return self._begin_texts_behind_images(text)[0]

    def _begin_texts_behind_images(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """`_begin_texts` of a text in which each `<image>` stays one token; and where these are."""
        places = [found.span() for found in re.finditer(re.escape(self.image_token), text)]
        replaced = [{"span": place, "new_span": place} for place in places]
        return self._begin_texts(text, replaced), replaced

    def adds_special_tokens(self, text: str) -> bool:
        """As in `apply_chat_template`: a template that writes the first token itself gets no second one."""
        return not (self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token))


def add_llamas_first_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a tokenizer that was read from LLaMA's tokenizer.model begin with <s>, unless its files say that it does not.

    It is the tokenizer's documented default, which transformers does not follow where the files leave it open.
    """
    options = tokenizer.init_kwargs
    if isinstance(tokenizer, LlamaTokenizer) and options.get("vocab_file") and "add_bos_token" not in options:
        tokenizer.add_bos_token = True


def image_first(text: str) -> str:
    """A turn of LLaVA's data with its only image moved to its start, as LLaVA does."""
    if text.count(IMAGE_TOKEN) != 1:
        return text
    return f"{IMAGE_TOKEN}\n{text.replace(IMAGE_TOKEN, '').strip()}".strip()


def begins_text_with_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text gets the same tokens with a space in front of it: one without a space is begun as if with one."""
    return tokenizer.encode("x", add_special_tokens=False) == tokenizer.encode(" x", add_special_tokens=False)


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
