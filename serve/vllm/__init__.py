"""vLLM's plug-in: models of the library in vLLM's engine, skipping and forgetting as in their own `generate`.

vLLM finds `register` by the entry point group `vllm.general_plugins`, and calls it in each of its processes. Nothing
here imports vLLM before it is called.
"""

ARCHITECTURE = "LlavaSkipForConditionalGeneration"
"""What `architectures` of a saved folder names."""
MODE = "llava_skip"
"""vLLM's name for how the library's models have their prompts tokenised."""


def register() -> None:
    """Tell vLLM of the model, its settings and its prompts; may be called again."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    import llava_skip  # noqa: F401  registers the configuration with AutoConfig
    from serve.vllm.config import SkipSettings

    ModelRegistry.register_model(ARCHITECTURE, "serve.vllm.model:SkippingModelForVllm")
    MODELS_CONFIG_MAP[ARCHITECTURE] = SkipSettings
    if MODE not in RENDERER_REGISTRY.renderers:
        RENDERER_REGISTRY.register(MODE, "serve.vllm.prompts", "SkipRenderer")
        TokenizerRegistry.register(MODE, "vllm.tokenizers.hf", "CachedHfTokenizer")
