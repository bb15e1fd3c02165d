"""What is trained on top of a model and saved separately: projector files and LoRA adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from llava_skip.checkpoints.files import ADAPTER_CONFIG, find_folder, is_adapter, read_tensors
from llava_skip.checkpoints.names import native_name
from llava_skip.checkpoints.report import LoadReport
from llava_skip.modeling import LlavaSkipForConditionalGeneration
from llava_skip_base.errors import MissingFileError, MissingPackageError, UserError
from llava_skip_base.files import local_path, read_json

_WRAPPER = "base_model.model."


def find_projector(source: str | Path) -> Path:
    """The file of a projector: itself, or the `mm_projector.bin` of a folder or hub name.

    Raises:
        MissingFileError: there is none.
    """
    if (path := local_path(source)) is None or not path.is_file():
        path = find_folder(source, "projector") / "mm_projector.bin"
    if not path.is_file():
        raise MissingFileError(f"{path.parent} has no {path.name}.")
    return path


def read_projector(path: Path, report: LoadReport) -> dict[str, Tensor]:
    """The projector of a `mm_projector.bin` under LLaVA's own names.

    A tower in the same file, as in those that were converted for the paper's own CLIP, is read too; anything else is
    listed.

    Raises:
        UserError: the file holds no projector.
    """
    weights: dict[str, Tensor] = {}
    for name, tensor in read_tensors(path).items():
        if "mm_projector." in name:
            weights[f"model.mm_projector.{name.split('mm_projector.')[1]}"] = tensor
        elif "vision_tower." in name:
            weights[f"model.vision_tower.{name.split('vision_tower.', 1)[1]}"] = tensor
        else:
            report.unused.append(f"{path.name}: {name}")
    if not any("mm_projector" in name for name in weights):
        raise UserError(f"{path} holds no weights of a projector (names with mm_projector).")
    return weights


def read_adapter(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Low-rank factors of a LoRA folder by native name, and the tensors that it saved whole by LLaVA's names.

    Whole tensors are those of `non_lora_trainables.bin` and the adapter's saved modules.

    Raises:
        MissingFileError: the folder holds no adapter.
    """
    files = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin")]
    adapter = next((path for path in files if path.is_file()), None)
    if adapter is None or not is_adapter(folder):
        raise MissingFileError(f"{folder} holds no LoRA adapter (adapter_config.json and adapter_model.safetensors).")
    factors: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}
    for name, tensor in read_tensors(adapter).items():
        if ".lora_" in name:
            factors[native_name(name.removeprefix(_WRAPPER))] = tensor
        else:
            whole[name.removeprefix(_WRAPPER)] = tensor
    if (path := folder / "non_lora_trainables.bin").is_file():
        whole |= {name.removeprefix(_WRAPPER): tensor for name, tensor in read_tensors(path).items()}
    return factors, whole


def merge_lora(model: LlavaSkipForConditionalGeneration, folder: Path, factors: dict[str, Tensor]) -> None:
    """Add the product of the low-rank factors to the model's weights.

    Raises:
        UserError: another kind of adapter, or factors that no module of the model has.
    """
    try:
        from peft import LoraConfig, PeftModel, set_peft_model_state_dict
    except ImportError as error:
        raise MissingPackageError("Merging a LoRA adapter needs peft: pip install '.[train]' in a checkout.") from error
    raw = read_json(folder / ADAPTER_CONFIG)
    if raw.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{folder} holds an adapter of type {raw['peft_type']}; only LORA is supported.")
    # Whole module names: q_proj alone would mean the vision tower's as well.
    targets = sorted({name.split(".lora_")[0] for name in factors})
    modules = dict(model.named_modules())
    if unknown := [name for name in targets if name not in modules]:
        raise UserError(f"The LoRA adapter {folder} changes modules that the model does not have: {unknown}.")
    kept = ("r", "lora_alpha", "use_rslora", "use_dora", "fan_in_fan_out")
    config = LoraConfig(
        **{key: raw[key] for key in kept if key in raw},
        target_modules=targets,
        rank_pattern=_native_patterns(raw.get("rank_pattern")),
        alpha_pattern=_native_patterns(raw.get("alpha_pattern")),
    )
    wrapped = PeftModel(model, config)
    result: Any = set_peft_model_state_dict(wrapped, {f"{_WRAPPER}{name}": tensor for name, tensor in factors.items()})
    absent = [name for name in result.missing_keys if ".lora_" in name]
    if result.unexpected_keys or absent:
        raise UserError(
            f"The LoRA adapter {folder} does not fit its adapter_config.json. Unknown: {result.unexpected_keys}. "
            f"Missing: {absent}."
        )
    wrapped.merge_and_unload()
    model.requires_grad_(True)  # peft froze it


def _native_patterns(patterns: dict | None) -> dict:
    return {native_name(f"{name}.").removesuffix("."): value for name, value in (patterns or {}).items()}
