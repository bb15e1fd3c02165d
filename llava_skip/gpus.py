"""GPUs by name: the peak of their bfloat16 products and their memory, from NVIDIA's data sheets."""

from __future__ import annotations

from typing import NamedTuple

from llava_skip_base.errors import UserError


class Gpu(NamedTuple):
    """A GPU.

    Attributes:
        tflops: peak of dense bfloat16 products in TFLOPs a second, without sparsity.
        memory: GiB; the data sheet's GB are taken as GiB.
    """

    tflops: float
    memory: float


GPUS: dict[str, Gpu] = {
    "B200": Gpu(2250, 180),
    "GH200": Gpu(989, 96),
    "H200": Gpu(989, 141),
    "H100 PCIe": Gpu(756, 80),
    "H100 NVL": Gpu(835, 94),
    "H100": Gpu(989, 80),
    "A100 40GB": Gpu(312, 40),
    "A100": Gpu(312, 80),
    "A800": Gpu(312, 80),
    "H800": Gpu(989, 80),
    "L40S": Gpu(362, 48),
    "L40": Gpu(181, 48),
    "L4": Gpu(121, 24),
    "A40": Gpu(150, 48),
    "A30": Gpu(165, 24),
    "A10": Gpu(125, 24),
    "RTX 6000 Ada": Gpu(364, 48),
    "RTX A6000": Gpu(155, 48),
    "RTX 4090": Gpu(165, 24),
    "RTX 3090": Gpu(71, 24),
}
"""Part of a device's name -> the GPU; the first match counts. "A100" alone is that of 80 GB."""


def gpu_of_device(name: str) -> Gpu | None:
    """The GPU of a device's name, such as "NVIDIA H100 80GB HBM3"; None if it is unknown."""
    return next((gpu for words, gpu in GPUS.items() if words in name), None)


def get_gpu(name: str) -> Gpu:
    """The GPU of a name of the table, in any case, with `-` or `_` for spaces.

    Raises:
        UserError: it is not in the table.
    """
    plain = name.replace("-", " ").replace("_", " ").casefold()
    for known, gpu in GPUS.items():
        if known.casefold() == plain:
            return gpu
    raise UserError(
        f"Unknown GPU {name!r}; known: {', '.join(GPUS)}. Of another one give --gpu_tflops (peak of dense bfloat16 "
        "products) and --gpu_memory (GiB)."
    )
