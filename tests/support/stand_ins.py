"""Small stand-ins for a language model, a CLIP tower and LLaVA's data, in the file formats of the real ones."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)


def word_tokenizer(folder: Path, size: int = 100) -> Path:
    """A tokenizer of whole words, without `<image>` and without a padding token."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{n}": n for n in range(3, size)}
    fast = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    options = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=fast, **options).save_pretrained(folder)
    return folder


def language_model(folder: Path, tokenizer: Path) -> Path:
    """A LLaMA of width 32 with the digits' tokenizer, as a hub folder has it."""
    words = AutoTokenizer.from_pretrained(tokenizer)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes, **ids)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def vision_tower(folder: Path, side: int = 24, patch: int = 4, layers: int = 3) -> Path:
    """A CLIP tower of width 16; with the defaults 6 x 6 patches."""
    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": layers, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=side, patch_size=patch)).save_pretrained(folder)
    return folder
