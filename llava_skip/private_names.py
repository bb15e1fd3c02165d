"""Every private name of a dependency that the project uses, and why no public one does the same.

`tests/test_private_names.py` checks that each still exists, with the parameters that are used. Add a line here before
you use another one.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PrivateName:
    """A private name of a dependency.

    Attributes:
        name: dotted, from the module on: `transformers.trainer.Trainer._get_num_items_in_batch`.
        used_in: the module of this project that uses or overrides it.
        reason: why no public name does.
        parameters: of those that a function has, the ones that are used by name or position.
    """

    name: str
    used_in: str
    reason: str
    parameters: tuple[str, ...] = ()


PRIVATE_NAMES: tuple[PrivateName, ...] = (
    PrivateName(
        "transformers.PreTrainedModel._init_weights",
        used_in="llava_skip.modeling",
        reason="draws the query and summary vectors that a checkpoint lacks; transformers' guide to new models has it, "
        "and there is no public hook",
        parameters=("module",),
    ),
    PrivateName(
        "transformers.PreTrainedConfig._attn_implementation",
        used_in="llava_skip.per_sample",
        reason="transformers' guide to attention functions reads the name of the chosen one from it, and there is no "
        "public reader",
    ),
    PrivateName(
        "transformers.PreTrainedModel._no_split_modules",
        used_in="llava_skip.modeling",
        reason="device_map reads which modules stay on one device from this class attribute alone",
    ),
    PrivateName(
        "transformers.PreTrainedModel._no_split_modules",
        used_in="llava_skip.decoder",
        reason="device_map reads the name of the skipping decoder layer from this attribute alone",
    ),
    PrivateName(
        "transformers.PreTrainedModel._tp_plan",
        used_in="llava_skip.modeling",
        reason="tensor parallelism reads how the head is cut from this class attribute alone",
    ),
    PrivateName(
        "transformers.PreTrainedModel._tied_weights_keys",
        used_in="llava_skip.modeling",
        reason="tie_weights and save_pretrained read which weight is the embedding from this class attribute alone",
    ),
    PrivateName(
        "torch._dynamo.mark_static_address",
        used_in="llava_skip.static_cache",
        reason="without it a CUDA graph is not made of a step that writes into the cache; transformers' static cache "
        "uses it, and torch.compiler has no name for it",
        parameters=("t",),
    ),
    *(
        PrivateName(
            f"transformers.cli.serving.chat_completion.ChatCompletionHandler.{name}",
            used_in="serve.transformers_app",
            reason="writes the response of `transformers serve`; the one public method also reads the request, loads a "
            "model and makes the prompt",
            parameters=("request_id", "model", "processor", "model_id", "inputs", "gen_config", "gen_manager"),
        )
        for name in ("_streaming", "_non_streaming")
    ),
    PrivateName(
        "transformers.cli.serving.utils._StreamError",
        used_in="serve.transformers_app",
        reason="what the stream of `transformers serve` takes for an answer that failed after it had begun",
        parameters=("msg",),
    ),
    *(
        PrivateName(f"vllm.{name}", used_in, "vLLM's guide to models from outside names it as part of the interface")
        for name, used_in in (
            ("model_executor.models.interfaces.SupportsMultiModal._mark_tower_model", "serve.vllm.model"),
            ("model_executor.models.interfaces.SupportsMultiModal._mark_language_model", "serve.vllm.model"),
            ("multimodal.processing.BaseMultiModalProcessor._get_hf_mm_text", "serve.vllm.processing"),
            ("multimodal.processing.BaseMultiModalProcessor._get_mm_fields_config", "serve.vllm.processing"),
            ("multimodal.processing.BaseMultiModalProcessor._get_prompt_updates", "serve.vllm.processing"),
        )
    ),
    PrivateName(
        "vllm.renderers.base.BaseRenderer._tokenize_prompt",
        used_in="serve.vllm.prompts",
        reason="the one place between a chat's text and its tokens; what is public has the text or the tokens alone",
        parameters=("prompt", "params"),
    ),
)
