"""From arguments to processor and model: what is loaded, what is new, what learns."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    CLIPVisionConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llava_skip.checkpoints import detect_layout, load_checkpoint
from llava_skip.checkpoints.files import find_model_weights, read_json
from llava_skip.checkpoints.layouts import LANGUAGE, NATIVE
from llava_skip.configuration import LlavaSkipConfig
from llava_skip.errors import MissingFileError, UserError
from llava_skip.modeling import LlavaSkipForConditionalGeneration
from llava_skip.presets import DEFAULT_PRESET, fields_for_tower, preset_config, skip_for_model
from llava_skip.processing import IMAGE_TOKEN, LlavaSkipProcessor, find_image_token
from llava_skip.vision import get_front_end
from train.arguments import ModelArguments, RunArguments
from train.recipe.lora import add_lora, quantization_config
from train.recipe.parts import choose_trained, freeze_unused

EMBEDDED_TOKENIZER = Path("playground/data/digits/tokenizer")
"""Tokenizer of a new model, unless another is named."""


def prepare(arguments: ModelArguments) -> tuple[LlavaSkipConfig, LlavaSkipProcessor]:
    """Configuration and processor of the run, without any weights: mistakes show before a model loads.

    Raises:
        UserError: an unknown preset, size or template, or a tokenizer that does not fit.
        MissingFileError: a model or tokenizer folder that does not exist.
    """
    for what in ("model", "vision_tower"):
        if source := getattr(arguments, what):
            _check_source(source, what)
    saved = _saved_config(arguments) if arguments.model else None
    tokenizer = _load_tokenizer(arguments)
    if saved is None:
        preset = arguments.preset or DEFAULT_PRESET
        vocabulary = {"vocab_size": _padded_vocabulary(tokenizer), **_token_ids(tokenizer)}
        config = preset_config(preset, arguments.size, **vocabulary)
        config.image_token_index = find_image_token(tokenizer)
    else:
        config = _config_of(arguments, saved, tokenizer)
    if config.text_config.vocab_size < len(tokenizer):
        raise UserError(
            f"The tokenizer has {len(tokenizer)} tokens, the model's vocabulary {config.text_config.vocab_size}: "
            "give the tokenizer that belongs to the model."
        )
    processor = LlavaSkipProcessor.for_config(config, tokenizer, arguments.template)
    if arguments.image_aspect_ratio == "square":
        if get_front_end(config.front_end).cuts_tiles:
            raise UserError(
                f"--image_aspect_ratio square does not go with the front end {config.front_end!r}, which cuts tiles: "
                "use pad."
            )
        processor.image_processor.do_pad = False
    return config, processor


def check_weights(arguments: ModelArguments) -> None:
    """What a local --model and --projector are loaded from must be there.

    Raises:
        MissingFileError: no weights, an adapter alone, or a shard that is missing.
    """
    if arguments.model and Path(arguments.model).is_dir():
        find_model_weights(Path(arguments.model))
    if arguments.projector:
        _check_source(arguments.projector, "projector")


def _load_tokenizer(arguments: ModelArguments) -> PreTrainedTokenizerBase:
    source = arguments.tokenizer or arguments.model or str(EMBEDDED_TOKENIZER)
    if source == str(EMBEDDED_TOKENIZER) and not EMBEDDED_TOKENIZER.exists():
        raise MissingFileError(
            f"There is neither --model nor --tokenizer, and {source} of the embedded data is not made yet: name the "
            "model, or run python -m playground.data.build."
        )
    _check_source(source, "tokenizer")
    tokenizer = _read(AutoTokenizer, source)
    if arguments.vision_tower and tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    find_image_token(tokenizer)
    if not (arguments.template or tokenizer.chat_template):
        raise UserError(f"The tokenizer of {source} has no chat template: name one with --template.")
    return tokenizer


def _check_source(source: str, what: str) -> None:
    """A path that looks local must exist; anything else is a hub name, which transformers looks up."""
    local = source.startswith((".", "/", "~")) or source.count("/") != 1 or source.endswith((".bin", ".safetensors"))
    if local and not Path(source).exists():
        name = what.replace("_", " ")
        raise MissingFileError(f"The {name} {source} does not exist: give a folder or a hub name (owner/name).")


def _read(kind: type[AutoConfig] | type[AutoTokenizer], source: str) -> Any:
    """What `source` holds of a kind; transformers' own errors do not always say which source was asked for."""
    try:
        return kind.from_pretrained(source)
    except (OSError, ValueError) as error:
        what = "tokenizer" if kind is AutoTokenizer else "configuration"
        seen = f"holds no {what} that can be read" if Path(source).exists() else "is neither a folder nor on the hub"
        raise UserError(f"{source} {seen}: {' '.join(str(error).split())}") from error


def _padded_vocabulary(tokenizer: PreTrainedTokenizerBase) -> int:
    """Its tokens, rounded up to a multiple of 64, which matrix products like."""
    return -(-len(tokenizer) // 64) * 64


def _token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _saved_config(arguments: ModelArguments) -> Any:
    """What --model holds: one of our models, or a language model that --vision_tower is joined to."""
    assert arguments.model is not None  # a new model has none
    _check_layout(arguments.model)
    config = _read(AutoConfig, arguments.model)
    ours = config.model_type == LlavaSkipConfig.model_type
    if ours and arguments.vision_tower:
        raise UserError(f"{arguments.model} already has a vision tower: leave --vision_tower out.")
    if not ours and not arguments.vision_tower:
        raise UserError(
            f"{arguments.model} is a {config.model_type} model, not a {LlavaSkipConfig.model_type} one: name a CLIP "
            "vision tower with --vision_tower to join the two."
        )
    return config


def _config_of(arguments: ModelArguments, config: Any, tokenizer: PreTrainedTokenizerBase) -> LlavaSkipConfig:
    if arguments.vision_tower:
        return _joined_config(arguments, config, tokenizer)
    if arguments.preset is None:
        return config
    skip = skip_for_model(arguments.preset, config)
    changed = {"skip": None if skip is None else skip.to_dict(), "preset": arguments.preset}
    return LlavaSkipConfig(**{**config.to_dict(), **changed})


def _check_layout(model: str) -> None:
    """A checkpoint of another program is converted first: transformers would misread some of their configurations."""
    file = Path(model) / "config.json"
    layout = detect_layout(read_json(file)) if file.is_file() else NATIVE
    if layout not in (NATIVE, LANGUAGE):
        raise UserError(
            f"{model} is a checkpoint of the layout {layout!r}. Convert it first, then train the result: "
            f"python -m llava_skip.convert {model} CONVERTED"
        )


def _joined_config(arguments: ModelArguments, text: Any, tokenizer: PreTrainedTokenizerBase) -> LlavaSkipConfig:
    vision = _read(AutoConfig, str(arguments.vision_tower))
    vision = getattr(vision, "vision_config", vision)
    if vision.model_type != CLIPVisionConfig.model_type:
        raise UserError(
            f"The vision tower {arguments.vision_tower} is a {vision.model_type} model: give a CLIP tower, such as "
            "openai/clip-vit-large-patch14-336."
        )
    preset = arguments.preset or DEFAULT_PRESET
    text.vocab_size = max(text.vocab_size, _padded_vocabulary(tokenizer))
    return LlavaSkipConfig(
        text_config=text,
        image_token_index=find_image_token(tokenizer),
        **fields_for_tower(preset, vision),
    )


def build_model(
    arguments: ModelArguments,
    config: LlavaSkipConfig,
    dtype: torch.dtype,
    quantization: BitsAndBytesConfig | None = None,
) -> LlavaSkipForConditionalGeneration:
    """The model of the run: new, loaded, or joined from a language model, a vision tower and a projector.

    Raises:
        UserError: the parts do not fit each other, or the processor.
    """
    options = {"attn_implementation": arguments.attn_implementation} if arguments.attn_implementation else {}
    if arguments.model is None:
        config._attn_implementation = arguments.attn_implementation
        model = LlavaSkipForConditionalGeneration(config).to(dtype)
        start_positions(model)
    elif arguments.vision_tower or arguments.projector:
        model = _join(arguments, config, dtype)
    else:
        model = LlavaSkipForConditionalGeneration.from_pretrained(
            arguments.model, config=config, dtype=dtype, quantization_config=quantization, **options
        )
    choose_trained(model, arguments.trained_parts)
    freeze_unused(model, config)
    return model


def _join(arguments: ModelArguments, config: LlavaSkipConfig, dtype: torch.dtype) -> LlavaSkipForConditionalGeneration:
    model = load_checkpoint(
        str(arguments.model),
        config.preset if arguments.vision_tower else arguments.preset,
        dtype,
        vision_tower=arguments.vision_tower,
        projector=arguments.projector,
        attn_implementation=arguments.attn_implementation,
        log=os.environ.get("RANK", "0") == "0",
    )
    for name in ("image_token_id", "image_seq_length"):
        if getattr(model.config, name) != getattr(config, name):
            raise UserError(
                f"{name} is {getattr(model.config, name)} by the weights and {getattr(config, name)} by the tokenizer: "
                f"save the tokenizer into {arguments.model}, and leave --tokenizer out."
            )
    model.name_or_path = str(arguments.model)  # PEFT writes it into an adapter's folder
    return model


def make_trainable_model(
    arguments: ModelArguments, run: RunArguments, config: LlavaSkipConfig
) -> PreTrainedModel | PeftModel:
    """The model as it is trained: with the parts frozen that do not learn, and with LoRA if it was asked for.

    What learns is kept in float32, unless DeepSpeed keeps its own float32 copy: bfloat16 weights would swallow the
    small steps of AdamW.
    """
    if run.deepspeed and torch.distributed.is_initialized():
        import deepspeed  # takes seconds, and looks for devices aloud

        deepspeed.init_distributed(verbose=False)  # on a CPU nobody has; ZeRO-3 cuts weights apart while loading
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
    """Make a new tower's position embeddings as loud as its patches.

    transformers starts both with the same deviation, but a patch embedding adds up hundreds of pixels; positions then
    are a few percent of what enters the tower, and hundreds of steps go by before "top left" can be learnt.
    """
    model.model.vision_tower.embeddings.position_embedding.weight.normal_()
