"""Checkpoints that are whole or do not count.

A checkpoint counts once it has a manifest, which is written last, when every process has written its files. Until then
the file `.unfinished` in the run's folder has its name. The SHA-256 of each file in the manifest shows whether a
checkpoint is still what was written.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers.trainer_utils import sort_checkpoints

from llava_skip_base.errors import UserError
from llava_skip_base.files import hash_file, leaves_folder, read_json, read_text, write_json

MANIFEST = "checkpoint.json"
"""Lists the files of a whole checkpoint; written last."""
UNFINISHED = ".unfinished"
"""File in the run's folder with the name of the checkpoint that is being written."""
THREADS = 8
"""Files that a process reads at the same time; OpenSSL's SHA-256 does not hold Python's lock."""
_WRITER = re.compile(r"(?:zero_pp_rank|rng_state)_(\d+)")
"""The rank in the name of a file that a process writes for itself; all others are written by rank 0."""
_DIGEST = re.compile(r"[0-9a-f]{64}")
_STAGES = (None, 0, 1, 2, 3)


@dataclass
class Manifest:
    """What a checkpoint consists of.

    Attributes:
        step: optimizer steps done.
        world_size: processes that wrote it.
        zero_stage: DeepSpeed's ZeRO stage; None without DeepSpeed.
        progress: sums over the steps done that transformers does not save, see `ResumableTrainer.progress`.
        files: path in the checkpoint -> SHA-256; the manifests of earlier versions have the bytes instead.
    """

    step: int
    world_size: int
    zero_stage: int | None
    progress: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str | int] = field(default_factory=dict)

    @classmethod
    def read(cls, checkpoint: Path) -> Manifest:
        """The manifest of a checkpoint.

        Raises:
            MissingFileError: the checkpoint has none.
            UserError: it is not JSON, or no manifest.
        """
        content, names = read_json(checkpoint / MANIFEST), {entry.name for entry in fields(cls)}
        if not isinstance(content, dict) or content.keys() != names:
            raise UserError(f"it must have the fields {', '.join(sorted(names))}")
        manifest = cls(**content)
        checks = {
            "step": _is_count(manifest.step, 0),
            "world_size": _is_count(manifest.world_size, 1),
            "zero_stage": not isinstance(manifest.zero_stage, (bool, float)) and manifest.zero_stage in _STAGES,
            "progress": isinstance(manifest.progress, dict),
            "files": isinstance(manifest.files, dict)
            and all(_is_inside(name) and _is_sum(value) for name, value in manifest.files.items()),
        }
        if wrong := [name for name, right in checks.items() if not right]:
            raise UserError(f"{wrong[0]} is not what a run writes there")
        return manifest


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_inside(name: str) -> bool:
    return "\0" not in name and not leaves_folder(name)


def _is_sum(value: Any) -> bool:
    return _is_count(value, 0) or (isinstance(value, str) and _DIGEST.fullmatch(value) is not None)


def digest(file: Path) -> str:
    """The SHA-256 of a file."""
    found = hashlib.sha256()
    hash_file(file, found)
    return found.hexdigest()


def flush(checkpoint: Path, rank: int = 0, world_size: int = 1) -> dict[str, str | int]:
    """Flush to the disk what a process wrote of a checkpoint, and give the SHA-256 of each such file by its path.

    Each process reads its own files, which its machine still has in memory: none is read from a disk again.
    """

    def one(file: Path) -> tuple[str, str | int]:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        return str(file.relative_to(checkpoint)), digest(file)

    return dict(_parallel(one, [file for file in _files(checkpoint) if _writer(file) % world_size == rank]))


def seal(checkpoint: Path, manifest: Manifest) -> None:
    """Write the manifest of a checkpoint whose files are on the disk."""
    write_json(checkpoint / MANIFEST, asdict(manifest), sort_keys=True)


def _files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path != checkpoint / MANIFEST)


def _writer(file: Path) -> int:
    found = _WRITER.search(file.name)
    return int(found.group(1)) if found else 0


def _parallel(function: Callable[[Any], Any], items: list[Any]) -> list[Any]:
    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(function, items))


def find_fault(checkpoint: Path) -> str | None:
    """Why a checkpoint is not whole, in words; None if it is."""
    if not (checkpoint / MANIFEST).is_file():
        return f"it has no {MANIFEST}"
    try:
        manifest = Manifest.read(checkpoint)
    except UserError as error:
        return f"its {MANIFEST} cannot be read: {error}"

    def fault(entry: tuple[str, str | int]) -> str | None:
        name, written = entry
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        size = file.stat().st_size
        if isinstance(written, int):
            return f"{name} has {size} bytes, not {written}" if size != written else None
        return f"{name} with its {size} bytes is not what was written (SHA-256)" if digest(file) != written else None

    return next(filter(None, _parallel(fault, list(manifest.files.items()))), None)


def find_checkpoint(output: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run, and a message about each newer one that was passed over.

    A checkpoint that was being written is deleted, and a damaged one is renamed to `damaged-checkpoint-N`, so that
    neither counts any more. Only one process calls this.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    messages = _delete_unfinished(output)
    checkpoints = [Path(path) for path in reversed(sort_checkpoints(str(output)))]
    faults: dict[Path, str] = {}
    for checkpoint in checkpoints:
        fault = find_fault(checkpoint)
        if fault is None:
            for damaged, why in faults.items():
                messages.append(f"{damaged.name} is damaged ({why}): passed over, renamed to damaged-{damaged.name}.")
                damaged.rename(damaged.with_name(f"damaged-{damaged.name}"))
            return checkpoint, messages
        faults[checkpoint] = fault
    if faults:
        text = "; ".join(f"{path.name}: {fault}" for path, fault in faults.items())
        raise UserError(
            f"No checkpoint of OUTPUT {output} is whole ({text}): restore one, or delete them to start from step 0."
        )
    return None, messages


def _delete_unfinished(output: Path) -> list[str]:
    """Delete the checkpoint that was being written when the run ended; a message if there is one."""
    marker = output / UNFINISHED
    if not marker.is_file():
        return []
    checkpoint, messages = output / Path(read_text(marker)).name, []
    if checkpoint.is_dir() and not (checkpoint / MANIFEST).is_file():
        shutil.rmtree(checkpoint)
        messages = [f"{checkpoint.name} was being written when the run ended: passed over and deleted."]
    marker.unlink()
    return messages
