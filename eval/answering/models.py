"""Find and check a saved model before anything heavy is loaded."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from eval.reading.tables import sha256
from llava_skip_base import paths
from llava_skip_base.errors import UserError
from llava_skip_base.files import read_json, refuse_pointer

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_SEED = re.compile(r"seed-\d+")
"""Name of a seed's folder in that of `llava-skip train --seeds`."""
# Whatever changes an answer: configuration, tokenizer, processor and templates, but no training logs.
TEXTS = ("config.json", "generation_config.json", "*tokenizer*", "*processor_config.json", "*.jinja")


@dataclass
class SavedModel:
    """A model folder that has all its parts.

    Attributes:
        folder: the folder.
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
        """The folder's name, also when it was given as `.`; with that of its run, if it is one seed of several."""
        folder = self.folder.resolve()
        return f"{folder.parent.name}-{folder.name}" if _SEED.fullmatch(folder.name) else folder.name

    def describe(self) -> dict[str, Any]:
        """Which model it is, for the result file."""
        return {
            "name": self.name,
            "path": str(self.folder),
            "sha256": self.sha256,
            "model_type": self.config.get("model_type"),
            "preset": self.config.get("preset"),
            "skip": self.config.get("skip"),
        }


def newest_model() -> Path:
    """The model folder saved last among the project's checkpoints; those saved during training do not count.

    Raises:
        UserError: there is none.
    """
    checkpoints = paths.checkpoints()
    found = [
        path
        for path in checkpoints.glob("**/config.json")
        if not any(part.startswith("checkpoint-") for part in path.relative_to(checkpoints).parts)
    ]
    if not found:
        raise UserError(
            f"no model given, and {paths.shown(checkpoints)}/ holds none; train one with "
            "'bash scripts/finetune_skip.sh', or give a saved model with --model."
        )
    return Path(paths.shown(max(found, key=lambda path: path.stat().st_mtime).parent))


def with_seeds(folder: Path) -> list[Path]:
    """The model folders that a folder stands for: those of all seeds, or itself."""
    if (folder / "config.json").exists() or not folder.is_dir():
        return [folder]
    seeds = [path for path in folder.iterdir() if _SEED.fullmatch(path.name) and path.is_dir()]
    return sorted(seeds, key=lambda path: int(path.name.removeprefix("seed-"))) or [folder]


def check_model(folder: Path) -> SavedModel:
    """Check that a folder holds a whole saved model, as `save_pretrained` writes it.

    Raises:
        UserError: saying what it lacks.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder; give a folder that holds a saved model.")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: holds no config.json, so is no saved model; give the folder that training wrote.")
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder}: is a LoRA adapter; merge it: llava-skip merge-lora {folder} --output MERGED.")
    texts = sorted({path for pattern in TEXTS for path in folder.glob(pattern) if path.is_file()})
    weights = sorted({path for pattern in WEIGHTS for path in folder.glob(pattern)})
    for path in (*texts, *weights):
        refuse_pointer(path)
    parsed = {path.name: read_json(path) for path in texts if path.suffix == ".json"}
    if not weights:
        raise UserError(f"{folder}: holds no weights ({' or '.join(WEIGHTS)}); did the training finish?")
    if not any(path.name.startswith("tokenizer") for path in texts):
        raise UserError(f"{folder}: holds no tokenizer; save the processor in the same folder.")
    if not isinstance(parsed["config.json"], dict):
        raise UserError(f"{folder / 'config.json'}: expected a JSON object; save the model again.")
    return SavedModel(folder, parsed["config.json"], (*texts, *weights))
