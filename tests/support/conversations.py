"""Conversations, images and a tokenizer of single bytes, which the tests share."""

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<image>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TURNS = [
    {"role": "user", "content": "<image>\nWhat is this?"},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "What color?"},
    {"role": "assistant", "content": "Black and white."},
]


def byte_tokenizer(special=SPECIAL, bos=True) -> PreTrainedTokenizerFast:
    """One token a byte, and the special tokens; adds <s> in front as LLaMA's does."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="right"
    )


def random_image(width=20, height=12, seed=0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def segments(processor, sample) -> list[tuple[bool, str]]:
    """Runs of supervised and other tokens, decoded; the image tokens of an image as one."""
    runs: list[tuple[bool, list[int]]] = []
    for token, label in zip(sample["input_ids"], sample["labels"], strict=True):
        assert label in (-100, token)
        supervised = label != -100
        if not runs or runs[-1][0] != supervised:
            runs.append((supervised, []))
        if not (token == 3 and runs[-1][1][-1:] == [3]):
            runs[-1][1].append(token)
    return [(supervised, processor.tokenizer.decode(tokens)) for supervised, tokens in runs]
