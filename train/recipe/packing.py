"""What is checked of a run that has several samples in a row (`--padding_free`), before a model loads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers.utils.generic import is_flash_attention_requested

from llava_skip.configuration import LlavaSkipConfig
from llava_skip.masking import attends_in_window
from llava_skip.reduction.running import check_samples_apart
from llava_skip_base.errors import UserError

if TYPE_CHECKING:
    from train.arguments import DataArguments, ModelArguments, RunArguments

DENSE = "--padding_free true would need a mask of all tokens of a batch by all its tokens"
OR_PADDED = "or train with --padding_free false, with padding"


def check_packing(data: DataArguments, run: RunArguments) -> None:
    """Refuse arguments that do not go with batches of a fixed number of tokens.

    Raises:
        UserError: says which one, and what to change.
    """
    most = data.max_tokens_per_batch
    if most is None:
        return
    if not data.padding_free:
        raise UserError("--max_tokens_per_batch puts samples one after the other: give --padding_free true, too.")
    if data.streaming:
        raise UserError("--max_tokens_per_batch needs the length of every sample; leave out --streaming.")
    if data.group_by_modality_length:
        raise UserError(
            "--max_tokens_per_batch and --group_by_modality_length both choose the samples of a batch: leave one out."
        )
    if run.train_sampling_strategy == "sequential":
        raise UserError("--max_tokens_per_batch has an order of its own: leave out --train_sampling_strategy.")
    if run.per_device_train_batch_size != 1:
        raise UserError(
            f"--max_tokens_per_batch says how many samples are in a batch, and --per_device_train_batch_size is "
            f"{run.per_device_train_batch_size}: give --per_device_train_batch_size 1."
        )
    if most < data.max_length:
        raise UserError(
            f"--max_tokens_per_batch is {most}, and a sample may have {data.max_length} tokens: raise it, or lower "
            "--max_length, at which samples are cut."
        )


def attends_per_sample(model: ModelArguments, data: DataArguments, config: LlavaSkipConfig) -> bool:
    """Whether a run attends to each sample of a row by itself (`llava_skip.per_sample`).

    Flash and flex attention separate samples themselves.

    Raises:
        UserError: the samples of a row could be separated only by a mask of all its tokens by all its tokens, or not
            at all.
    """
    if not data.padding_free:
        return False
    check_samples_apart(config)
    chosen = model.attn_implementation or "sdpa"
    if chosen == "flex_attention" or is_flash_attention_requested(requested_attention_implementation=chosen):
        return False
    if chosen != "sdpa":
        raise UserError(
            f"{DENSE} with --attn_implementation {chosen}: use sdpa, flash_attention_2 or flex_attention, {OR_PADDED}."
        )
    if attends_in_window(config.text_config):
        raise UserError(
            f"{DENSE}, as the language model attends in a sliding window: use flash_attention_2 or flex_attention, set "
            f"sliding_window to null in text_config if --max_length ({data.max_length}) fits the window, {OR_PADDED}."
        )
    skip = config.skip_config
    if skip is not None and not skip.text_sees_skipped:
        raise UserError(f"{DENSE}, as skip.text_sees_skipped is false: use flex_attention, {OR_PADDED}.")
    return True
