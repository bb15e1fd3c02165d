"""Find and check a saved model before anything heavy is loaded."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from eval.errors import EvalError
from eval.reading.tables import sha256

CHECKPOINTS = Path("checkpoints")
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
# Whatever changes an answer: configuration, tokenizer, processor and templates, but no training logs.
TEXTS = ("config.json", "generation_config.json", "*tokenizer*", "*processor_config.json", "*.jinja")


@dataclass
class SavedModel:
    """A model folder that has all its parts.

    Attributes:
        folder: where it lies.
        config: its configuration as saved.
        files: everything that its answers depend on.
    """

    folder: Path
    config: dict[str, Any]
    files: tuple[Path, ...]

    @cached_property
    def sha256(self) -> str:
        """Hash of the files; reading the weights takes a while, once."""
        return sha256(self.files)

    @property
    def name(self) -> str:
        """The folder's name, also when it was given as ``.``."""
        return self.folder.resolve().name

    def describe(self) -> dict[str, Any]:
        """Say which model it is, for the result file."""
        return {
            "name": self.name,
            "path": str(self.folder),
            "sha256": self.sha256,
            "model_type": self.config.get("model_type"),
            "preset": self.config.get("preset"),
            "skip": self.config.get("skip"),
        }


def newest_model(checkpoints: Path = CHECKPOINTS) -> Path:
    """Find the model folder saved last; snapshots taken during training do not count.

    Args:
        checkpoints: where training saves models.

    Raises:
        EvalError: if there is none.
    """
    found = [
        path
        for path in checkpoints.glob("**/config.json")
        if not any(part.startswith("checkpoint-") for part in path.relative_to(checkpoints).parts)
    ]
    if not found:
        raise EvalError(
            f"no model given, and {checkpoints}/ holds none; train one with 'bash scripts/finetune_skip.sh', "
            "or give a saved model with --model."
        )
    return max(found, key=lambda path: path.stat().st_mtime).parent


def check_model(folder: Path) -> SavedModel:
    """Check that a folder holds a whole saved model.

    Args:
        folder: a folder written by ``save_pretrained``.

    Raises:
        EvalError: saying what it lacks.
    """
    if not folder.is_dir():
        raise EvalError(f"{folder}: no such model folder; give a folder that holds a saved model.")
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise EvalError(f"{folder}: holds no config.json, so is no saved model; give the folder that training wrote.")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise EvalError(f"{config_file}: not valid JSON ({error}); save the model again.") from error
    if (folder / "adapter_config.json").is_file():
        raise EvalError(f"{folder}: is a LoRA adapter; merge it: python -m train.merge_lora {folder} --output MERGED.")
    weights = sorted({path for pattern in WEIGHTS for path in folder.glob(pattern)})
    if not weights:
        raise EvalError(f"{folder}: holds no weights ({' or '.join(WEIGHTS)}); did the training finish?")
    texts = sorted({path for pattern in TEXTS for path in folder.glob(pattern) if path.is_file()})
    if not any(path.name.startswith("tokenizer") for path in texts):
        raise EvalError(f"{folder}: holds no tokenizer; save the processor beside the model.")
    return SavedModel(folder, config, (*texts, *weights))
