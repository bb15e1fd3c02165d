"""Skip-Vision for LLaVA: most visual tokens attend, but skip the FFN of every decoder layer and leave the cache."""

import os
from importlib import import_module

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from llava_skip.cache import ForgettingCache
from llava_skip.configuration import LlavaSkipConfig, SkipConfig
from llava_skip.modeling import LlavaSkipForConditionalGeneration, LlavaSkipModel
from llava_skip.presets import preset_config
from llava_skip.processing import LlavaSkipProcessor
from llava_skip.vision.tiling import TilingImageProcessorPil

__version__ = "0.1.0"

AutoConfig.register("llava_skip", LlavaSkipConfig)
# Found by its name in a saved processor; LLaVA's own, for the other front ends, is one of transformers.
AutoImageProcessor.register(LlavaSkipConfig, image_processor_classes={"pil": TilingImageProcessorPil})
AutoModel.register(LlavaSkipConfig, LlavaSkipModel)
AutoModelForImageTextToText.register(LlavaSkipConfig, LlavaSkipForConditionalGeneration)
AutoModelForMultimodalLM.register(LlavaSkipConfig, LlavaSkipForConditionalGeneration)
AutoProcessor.register(LlavaSkipConfig, LlavaSkipProcessor)

for _plugin in filter(None, os.environ.get("LLAVA_SKIP_PLUGINS", "").split(",")):
    import_module(_plugin)  # registers front ends and presets from outside (docs/add-a-front-end.md)

__all__ = [
    "ForgettingCache",
    "LlavaSkipConfig",
    "LlavaSkipForConditionalGeneration",
    "LlavaSkipModel",
    "LlavaSkipProcessor",
    "SkipConfig",
    "preset_config",
]
