"""What the plug-in sets of vLLM's settings, and what it refuses, by name and with the cure, before a model loads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from llava_skip.configuration import LlavaSkipConfig
from llava_skip.masking import attends_in_window
from llava_skip.reduction.method import Selection
from llava_skip_base.errors import UserError
from serve.vllm import MODE
from serve.vllm.rows import Block

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

LANGUAGE_MODELS = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""`model_type` of a language model -> vLLM's name for it; all have LLaMA's layers."""
DRAFTERS = ("ngram", "suffix")
"""Ways to guess tokens that do not run the model's embedding for themselves."""
EXACT_TABLES = ("default", "linear", "llama3")
"""Kinds of rotary embedding whose values do not depend on how long vLLM's table of them is."""

logger = init_logger(f"vllm.{__name__}")


class SkipSettings(VerifyAndUpdateConfig):
    """vLLM calls these two while it builds its configuration."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Choose how prompts are tokenised, and count positions apart from rows in a model that forgets.

        Raises:
            UserError: the plug-in does not serve such a model.
        """
        config = model_config.hf_config
        config.check()  # also what hf_overrides made of it
        check_model(config)
        if model_config.skip_tokenizer_init:
            raise UserError("skip_tokenizer_init must be false: prompts are tokenised as the model's processor does.")
        if model_config.tokenizer_mode not in ("auto", "hf", MODE):
            raise UserError(
                f"tokenizer_mode is {model_config.tokenizer_mode!r}; leave it out: prompts are tokenised as the "
                "model's processor does."
            )
        model_config.tokenizer_mode = MODE
        if config.forgets:
            # This entry alone makes vLLM ask the model for positions; the language model's own are as they are.
            config.mrope_section = [1, 1, 1]

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse what does not work, and set what must be.

        Raises:
            UserError: a setting that does not work.
        """
        config: LlavaSkipConfig = vllm_config.model_config.hf_config
        for message in refusals(vllm_config, config):
            raise UserError(message)
        if config.skip is not None:
            _choose_graphs(vllm_config)
        if config.forgets:
            _set_for_forgetting(vllm_config, config)


def check_model(config: LlavaSkipConfig) -> None:
    """Raise UserError for a model that the plug-in does not serve."""
    if (kind := config.text_config.model_type) not in LANGUAGE_MODELS:
        raise UserError(
            f"text_config.model_type is {kind!r}; in vLLM the language model is one of {', '.join(LANGUAGE_MODELS)}."
        )
    if config.forgets and attends_in_window(config.text_config):
        raise UserError(
            "the language model attends in a sliding window, which would count kept tokens alone: set sliding_window "
            "to null in text_config, which changes nothing for sequences that fit it, or skip.forget_cache to false."
        )
    reduction = config.reduction_config
    if reduction is not None and not isinstance(reduction.rule, Selection):
        raise UserError(
            f"reduction {reduction} drops tokens inside the decoder, which vLLM's layers do not do. Served are methods "
            "that select before the language model, models with skip, and dense ones: set reduction to null, or serve "
            "it with llava-skip serve."
        )


def refusals(vllm_config: VllmConfig, config: LlavaSkipConfig) -> Iterator[str]:
    """What is wrong with the settings."""
    if vllm_config.lora_config is not None:
        yield "enable_lora: adapters are not applied at run time; merge them (llava-skip merge-lora), and leave it out."
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        yield "pipeline_parallel_size must be 1: a stage hands on no skipped rows; use tensor_parallel_size."
    if config.skip is None:
        return
    multimodal = vllm_config.model_config.multimodal_config
    if multimodal is not None and multimodal.enable_mm_embeds:
        yield "enable_mm_embeds must be false: an image is more than its embeddings in a model that skips; send images."
    speculative = vllm_config.speculative_config
    if speculative is not None and not str(speculative.method).startswith(DRAFTERS):
        yield f"speculative_config: the method {speculative.method!r} was not tried; use ngram."
    mode = vllm_config.compilation_config.cudagraph_mode
    if mode is not None and mode.mixed_mode() == CUDAGraphMode.FULL:
        yield "cudagraph_mode FULL would replay forwards with images without skipping: use PIECEWISE."
    if config.forgets:
        yield from _refusals_of_forgetting(vllm_config, config)


def _refusals_of_forgetting(vllm_config: VllmConfig, config: LlavaSkipConfig) -> Iterator[str]:
    parallel, why = vllm_config.parallel_config, "a model that forgets (skip.forget_cache) needs whole prompts"
    elsewhere = {"kv_transfer_config": vllm_config.kv_transfer_config}
    elsewhere["kv_offloading_size"] = vllm_config.cache_config.kv_offloading_size  # vLLM makes the other one of it
    for name, value in elsewhere.items():
        if value is not None:
            yield f"{name}: {why}, and keys that come from elsewhere lack the skipped rows; leave it out."
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            yield f"{name} must be 1: {why} on each device; use tensor_parallel_size."
    if parallel.enable_dbo:
        yield f"enable_dbo must be false: {why}, not halves of a batch."
    backend = vllm_config.attention_config.backend
    if backend is not None and backend.name.startswith("FLASHINFER"):
        yield f"attention backend {backend.name} does not say where sequences begin: use FLASH_ATTN or TRITON_ATTN."
    rope, table = _rope_type(config), config.text_config.max_position_embeddings
    most = table // _block(config).growth
    if rope not in EXACT_TABLES and vllm_config.model_config.max_model_len > most:
        yield (
            f"text_config has rotary embeddings of the type {rope!r} for {table} positions, and the positions of "
            f"{vllm_config.model_config.max_model_len} kept rows can be beyond them: set max_model_len to {most}."
        )


def _block(config: LlavaSkipConfig) -> Block:
    assert (skip := config.skip_config) is not None  # only of a skipping model
    return Block.of(skip)


def _rope_type(config: LlavaSkipConfig) -> str:
    parameters = getattr(config.text_config, "rope_parameters", None) or {}
    return parameters.get("rope_type") or "default"


def _choose_graphs(vllm_config: VllmConfig) -> None:
    """Leave out graphs of whole steps: what a step has of an image is read from it, which no graph can do.

    A chunk of a prompt can also have as few rows as a decode step, for which a graph of one would be taken.
    """
    compilation = vllm_config.compilation_config
    if compilation.cudagraph_mode is None or compilation.cudagraph_mode.has_full_cudagraphs():
        _set(compilation, "cudagraph_mode", CUDAGraphMode.PIECEWISE)


def _set_for_forgetting(vllm_config: VllmConfig, config: LlavaSkipConfig) -> None:
    scheduler, length = vllm_config.scheduler_config, vllm_config.model_config.max_model_len
    # A cached prefix has no skipped rows, which the question behind it must see; nor has the first part of a prompt.
    _set(vllm_config.cache_config, "enable_prefix_caching", False)
    _set(scheduler, "enable_chunked_prefill", False)
    _set(scheduler, "long_prefill_token_threshold", 0)
    if scheduler.max_num_batched_tokens < length:
        _set(scheduler, "max_num_batched_tokens", length)
    if scheduler.max_num_scheduled_tokens is not None and scheduler.max_num_scheduled_tokens < length:
        _set(scheduler, "max_num_scheduled_tokens", length)
    # With less, a prompt is cut in front of an image that finds no room. Images of up to three steps are there at once.
    _set(scheduler, "max_num_encoder_input_tokens", scheduler.max_num_batched_tokens)
    _set(scheduler, "encoder_cache_size", 3 * scheduler.max_num_batched_tokens)
    scheduler.verify_max_model_len(length)
    if _rope_type(config) in EXACT_TABLES:  # vLLM reads beyond the table of a shorter one without an error
        table = length * _block(config).growth
        if config.text_config.max_position_embeddings < table:
            _set(config.text_config, "max_position_embeddings", table)


def _set(owner: Any, name: str, value: Any) -> None:
    if (before := getattr(owner, name)) != value:
        logger.info("llava_skip sets %s to %s (it was %s).", name, value, before)
        setattr(owner, name, value)
