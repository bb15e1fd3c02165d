"""Writing a dense model for transformers' LLaVA."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import save_torch_state_dict
from transformers import LlavaConfig, LlavaProcessor

from llava_skip.configuration import LlavaSkipConfig
from llava_skip.modeling import LlavaSkipForConditionalGeneration
from llava_skip.processing import LlavaSkipProcessor
from llava_skip.vision import get_front_end
from llava_skip_base.errors import UserError

_HUB_NAMES = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)


def export_llava_hf(
    model: LlavaSkipForConditionalGeneration, folder: str | Path, processor: LlavaSkipProcessor | None = None
) -> None:
    """Write a dense model so that transformers' `LlavaForConditionalGeneration` computes the same logits.

    The names are those of the hub's llava-hf models, which transformers 4 and 5 both read.

    Args:
        model: dense, with the front end `llava`.
        folder: the folder to write to.
        processor: the model's; if given, theirs is written too.

    Raises:
        UserError: the model skips, or has another front end: transformers' LLaVA cannot compute that.
    """
    config = model.config
    if config.skip is not None:
        raise UserError(
            "The model skips: transformers' LLaVA merges no tokens, has no summary layer and runs the FFN on every "
            "token, so its logits would differ. Save it with save_pretrained, or load it "
            "with preset='llava' (--preset llava)."
        )
    if config.reduction is not None:
        raise UserError(
            f"The model has the reduction {config.reduction_config}, which transformers' LLaVA does not know: its "
            "language model would get every token of an image. Write the native layout, or set reduction to null."
        )
    if not get_front_end(config.front_end).is_llava_hf:
        raise UserError(
            f"The front end is {config.front_end!r}; transformers' LLaVA has only one crop of CLIP patches and an MLP."
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    left_out = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    weights = {_hub_name(name): t.contiguous() for name, t in model.state_dict().items() if name not in left_out}
    save_torch_state_dict(weights, folder)
    theirs = stock_config(config)
    theirs.architectures, theirs.dtype = ["LlavaForConditionalGeneration"], model.dtype
    theirs.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    if processor is not None:
        LlavaProcessor(
            image_processor=processor.image_processor,
            tokenizer=processor.tokenizer,
            patch_size=config.vision_config.patch_size,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            chat_template=processor.chat_template,
            num_additional_image_tokens=1,
        ).save_pretrained(folder)


def stock_config(config: LlavaSkipConfig) -> LlavaConfig:
    """The configuration of transformers' LLaVA with the weights of a dense model of the front end `llava`."""
    ours = {
        "skip",
        "reduction",
        "preset",
        "front_end",
        "max_tiles",
        "pad_pictures",
        "resampler",
        "model_type",
        "architectures",
    }
    return LlavaConfig(**{key: value for key, value in config.to_dict().items() if key not in ours})


def _hub_name(name: str) -> str:
    for prefix, other in _HUB_NAMES:
        if name.startswith(prefix):
            return other + name.removeprefix(prefix)
    raise UserError(f"transformers' LLaVA has no weight for {name}.")
