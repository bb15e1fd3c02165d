"""The one loader of tokenizers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from llava_skip.checkpoints.files import find_folder
from llava_skip.processing import IMAGE_TOKEN
from llava_skip_base.errors import MissingPackageError, UserError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def load_tokenizer(
    source: str | Path, text: PreTrainedConfig | None = None, add_image_token: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name, with a padding token.

    Args:
        source: the folder or hub name.
        text: configuration of the language model. It gives the tokenizer's class where the folder does not: a
            config.json may be of a type that transformers does not know, or takes for another one.
        add_image_token: add `<image>` as one token if the tokenizer does not have it.

    Raises:
        MissingFileError: there is no such folder.
        UserError: it holds no tokenizer that can be read.
        MissingPackageError: it has a SentencePiece tokenizer alone, and that package is not installed.
    """
    folder = find_folder(source, "tokenizer", weights=False)
    sentencepiece_alone = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
    if sentencepiece_alone and importlib.util.find_spec("sentencepiece") is None:
        # transformers would ask for another package here, with which it still could not read the file.
        raise MissingPackageError(f"The tokenizer.model of {source} needs sentencepiece: pip install sentencepiece.")
    if not has_tokenizer(folder):
        raise UserError(f"{source} holds no tokenizer that can be read: it has none of {', '.join(_TOKENIZER_FILES)}.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **({} if text is None else {"config": text}))
    except (OSError, ValueError, KeyError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{source} holds no tokenizer that can be read ({reason}).") from error
    if add_image_token and tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer
