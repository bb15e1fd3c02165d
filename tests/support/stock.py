"""The same weights in transformers' own LLaVA."""

from transformers import LlavaConfig, LlavaForConditionalGeneration

from llava_skip import LlavaSkipForConditionalGeneration

OURS = ("skip", "model_type", "architectures", "front_end", "max_tiles", "pad_pictures", "resampler", "preset")


def stock_twin(model: LlavaSkipForConditionalGeneration) -> LlavaForConditionalGeneration:
    """transformers' LLaVA with the weights of a dense model."""
    entries = {name: value for name, value in model.config.to_dict().items() if name not in OURS}
    twin = LlavaForConditionalGeneration(LlavaConfig(**entries)).eval()
    twin.load_state_dict(model.state_dict())
    return twin
