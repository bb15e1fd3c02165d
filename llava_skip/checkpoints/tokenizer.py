"""The one loader of tokenizers."""

from __future__ import annotations

import base64
import binascii
import importlib.util
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from llava_skip.checkpoints.files import find_folder, refuse_pointers
from llava_skip.processing import IMAGE_TOKEN
from llava_skip_base.errors import MissingPackageError, UserError
from llava_skip_base.files import read_json
from llava_skip_base.texts import one_line, shortened

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
_SWITCHES = {"add_bos_token", "add_eos_token", "add_prefix_space", "legacy", "clean_up_tokenization_spaces"}
_SWITCHES |= {"use_default_system_prompt", "spaces_between_special_tokens", "do_lower_case", "split_special_tokens"}
_TEXTS = ("tokenizer_class", "processor_class", "name_or_path", "backend", "image_token")


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
    if not has_tokenizer(folder):
        raise UserError(f"{source} holds no tokenizer that can be read: it has none of {', '.join(_TOKENIZER_FILES)}.")
    check_tokenizer_files(folder, source)
    options: dict[str, Any] = {} if text is None else {"config": text}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        _refuse(source, error)
    if add_image_token and tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def check_tokenizer_files(folder: Path, source: str | Path) -> None:
    """Check the files of a tokenizer before transformers reads them.

    Args:
        folder: holds them.
        source: its name for messages.

    Raises:
        UserError: a file is a git-lfs pointer, or broken.
        MissingPackageError: it has a SentencePiece tokenizer alone, and that package is not installed.
    """
    refuse_pointers(folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (path := folder / name).is_file():
            _check_settings(path)
    if (path := folder / "tokenizer.json").is_file():
        read_json(path)
        try:
            Tokenizer.from_file(str(path))
        except Exception as error:
            if type(error) is not Exception:  # the library raises no class of its own
                raise
            _refuse(source, error)
    elif (path := folder / "tokenizer.model").is_file():
        _check_sentencepiece(path, source)


def _check_sentencepiece(path: Path, source: str | Path) -> None:
    if importlib.util.find_spec("sentencepiece") is None:
        # transformers would ask for another package here, with which it still could not read the file.
        raise MissingPackageError(f"The tokenizer.model of {source} needs sentencepiece: pip install sentencepiece.")
    from sentencepiece import SentencePieceProcessor  # an extra: most tokenizers have a tokenizer.json

    if _is_tiktoken(path):
        return
    try:
        SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError, TypeError) as error:
        _refuse(source, error)


def _is_tiktoken(path: Path) -> bool:
    """Whether each line is a token in base64 and its rank, as LLaMA-3 was first released."""
    with path.open("rb") as file:
        first = file.readline(1000).split()
    try:
        return len(first) == 2 and first[1].isdigit() and bool(base64.b64decode(first[0], validate=True))
    except binascii.Error:
        return False


def _check_settings(path: Path) -> None:
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path} is {shortened(repr(raw))}; it must be an object with the tokenizer's settings.")
    for name, value in raw.items():
        if value is not None and (expected := _fault(name, value, path.name)):
            raise UserError(f"{path} has {name} {shortened(repr(value))}; it must be {expected}.")


def _fault(name: str, value: Any, file: str) -> str | None:
    """What a setting should be; None if it can be meant, or is of no interest."""
    if file == "added_tokens.json":
        return None if _is_id(value) else "the id of a token"
    if name == "added_tokens_decoder":
        fits = isinstance(value, dict) and all(key.isdigit() and _is_token(token) for key, token in value.items())
        return None if fits else "an object of ids and tokens"
    if name in ("extra_special_tokens", "additional_special_tokens"):
        tokens = list(value.values()) if isinstance(value, dict) else value
        fits = isinstance(tokens, list) and all(map(_is_token, tokens))
        return None if fits else "a list of tokens, or an object of names and tokens"
    if name.endswith("_token") and name not in _SWITCHES:
        return None if _is_token(value) else "a token: a text, or an object with its content"
    if name in _SWITCHES:
        return None if isinstance(value, bool) else "true or false"
    if name in _TEXTS:
        return None if isinstance(value, str) else "a text"
    if name in ("padding_side", "truncation_side"):
        return None if value in ("left", "right") else "left or right"
    if name == "model_max_length":
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return None if is_number and value > 0 else "a positive number"
    if name == "chat_template":
        templates = value if isinstance(value, list) else [{"name": "", "template": value}]
        fits = all(isinstance(entry, dict) and _are_texts(entry, "name", "template") for entry in templates)
        return None if fits else "a text, or a list of objects with name and template"
    return None


def _are_texts(entry: dict[str, Any], *names: str) -> bool:
    return all(isinstance(entry.get(name), str) for name in names)


def _is_token(value: Any) -> bool:
    if isinstance(value, dict):
        flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
        return _are_texts(value, "content") and all(isinstance(value.get(flag, True), bool) for flag in flags)
    return isinstance(value, str)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _refuse(source: str | Path, error: Exception) -> NoReturn:
    reason = f"{type(error).__name__}: {one_line(error)}"
    raise UserError(f"{source} holds no tokenizer that can be read ({reason}).") from error
