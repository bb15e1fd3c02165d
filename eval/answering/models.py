"""Find and check a saved model before anything heavy is loaded."""

import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.reading.tables import sha256
from llava_skip_base.errors import UserError
from llava_skip_base.files import read_json, refuse_pointer

if TYPE_CHECKING:
    from llava_skip.configuration import LlavaSkipConfig
    from llava_skip.reduction import ReductionConfig

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_SEED = re.compile(r"seed-\d+")
"""Name of a seed's folder in that of `llava-skip train --seeds`."""
# Whatever changes an answer: configuration, tokenizer, processor and templates, but no training logs.
TEXTS = ("config.json", "generation_config.json", "*tokenizer*", "*processor_config.json", "*.jinja")
OWN_TYPE = "llava_skip"
"""The `model_type` of the library's models."""


@dataclass
class SavedModel:
    """A model folder that has all its parts.

    Attributes:
        folder: the folder.
        config: its configuration as saved.
        files: everything that its answers depend on.
        reduction: the rival method with which it answers, beside what the folder says.
    """

    folder: Path
    config: dict[str, Any]
    files: tuple[Path, ...]
    reduction: "ReductionConfig | None" = None

    @cached_property
    def sha256(self) -> str:
        """Hash of the files; reading the weights takes a while, once."""
        return sha256(self.files)

    @property
    def name(self) -> str:
        """The folder's name, also when it was given as `.`; with a reduction, `FOLDER@METHOD-TOKENS`.

        One seed of several has that of its run before it, `RUN-seed-N`.
        """
        folder = self.folder.resolve()
        name = f"{folder.parent.name}-{folder.name}" if _SEED.fullmatch(folder.name) else folder.name
        return name if self.reduction is None else f"{name}@{str(self.reduction).replace(':', '-').replace(',', '-')}"

    @cached_property
    def configuration(self) -> "LlavaSkipConfig | None":
        """How a model of the library answers; None for a model of another library.

        Raises:
            UserError: its configuration is broken, or the reduction does not fit it.
        """
        if self.config.get("model_type") != OWN_TYPE:
            return None
        from llava_skip.checkpoints.loading import read_native  # slow to import

        return read_native(self.folder, self.reduction)

    def describe(self) -> dict[str, Any]:
        """Which model it is, for the result file; a reduction may also be what its own folder says."""
        reduction = None if self.configuration is None else self.configuration.reduction_config
        given = {} if reduction is None else {"reduction": str(reduction)}
        return {
            "name": self.name,
            "path": str(self.folder),
            "sha256": self.sha256,
            "model_type": self.config.get("model_type"),
            "preset": self.config.get("preset"),
            "skip": self.config.get("skip"),
            **given,
        }

    def image_tokens(self) -> dict[str, float] | None:
        """What an image takes of the language model (with the most crops that it can have); None if it is unknown.

        Tokens that enter it, and the means over its layers of those that attend, take the FFN and stay in the cache.
        """
        if self.configuration is None:
            return None
        from llava_skip.flops import image_cost  # slow to import

        cost = image_cost(self.configuration)
        return {
            "entering": cost.tokens,
            "attention": cost.attention_tokens,
            "ffn": cost.ffn_tokens,
            "cache": cost.cache_tokens,
        }

    def reduced(self, reduction: "ReductionConfig") -> "SavedModel":
        """The same model, answering with a rival method.

        Raises:
            UserError: it has `skip` or a reduction already, is not the library's, or the method does not fit it.
        """
        has = next((name for name in ("skip", "reduction") if self.config.get(name) is not None), None)
        if has is not None:
            raise UserError(
                f"{self.folder}: --reduction {reduction} is for a dense model, and its config.json has {has}; give the "
                "dense model, or evaluate this one as it is."
            )
        if self.config.get("model_type") != OWN_TYPE:
            raise UserError(
                f"{self.folder}: --reduction {reduction} is for models of the library, and this one is a "
                f"{self.config.get('model_type')!r}; convert it: llava-skip convert {self.folder} OUTPUT."
            )
        from llava_skip.checkpoints.loading import check_fit  # slow to import

        changed = replace(self, reduction=reduction)
        try:
            assert changed.configuration is not None  # it is the library's
            check_fit(self.folder, changed.configuration)
        except UserError as error:
            raise UserError(f"{self.folder}: {error}") from error
        return changed


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
