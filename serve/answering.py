"""Answers the turns of a conversation: text as it comes, what a turn cost, and the cache of the turns before.

The cache goes on from turn to turn, so a question costs its own tokens, and those of its images. It is cut back to what
the new prompt begins with: a chat template may write an answer in other tokens than the model has.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from operator import is_
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import BatchFeature, StoppingCriteria, StoppingCriteriaList, TextStreamer
from transformers.cache_utils import Cache, DynamicCache

from llava_skip.cache import ForgettingCache
from llava_skip.ends import Ends
from llava_skip.foreign_templates import calling_template
from llava_skip_base.errors import UserError
from serve.conversation import HasMessages, Picture
from serve.loading import Loaded

_ONE_ANSWER: dict[str, Any] = {
    "num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": True, "use_cache": True,
    "cache_implementation": None, "cache_config": None, "prefill_chunk_size": None, "prompt_lookup_num_tokens": None,
    "max_length": None, "min_length": 0, "min_new_tokens": None, "output_scores": False, "output_logits": False,
    "penalty_alpha": None, "dola_layers": None, "constraints": None, "force_words_ids": None, "token_healing": False,
    "use_mtp": False, "assistant_early_exit": None, "is_assistant": False,
    "output_attentions": False, "output_hidden_states": False, "watermarking_config": None, "guidance_scale": None,
}  # fmt: skip
"""Options of `generate` that a saved generation_config.json may have otherwise: one answer, streamed, and its cache."""


@dataclass(frozen=True)
class Cost:
    """What an answer took.

    Attributes:
        tokens: generated, its end included.
        first_seconds: from the question to the first token.
        rate: tokens a second after the first one; of a single token over all of its time.
        kept: entries that a layer of the cache has, the mean of the layers.
        seen: tokens of the conversation that went through the model.
        reused: of these, the ones that were in the cache before the question.
        stopped: whether the user stopped the answer.
        complete: whether the answer came to its end, and was not cut by the limit of its length or by the user.
    """

    tokens: int
    first_seconds: float
    rate: float
    kept: float
    seen: int
    reused: int
    stopped: bool
    complete: bool

    def __str__(self) -> str:
        """One line for people."""
        parts = [
            f"{self.tokens:,} tokens",
            f"first after {self.first_seconds:.2f} s",
            f"{self.rate:.1f} tokens/s",
            f"cache keeps {self.kept:,.0f} of {self.seen:,}",
        ]
        return ", ".join(parts) + ", stopped" * self.stopped


@dataclass(frozen=True)
class AnswerOptions:
    """How one answer is made.

    Attributes:
        max_new_tokens: limit of its length.
        temperature: 0 takes the most likely token, larger numbers choose more freely.
        top_p: of the sampling, with a temperature; None is the model's own setting.
        stops: texts that end the answer, besides the ends that the template has.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float | None = None
    stops: tuple[str, ...] = ()


class VisibleText:
    """The part of a growing answer that can be shown: what may turn out to be its end waits.

    Attributes:
        is_over: whether the text has an end.
    """

    is_over = False

    def __init__(self, ends: Ends, show: Callable[[str], None]) -> None:
        self._ends, self._show = ends, show
        self._text, self._shown = "", 0

    def add(self, text: str, last: bool = False) -> None:
        """Show what is certain after some more text; with `last`, all."""
        self._text = (self._text + text).lstrip()
        answer = self._ends.cut(self._text)
        self.is_over = len(answer) < len(self._text)
        certain = len(answer) if last or len(answer) < len(self._text) else len(answer) - self._waiting(answer)
        if certain > self._shown:
            self._show(answer[self._shown : certain])
            self._shown = certain

    def _waiting(self, text: str) -> int:
        """Characters at the end of a text that may begin an end."""
        lengths = [n for end in self._ends.texts for n in range(1, len(end)) if text.endswith(end[:n])]
        return max(lengths, default=0)


class _Stream(TextStreamer):
    """transformers' streamer; counts tokens and time, and gives text to `VisibleText`."""

    def __init__(self, tokenizer: Any, text: VisibleText) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._visible, self._began = text, time.perf_counter()
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Take the prompt, then each new token."""
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter() - self._began)
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with whole words."""
        self._visible.add(text, stream_end)


class _StopAsked(StoppingCriteria):
    """Ends an answer after the token that is being made."""

    def __init__(self, is_asked: Callable[[], bool]) -> None:
        self._is_asked = is_asked

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """For each sample [B], whether it ends."""
        return torch.full((len(input_ids),), self._is_asked(), device=input_ids.device)


class Answerer:
    """Answers the last question of a conversation that grows.

    Args and attributes (another answer may have other numbers):
        loaded: the model.
        max_new_tokens: limit of an answer's length.
        temperature: 0 takes the most likely token, larger numbers choose more freely.
        exact: go on with a cache only where the answer is that of a new pass over all turns: not after one that has
            forgotten tokens, which a new pass would see.
        advice: what to do about a conversation that is too long, for messages.

    Attributes:
        prompt: the token ids of the last conversation that was answered, or is.
    """

    prompt: Sequence[int] = ()

    def __init__(
        self,
        loaded: Loaded,
        max_new_tokens: int,
        temperature: float = 0.0,
        *,
        exact: bool = False,
        advice: str = "/clear begins again",
    ) -> None:
        self._loaded, self._exact, self._advice = loaded, exact, advice
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self._cache: Cache | None = None
        self._seen: list[int] = []
        self._pictures: list[Picture] = []
        self._processed: WeakKeyDictionary[Picture, BatchFeature] = WeakKeyDictionary()

    def clear(self) -> None:
        """Forget the turns before."""
        self._cache, self._seen, self._pictures = None, [], []

    @property
    def goes_on(self) -> bool:
        """Whether there is a cache that a next question may use."""
        return self._cache is not None

    @torch.inference_mode()
    def answer(
        self,
        conversation: HasMessages,
        show: Callable[[str], None],
        is_stopped: Callable[[], bool] = lambda: False,
        options: AnswerOptions | None = None,
    ) -> tuple[str, Cost]:
        """Answer the last question.

        Args:
            conversation: ends with it.
            show: called with each new piece of the answer.
            is_stopped: asked after each token, whether the answer should end with it.
            options: of this answer; without, those of all.

        Returns:
            The answer without its end, and its cost.

        Raises:
            UserError: the template fails, or the conversation is too long for the model or the device.
        """
        options = options or AnswerOptions(self.max_new_tokens, self.temperature)
        ends = self._loaded.ends.with_strings(options.stops)
        text = VisibleText(ends, show)
        stream = _Stream(self._loaded.processor.tokenizer, text)
        ids, images = self._prompt(conversation)
        self.prompt, settings = ids, self._settings(options, len(ids))
        reused = self._reuse(ids, conversation.pictures)
        cache, self._cache = self._cache, None  # whatever happens now, it is no longer that of the turns before
        device = self._loaded.model.device
        try:
            output = self._loaded.model.generate(
                input_ids=torch.tensor([ids], device=device),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=device),
                **self._pixels(images, ids[:reused]),
                **settings,
                past_key_values=cache,
                tokenizer=self._loaded.processor.tokenizer,
                streamer=stream,
                stopping_criteria=StoppingCriteriaList(
                    [_StopAsked(lambda: is_stopped() or (text.is_over and bool(options.stops)))]
                ),
            )
        except torch.OutOfMemoryError as error:
            raise UserError(f"the conversation does not fit into the device's memory: {self._advice}.") from error
        sequence = output.sequences[0].tolist()
        self._cache, self._pictures = output.past_key_values, conversation.pictures
        self._seen = sequence[:-1]  # the last token was not put in
        answer, complete = self._text(sequence[len(ids) :], ends)
        cost = self._cost(sequence[len(ids) :], stream.times, reused, is_stopped(), complete)
        if self._exact and type(self._cache) is not DynamicCache:
            self.clear()
        return answer, cost

    def _prompt(self, conversation: HasMessages) -> tuple[list[int], list[BatchFeature]]:
        """The token ids of the whole conversation, and what the image processor makes of each of its images.

        An image is processed once, in its first turn.
        """
        processor, pictures = self._loaded.processor, conversation.pictures
        advice = "convert the model with another one (llava-skip convert SOURCE OUTPUT --template NAME)."
        with calling_template("the chat template", advice):
            text = processor.apply_chat_template(conversation.messages(), add_generation_prompt=True, tokenize=False)
        if (shown := text.count(processor.image_token)) != len(pictures):
            raise UserError(f"the chat template shows {shown} of {len(pictures)} images; {advice}")
        images = [self.processed(picture) for picture in pictures]
        special = processor.adds_special_tokens(text)
        tokens = [processor.replace_image_token(image, 0) for image in images]
        whole = processor.get_text_with_replacements([text], tokens)[0][0]
        return processor.tokenizer(whole, add_special_tokens=special, verbose=False)["input_ids"], images

    def processed(self, picture: Picture) -> BatchFeature:
        """What the image processor makes of an image of the conversation."""
        if picture not in self._processed:
            self._processed[picture] = self._loaded.processor.image_processor(picture.pixels, return_tensors="pt")
        return self._processed[picture]

    def _pixels(self, images: list[BatchFeature], known: list[int]) -> dict[str, Tensor]:
        """The inputs of the images whose tokens are not in the cache, on the model's device."""
        processor, model = self._loaded.processor, self._loaded.model
        left = known.count(model.config.image_token_id)
        while left > 0:
            tokens = processor.replace_image_token(images[0], 0).count(processor.image_token)
            left, images = left - tokens, images[1:]
        names = [name for name in ("pixel_values", "crop_counts") if images and name in images[0]]
        inputs = {name: torch.cat([image[name] for image in images]).to(model.device) for name in names}
        return {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}

    def _settings(self, options: AnswerOptions, length: int) -> dict[str, Any]:
        """Arguments of `generate` for a prompt of this many tokens."""
        model = self._loaded.model
        most = getattr(model.config.text_config, "max_position_embeddings", None)
        room = options.max_new_tokens if most is None else most - length
        if room < 1:
            raise UserError(f"the conversation has {length:,} tokens, and the model takes {most:,}: {self._advice}.")
        sampling: dict[str, Any] = {"do_sample": False}
        if options.temperature:
            top_k = model.generation_config.top_k or 0  # without one, `generate` would take 50
            sampling = {"do_sample": True, "temperature": options.temperature, "top_k": top_k}
            sampling |= {} if options.top_p is None else {"top_p": options.top_p}
        never = [*(model.generation_config.suppress_tokens or []), model.config.image_token_id]  # stands for no text
        return {
            "max_new_tokens": min(options.max_new_tokens, room),
            "suppress_tokens": never,
            **sampling,
            **_ONE_ANSWER,
        }

    def _reuse(self, ids: list[int], pictures: list[Picture]) -> int:
        """Cut the cache back to what a prompt begins with; the number of its tokens that stay."""
        if self._cache is None:
            return 0
        pairs = zip(ids[:-1], self._seen, strict=False)  # one token at least is new
        common = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        removed = len(self._seen) - common
        is_same = len(self._pictures) <= len(pictures) and all(map(is_, self._pictures, pictures))
        if not common or not is_same or not _can_go_on(self._cache, removed):
            self.clear()
            return 0
        self._cache.crop(-removed)
        return common

    def _cost(self, new: list[int], times: list[float], reused: int, stopped: bool, complete: bool) -> Cost:
        assert self._cache is not None
        stored = [layer.keys.shape[-2] for layer in self._cache.layers if layer.keys is not None]
        first, last = times[0], times[-1]
        rate = (len(new) - 1) / max(last - first, 1e-9) if len(new) > 1 else 1 / max(first, 1e-9)
        return Cost(len(new), first, rate, sum(stored) / len(stored), len(self._seen), reused, stopped, complete)

    def _text(self, new: list[int], ends: Ends) -> tuple[str, bool]:
        """The answer of new tokens, and whether it came to an end."""
        stops = set(self._loaded.model.generation_config.eos_token_id or ())
        shown = list(takewhile(lambda token: token not in stops, new))
        text = self._loaded.processor.tokenizer.decode(shown, skip_special_tokens=True)
        answer = ends.cut(text)
        return answer.strip(), len(shown) < len(new) or len(answer) < len(text)


def _can_go_on(cache: Cache, removed: int) -> bool:
    """Whether a cache serves a next turn, without its last `removed` tokens."""
    if not isinstance(cache, ForgettingCache) and type(cache) is not DynamicCache:
        return False  # a reduction inside the decoder keeps what an earlier question asked for
    return not removed or not any(getattr(layer, "is_sliding", False) for layer in cache.layers)
