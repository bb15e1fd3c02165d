"""Skip-Vision for LLaVA: most visual tokens attend, but skip the FFN of every decoder layer and leave the cache."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from llava_skip.cache import ForgettingCache
from llava_skip.configuration import LlavaSkipConfig, SkipConfig
from llava_skip.modeling import LlavaSkipForConditionalGeneration, LlavaSkipModel
from llava_skip.presets import preset_config
from llava_skip.processing import LlavaSkipProcessor

__version__ = "0.1.0"

AutoConfig.register("llava_skip", LlavaSkipConfig)
AutoModel.register(LlavaSkipConfig, LlavaSkipModel)
AutoModelForImageTextToText.register(LlavaSkipConfig, LlavaSkipForConditionalGeneration)
AutoProcessor.register(LlavaSkipConfig, LlavaSkipProcessor)

__all__ = [
    "ForgettingCache",
    "LlavaSkipConfig",
    "LlavaSkipForConditionalGeneration",
    "LlavaSkipModel",
    "LlavaSkipProcessor",
    "SkipConfig",
    "preset_config",
]
