"""Features of a frozen tower on disk: safetensors shards, each crop under a name made of its pixels.

The name is a hash of what the image processor made of an image: another image, or another processor, has another one.
Shards of other towers are in other folders, see `train.recipe.features`. Any number of processes may write and read
one folder: each writes shards of its own, whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import uuid
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm
from transformers import TrainerCallback

from llava_skip.vision.stored import TowerFeatures
from llava_skip_base.files import write_bytes

SHARD_BYTES = 128 * 2**20
"""Bytes of features after which a process writes a shard."""
MOST_OPEN = 64
"""Shards that a process keeps open."""
FEATURES = "vision_features"
"""Their name in a batch."""
_SUMS, _STATES = "crc32", "states"


def crop_key(crop: Tensor) -> str:
    """The name of a crop's pixels."""
    content = crop.contiguous()
    digest = hashlib.blake2b(f"{content.dtype} {tuple(content.shape)}".encode(), digest_size=16)
    digest.update(content.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _checksum(states: dict[str, Tensor]) -> int:
    total = 0
    for name in sorted(states):
        total = zlib.crc32(states[name].contiguous().reshape(-1).view(torch.uint8).numpy().data, total)
    return total


class FeatureShards:
    """The features in a folder; a process that is forked or a loader's worker may use a copy.

    Attributes:
        damaged: names of the shards that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.damaged = folder, set[str]()
        self._crops: dict[str, tuple[str, int]] = {}
        """Key -> name of its shard, and the sum of its bytes."""
        self._states: dict[str, list[str]] = {}
        """Shard -> names of the states of each of its crops."""
        self._scanned = 0
        self._open: dict[str, Any] = {}
        self._process = os.getpid()
        self.scan()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def __contains__(self, key: str) -> bool:
        return key in self._crops

    def __len__(self) -> int:
        return len(self._crops)

    def scan(self) -> None:
        """Look for shards that came since the last time; of a crop that several have, the last one counts."""
        if not self.folder.is_dir() or (changed := self.folder.stat().st_mtime_ns) < self._scanned:
            return
        self._scanned = max(changed, time.time_ns() - 10**9)  # a folder's time is not exact
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name not in self._states and path.name not in self.damaged:
                self._read_header(path)

    def _read_header(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as shard:
                about = shard.metadata() or {}
                sums, states = json.loads(about[_SUMS]), json.loads(about[_STATES])
                whole = {f"{key}/{name}" for key in sums for name in states} == set(shard.keys())
        except (SafetensorError, OSError, KeyError, ValueError):
            whole = False
        if not whole:
            self.damaged.add(path.name)
            return
        self._states[path.name] = states
        self._crops |= {key: (path.name, total) for key, total in sums.items()}

    def _shard(self, name: str) -> Any:
        if self._process != os.getpid() or len(self._open) >= MOST_OPEN:  # a fork must open its own
            self._open, self._process = {}, os.getpid()
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, framework="pt").__enter__()
        return self._open[name]

    def read(self, key: str) -> dict[str, Tensor] | None:
        """The states of a crop by name; None if they are not there, or damaged: then they are forgotten."""
        if key not in self._crops:
            return None
        name, total = self._crops[key]
        try:
            states = {state: self._shard(name).get_tensor(f"{key}/{state}") for state in self._states[name]}
            if _checksum(states) == total:
                return states
        except (SafetensorError, OSError):
            pass
        del self._crops[key]
        return None

    def find(self, keys: Sequence[str]) -> TowerFeatures:
        """The features of a batch's crops; without states if those of one crop are not there."""
        if not all(key in self for key in keys):
            self.scan()
        if not all(key in self for key in keys):
            return TowerFeatures(list(keys))
        found = [self.read(key) for key in keys]
        whole = [states for states in found if states is not None]
        if len(whole) < len(found):
            return TowerFeatures(list(keys), damaged=len(found) - len(whole))
        return TowerFeatures(list(keys), {name: torch.stack([one[name] for one in whole]) for name in whole[0]})

    def write(self, crops: dict[str, dict[str, Tensor]], writer: str) -> None:
        """Write a shard of crops, key -> states by name; `writer` is a part of its name."""
        tensors = {f"{key}/{name}": state for key, states in crops.items() for name, state in states.items()}
        sums = {key: _checksum(states) for key, states in crops.items()}
        about = {_SUMS: json.dumps(sums), _STATES: json.dumps(sorted(next(iter(crops.values()))))}
        name = f"{time.time_ns():020d}-{writer}-{uuid.uuid4().hex[:8]}.safetensors"
        write_bytes(self.folder / name, save(tensors, about))
        self.scan()


@dataclass
class FeatureCollator:
    """Samples -> batch, with the features of its crops in place of their pixels, if those of all are there."""

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    shards: FeatureShards

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """What `collate` gives; with images also `vision_features`, which name the crops."""
        batch = self.collate(samples)
        if "pixel_values" in batch:
            batch[FEATURES] = self.shards.find([crop_key(crop) for crop in batch["pixel_values"]])
            if batch[FEATURES].states:
                del batch["pixel_values"]
        return batch


class FeatureWriter(TrainerCallback):
    """Writes what the tower gives in training: a shard at a time, and what is left when the run saves or ends.

    A disk that takes no more ends the storing, and not the run.

    Attributes:
        counts: crops that were read, computed and damaged, in this process.
    """

    def __init__(self, shards: FeatureShards, rank: int) -> None:
        self.shards, self._rank, self._stores = shards, rank, True
        self.counts = {"read": 0, "computed": 0, "damaged": 0}
        self._waiting: dict[str, dict[str, Tensor]] = {}
        self._bytes = 0

    def keep(self, features: TowerFeatures) -> None:
        """Take the features of a batch after its forward."""
        self.counts["read" if features.were_stored else "computed"] += len(features)
        self.counts["damaged"] += features.damaged
        if features.were_stored or not self._stores:
            return
        if features.damaged:  # another process may have found it: forget them here, too
            for key in features.keys:
                self.shards.read(key)
        states = {name: state.detach().cpu() for name, state in features.states.items()}
        for place, key in enumerate(features.keys):
            if key not in self.shards and key not in self._waiting:
                self._waiting[key] = {name: state[place].clone() for name, state in states.items()}
                self._bytes += sum(state.nbytes for state in self._waiting[key].values())
        if self._bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if self._waiting:
            try:
                self.shards.write(self._waiting, f"rank{self._rank}")
            except OSError as error:
                self._stores = False
                said = f"warning: {self.shards.folder} takes no more features, so the tower runs where they are missing"
                tqdm.write(f"{said}: {error}", file=sys.stderr)
        self._waiting, self._bytes = {}, 0

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """Write what waits."""
        self.flush()

    on_save = on_train_end = on_epoch_end
