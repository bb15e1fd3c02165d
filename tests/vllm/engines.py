"""Small saved models, what the library's own `generate` answers with them, and engines around them."""

import gc
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, MistralConfig, Qwen2Config, Qwen3Config

from llava_skip import LlavaSkipForConditionalGeneration, LlavaSkipProcessor
from llava_skip.checkpoints.processor import load_processor
from tests.support.conversations import byte_tokenizer, random_image
from tests.support.small_models import small_model

NEW = 12
QUESTIONS = ("What is this?", "And here: how many?", "Why")
TEXTS = {"mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
TEMPLATE = (
    "{% for turn in messages %}{{ turn.role }}: {% if turn.content is string %}{{ turn.content }}{% else %}"
    "{% for part in turn.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %} {% endfor %}assistant:"
)
"""It writes no first token, so that the tokenizer has to."""


def save(
    folder: Path, skip=None, architecture: str | None = None, kind: str = "llama", tokenizer=None, **fields: Any
) -> Path:
    """A model with random weights in bfloat16's head widths that the CPU backend has, and its processor.

    Args:
        folder: where to.
        skip: the method; None with an architecture of `small_models`.
        architecture: see there.
        kind: the language model.
        tokenizer: another one than that of single bytes.
        **fields: of the configuration.
    """
    tokenizer = byte_tokenizer() if tokenizer is None else tokenizer
    text = {"vocab_size": len(tokenizer), "head_dim": 32, "bos_token_id": 1, "eos_token_id": 2}
    model = small_model(skip, architecture, **text)
    config = model.config
    if kind != "llama" or fields:
        values = config.to_dict() | fields
        if kind != "llama":
            own = {
                name: value for name, value in values["text_config"].items() if name not in ("model_type", "head_dim")
            }
            own |= {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
            values["text_config"] = TEXTS[kind](**own | {"sliding_window": None, "layer_types": None}).to_dict()
        config = type(config).from_dict(values)
        torch.manual_seed(3)
        model = LlavaSkipForConditionalGeneration(config).eval()
    config.image_token_index = tokenizer.convert_tokens_to_ids("<image>")
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    processor = LlavaSkipProcessor.for_config(config, tokenizer)
    processor.chat_template = TEMPLATE
    processor.save_pretrained(folder)
    return folder


def questions(number: int = 6, most: int = 3) -> list[list[Any]]:
    """Conversations of one question about 1, 1, 0, 2, 1, 3 images of different sizes, and so on."""
    counts, made = (1, 1, 0, 2, 1, 3), []
    for n in range(number):
        images = [
            random_image(20 + 7 * (n % 3) + 30 * k, 12 + 9 * k, seed=10 * n + k)
            for k in range(min(most, counts[n % 6]))
        ]
        content = [{"type": "image", "image": image} for image in images]
        made.append([{"role": "user", "content": [*content, {"type": "text", "text": QUESTIONS[n % 3]}]}])
    return made


def images_of(conversation: list[Any]) -> list[Any]:
    return [part["image"] for part in conversation[0]["content"] if part["type"] == "image"]


def prompts(folder: Path, conversations: Sequence[list[Any]]) -> list[dict[str, Any]]:
    """What `LLM.generate` takes: the rendered text and the images."""
    texts = load_processor(folder).apply_chat_template(list(conversations), tokenize=False, add_generation_prompt=True)
    made = [{"prompt": text} for text in texts]
    for prompt, conversation in zip(made, conversations, strict=True):
        if images := images_of(conversation):
            prompt["multi_modal_data"] = {"image": images}
    return made


def answers(folder: Path, conversations: Sequence[list[Any]], new: int = NEW, **options: Any) -> list[list[int]]:
    """The tokens that `generate` of the library gives each conversation by itself."""
    processor = load_processor(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    made = []
    for own in conversations:
        inputs = processor.apply_chat_template(
            own, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        tokens = model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, **options)
        made.append(tokens[0, inputs["input_ids"].shape[1] :].tolist())
    return made


@contextmanager
def engine(folder: Path, own_process: bool = False, **options: Any) -> Iterator[Any]:
    """vLLM's engine in this process; its memory is free again afterwards.

    With guessed tokens it needs a process of its own: after numba's import, vLLM makes no further engine in a process.
    """
    from vllm import LLM

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(own_process))
    logging.getLogger("vllm").setLevel(logging.ERROR)
    settings = {"dtype": "float32", "enforce_eager": True, "block_size": 32, "seed": 0, "disable_log_stats": False}
    llm = LLM(str(folder), **settings | {"num_gpu_blocks_override": 64, "max_num_seqs": 32} | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def greedy(new: int = NEW, **options: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=new, min_tokens=new, **options)


def tokens(outputs: Sequence[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]
