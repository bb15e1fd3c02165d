"""Text prompts -> tokens, as the library's processor does: the first token of a sequence, and text behind an image."""

from __future__ import annotations

from typing import Any

from vllm.renderers.hf import HfRenderer
from vllm.transformers_utils.processor import cached_processor_from_config

from llava_skip.processing import LlavaSkipProcessor, add_llamas_first_token


class SkipRenderer(HfRenderer):
    """vLLM's own renderer, but for the tokens of a text."""

    def __init__(self, config: Any, tokenizer: Any) -> None:
        add_llamas_first_token(tokenizer)
        super().__init__(config, tokenizer)
        self._processor = cached_processor_from_config(config.model_config, processor_cls=LlavaSkipProcessor)

    def _tokenize_prompt(self, prompt: Any, params: Any) -> Any:
        """As the processor does; `add_special_tokens`, which is false for a chat, is not asked."""
        text = self._processor.text_to_tokenize(prompt["prompt"])
        arguments = params.get_encode_kwargs() | {"add_special_tokens": self._processor.adds_special_tokens(text)}
        ids = self.get_tokenizer()(text, **arguments)["input_ids"]
        return {**prompt, "prompt_token_ids": list(ids)}
