"""From arguments to processor and model: what is loaded, what is new, what is trainable."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from llava_skip.checkpoints import load_checkpoint, load_config, load_tokenizer, padded_vocabulary
from llava_skip.checkpoints.adapters import find_projector
from llava_skip.checkpoints.files import check_model_weights
from llava_skip.checkpoints.loading import check_fit
from llava_skip.configuration import LlavaSkipConfig
from llava_skip.ends import ends_of
from llava_skip.modeling import LlavaSkipForConditionalGeneration
from llava_skip.presets import preset_config
from llava_skip.processing import LlavaSkipProcessor, find_image_token
from llava_skip.vision import get_front_end
from llava_skip_base.errors import MissingFileError, UserError
from llava_skip_base.files import local_path
from llava_skip_base.paths import embedded_tokenizer, shown
from train.recipe.lora import add_lora, quantization_config
from train.recipe.parts import choose_trained, freeze_unused

if TYPE_CHECKING:
    from train.arguments import ModelArguments, RunArguments


def prepare(arguments: ModelArguments) -> tuple[LlavaSkipConfig, LlavaSkipProcessor]:
    """Configuration and processor of the run, without any weights: mistakes show before a model loads.

    Raises:
        UserError: an unknown preset, size or template, a template that does not end, or a tokenizer that does not fit.
        MissingFileError: a model or tokenizer folder that does not exist.
    """
    if arguments.model is None:
        config, tokenizer = _new_config(arguments)
    else:
        preset = arguments.new_preset if arguments.vision_tower else arguments.preset
        others = {name: getattr(arguments, name) for name in ("vision_tower", "projector", "tokenizer")}
        config, tokenizer = load_config(arguments.model, preset, reduction=arguments.rival, **others)
    if not (arguments.template or tokenizer.chat_template):
        source = arguments.tokenizer or arguments.model or tokenizer.name_or_path
        raise UserError(f"The tokenizer of {source} has no chat template: name one with --template.")
    if config.text_config.vocab_size < len(tokenizer):
        raise UserError(
            f"The tokenizer has {len(tokenizer)} tokens, the model's vocabulary {config.text_config.vocab_size}: "
            "give the tokenizer that belongs to the model."
        )
    processor = LlavaSkipProcessor.for_config(config, tokenizer, arguments.template)
    ends_of(processor)  # the run saves them; a template that never ends shows now
    if arguments.image_aspect_ratio == "square":
        if get_front_end(config.front_end).cuts_tiles:
            raise UserError(
                f"--image_aspect_ratio square does not go with the front end {config.front_end!r}, which cuts tiles: "
                "use pad."
            )
        processor.image_processor.do_pad = False
    _check_attention(arguments.attn_implementation, config)
    return config, processor


def check_weights(arguments: ModelArguments, config: LlavaSkipConfig | None = None) -> None:
    """What a local --model and --projector are loaded from must be there, its files whole and of the model's shapes.

    Raises:
        MissingFileError: no weights, an adapter alone, or a shard that is missing.
        UserError: a broken file, or weights that do not fit the configuration.
    """
    if arguments.model and (folder := local_path(arguments.model)):
        check_model_weights(folder)
        if config is not None and not (arguments.vision_tower or arguments.projector):
            check_fit(folder, config)  # what is joined is compared when it is loaded
    if arguments.projector:
        find_projector(arguments.projector)


def _new_config(arguments: ModelArguments) -> tuple[LlavaSkipConfig, PreTrainedTokenizerBase]:
    source = arguments.tokenizer or embedded_tokenizer()
    if not arguments.tokenizer and not embedded_tokenizer().exists():
        raise MissingFileError(
            f"There is neither --model nor --tokenizer, and {shown(embedded_tokenizer())} of the embedded data is not "
            "made yet: name the model, or run llava-skip data."
        )
    tokenizer = load_tokenizer(source)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    vocabulary = padded_vocabulary(len(tokenizer))
    config = preset_config(arguments.new_preset, arguments.size, vocab_size=vocabulary, **ids)
    config.image_token_index = find_image_token(tokenizer)
    return config if arguments.rival is None else config.with_reduction(arguments.rival), tokenizer


def _check_attention(implementation: str | None, config: LlavaSkipConfig) -> None:
    if implementation is None:
        return
    with torch.device("meta"):
        model = LlavaSkipForConditionalGeneration(config)
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            try:  # this call alone says what a part cannot do, or which package it needs
                part.get_correct_attn_implementation(implementation)
            except (ValueError, ImportError) as error:
                raise UserError(f"--attn_implementation {implementation} cannot be used: {error}") from error


def build_model(
    arguments: ModelArguments,
    config: LlavaSkipConfig,
    dtype: torch.dtype,
    quantization: BitsAndBytesConfig | None = None,
) -> LlavaSkipForConditionalGeneration:
    """The model of the run: new, loaded, or joined from a language model, a vision tower and a projector.

    Raises:
        UserError: weights that cannot be read, or do not fit the configuration.
    """
    if arguments.model is None:
        model = LlavaSkipForConditionalGeneration(config).to(dtype)
        if arguments.attn_implementation:
            model.set_attn_implementation(arguments.attn_implementation)
        start_positions(model)
    else:
        model = _load(str(local_path(arguments.model) or arguments.model), arguments, config, dtype, quantization)
    choose_trained(model, arguments.trained_parts)
    freeze_unused(model, config)
    return model


def _load(
    source: str,
    arguments: ModelArguments,
    config: LlavaSkipConfig,
    dtype: torch.dtype,
    quantization: BitsAndBytesConfig | None,
) -> LlavaSkipForConditionalGeneration:
    """A saved model, or one that is joined from several sources."""
    if arguments.vision_tower or arguments.projector:
        model = load_checkpoint(
            source,
            dtype=dtype,
            config=config,
            vision_tower=arguments.vision_tower,
            projector=arguments.projector,
            attn_implementation=arguments.attn_implementation,
            log=os.environ.get("RANK", "0") == "0",
        )
        model.name_or_path = source  # PEFT writes it into an adapter's folder
        return model
    options: dict[str, Any] = {"dtype": dtype, "quantization_config": quantization}
    if arguments.attn_implementation:
        options["attn_implementation"] = arguments.attn_implementation
    try:
        return LlavaSkipForConditionalGeneration.from_pretrained(source, config=config, **options)
    except (OSError, SafetensorError) as error:  # a file that cannot be read; packages were looked for before
        raise UserError(f"{source} cannot be loaded: {error}") from error


def make_trainable_model(
    arguments: ModelArguments, run: RunArguments, config: LlavaSkipConfig
) -> PreTrainedModel | PeftModel:
    """The model as it is trained: with the other parts frozen, and with LoRA if it was asked for.

    Trainable parameters are kept in float32, unless DeepSpeed keeps its own float32 copy: small steps of AdamW would
    be lost in bfloat16 weights.
    """
    if run.deepspeed and torch.distributed.is_initialized():
        import deepspeed  # takes seconds, and prints which devices it finds

        # Trainer does not do this on a CPU; ZeRO-3 needs it before from_pretrained, which partitions the weights.
        deepspeed.init_distributed(verbose=False)
    dtype = torch.bfloat16 if run.bf16 else torch.float16 if run.fp16 else torch.float32
    model: Any = build_model(arguments, config, dtype, quantization_config(arguments, dtype))
    if arguments.lora_enable:
        model = add_lora(model, arguments, bool(run.activation_checkpointing))
        freeze_unused(model, config)
    if run.deepspeed is None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return model


@torch.no_grad()
def start_positions(model: LlavaSkipForConditionalGeneration) -> None:
    """Give a new tower's position embeddings the same deviation as its patch embeddings.

    transformers initialises both tables alike, but a patch embedding is a sum over hundreds of pixels: positions are
    then a few percent of the tower's input, and the model needs hundreds of steps to learn "top left".
    """
    model.model.vision_tower.embeddings.position_embedding.weight.normal_()
