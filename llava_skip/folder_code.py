"""What lets a saved folder work by itself: a module beside the configurations, and `auto_map`, which names its classes.

transformers imports that module where `trust_remote_code=True` is given and nobody has imported `llava_skip`. It holds
no code of the model: it hands out the classes of the installed package, so there is never a second copy of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from llava_skip_base.files import write_text

_MODULE = "llava_skip_classes"
FILE = f"{_MODULE}.py"
"""The module in a saved folder."""
INSTALL = "install the project: pip install . in a checkout of it"
"""What a process without the package is told to do."""

_SOURCE = f'''\
"""The classes of this folder's model, for transformers with `trust_remote_code=True`.

They are those of the installed package llava_skip; no other code is in this folder.
"""

try:
    import llava_skip
except ModuleNotFoundError as error:
    if error.name != "llava_skip":
        raise  # the package is there, and something that it needs is not
    raise ImportError(
        "This folder holds a llava-skip model, and the package llava_skip is not installed in this environment: "
        "{INSTALL}."
    ) from error

LlavaSkipConfig = llava_skip.LlavaSkipConfig
LlavaSkipForConditionalGeneration = llava_skip.LlavaSkipForConditionalGeneration
LlavaSkipModel = llava_skip.LlavaSkipModel
LlavaSkipProcessor = llava_skip.LlavaSkipProcessor
'''

_CONFIG = {
    "AutoConfig": "LlavaSkipConfig",
    "AutoModel": "LlavaSkipModel",
    "AutoModelForImageTextToText": "LlavaSkipForConditionalGeneration",
    "AutoModelForMultimodalLM": "LlavaSkipForConditionalGeneration",
}
_PROCESSOR = {"AutoProcessor": "LlavaSkipProcessor"}


def config_map() -> dict[str, str]:
    """`auto_map` of config.json: Auto class -> class of the module."""
    return _named(_CONFIG)


def processor_map() -> dict[str, str]:
    """`auto_map` of processor_config.json: Auto class -> class of the module."""
    return _named(_PROCESSOR)


def write_module(json_file: str | os.PathLike[str]) -> None:
    """Write the module into the folder of a configuration that names it."""
    write_text(Path(json_file).parent / FILE, _SOURCE)


def _named(classes: Mapping[str, str]) -> dict[str, str]:
    return {auto: f"{_MODULE}.{name}" for auto, name in classes.items()}
