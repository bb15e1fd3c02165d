"""What a piece of code reads from the device, where the host then waits until the device has done all before it."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from sys import _getframe

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
READING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.unique_dim, aten._unique2}
"""Operators whose result, or its size, goes to the host."""
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
"""These do with an index of booleans, which they count."""
METHODS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}
"""On a CPU these read without any operator."""
PACKAGES = ("llava_skip", "train", "eval", "transformers", "accelerate", "deepspeed", "tests")


class DeviceReads(Counter):
    """Number of reads by place: `package/module.py:function operator`."""

    def of(self, package: str) -> int:
        """Number of those in a package."""
        return sum(number for place, number in self.items() if place.startswith(f"{package}/"))


class _Operators(TorchDispatchMode):
    def __init__(self, reads: DeviceReads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        packet = operator.overloadpacket
        masks = packet in INDEXING and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        repeats = operator is aten.repeat_interleave.Tensor and (kwargs or {}).get("output_size") is None
        if packet in READING or masks or repeats:
            self._reads[f"{_place()} {packet.__name__}"] += 1
        return operator(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, reads: DeviceReads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in METHODS:
            self._reads[f"{_place()} {function.__name__}"] += 1
        return function(*args, **(kwargs or {}))


def _place() -> str:
    """The innermost function of one of `PACKAGES` that is being called."""
    frame, own = _getframe(1), __file__
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        package = next((name for name in PACKAGES if name in path.parts), None)
        if package is not None and str(path) != own:
            parts = path.parts[len(path.parts) - 1 - path.parts[::-1].index(package) :]
            return f"{'/'.join(parts)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


@contextmanager
def device_reads() -> Iterator[DeviceReads]:
    """Count what is read inside; on a CPU, where reading costs nothing, it is counted, too.

    The backward pass belongs to the function that calls `backward`.
    """
    reads = DeviceReads()
    with _Methods(reads), _Operators(reads):
        yield reads
