import os
import tempfile
from collections import Counter
from pathlib import Path

# Tables and reports of made-up data; started processes use it too.
os.environ["HF_DATASETS_CACHE"] = (cache := tempfile.TemporaryDirectory(prefix="llava-skip-tests-")).name
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The tests' processes share the cores: threads of a started program that wait for each other would take them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llava_skip import LlavaSkipForConditionalGeneration, LlavaSkipProcessor, preset_config


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the fewest tests come first: theirs take longest, and the many short ones fill the end."""
    sizes = Counter(item.path for item in items)
    items.sort(key=lambda item: (sizes[item.path], item.path))


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights with a tokenizer of single bytes."""
    return save_random(tmp_path_factory.mktemp("models") / "random", "sv-llava-64")


@pytest.fixture(scope="session")
def saved_dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its dense twin, also of random weights."""
    return save_random(tmp_path_factory.mktemp("models") / "dense", "llava")


def save_random(folder: Path, preset: str) -> Path:
    """Save a model of a preset, with its tokenizer."""
    backend = Tokenizer(models.BPE({byte: n for n, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token) for token in ("<pad>", "</s>", "<image>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    torch.manual_seed(0)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = preset_config(preset, vocab_size=len(tokenizer), **ids)
    config.image_token_index = tokenizer.convert_tokens_to_ids("<image>")
    LlavaSkipForConditionalGeneration(config).save_pretrained(folder)
    LlavaSkipProcessor.for_config(config, tokenizer, "v1").save_pretrained(folder)
    return folder
