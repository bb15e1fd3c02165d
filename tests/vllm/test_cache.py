"""The gain where it counts: entries of vLLM's cache that an image takes, and requests at once in the same memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import CLIPVisionConfig

from llava_skip import LlavaSkipConfig, LlavaSkipForConditionalGeneration, LlavaSkipProcessor, preset_config
from tests.support.conversations import byte_tokenizer
from tests.vllm.engines import engine

BLOCKS = 81
"""For the dense model 4 requests of 19 blocks, and some more."""


def save_wide(folder, preset: str):
    """The preset's numbers of tokens on 24 x 24 patches, as of LLaVA-1.5, with tiny widths."""
    tokenizer, own = byte_tokenizer(), preset_config(preset, vocab_size=300)
    text = own.text_config.to_dict() | {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 1,
        "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 1024, "vocab_size": len(tokenizer),
    }  # fmt: skip
    skip = {"retained": 100, "skipped": 156} if preset == "sv-llava-100" else None
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=1, image_size=336, patch_size=14
    )
    config = LlavaSkipConfig(vision_config=vision, text_config=text, skip=skip, image_token_index=3, preset=preset)
    torch.manual_seed(0)
    LlavaSkipForConditionalGeneration(config).save_pretrained(folder)
    LlavaSkipProcessor.for_config(config, tokenizer, "v1").save_pretrained(folder)
    return folder


@contextmanager
def written(llm) -> Iterator[list[int]]:
    """The slots of the first layer's cache that keys and values are written to."""
    slots: list[int] = []

    def watch(model) -> None:
        impl = model.language_model.model.layers[0].self_attn.attn.impl
        stock = impl.do_kv_cache_update

        def update(layer, key, value, cache, slot_mapping):
            slots.extend(slot_mapping.tolist())
            return stock(layer, key, value, cache, slot_mapping)

        impl.do_kv_cache_update = update

    llm.apply_model(watch)
    yield slots


def test_entries_of_an_image_and_requests_at_once(tmp_path):
    from serve.vllm.measure import measure

    found = {}
    for name, rows in (("llava", 576), ("sv-llava-100", 102)):
        settings = {"num_gpu_blocks_override": BLOCKS, "max_num_seqs": 64, "enable_prefix_caching": False}
        with engine(save_wide(tmp_path / name, name), **settings) as llm:
            text, image = {"prompt": "What?"}, torch.zeros(3, 64, 64, dtype=torch.uint8).permute(1, 2, 0).numpy()
            pictured = {"prompt": "<image>What?", "multi_modal_data": {"image": [image]}}
            lengths = [len(llm.generate([prompt], use_tqdm=False)[0].prompt_token_ids) for prompt in (text, pictured)]
            assert lengths[1] - lengths[0] == rows
            found[name] = measured = measure(llm, 40, 4)
            assert measured.image_rows == rows
    dense, skipping = found.values()
    assert (dense.image_blocks, skipping.image_blocks) == (19, 5)  # of 32 rows, with the question
    assert (dense.most, skipping.most) == (4, 16)


def test_an_image_writes_its_kept_rows_alone(tmp_path):
    from vllm import SamplingParams

    image = torch.zeros(64, 64, 3, dtype=torch.uint8).numpy()
    with engine(save_wide(tmp_path / "one", "sv-llava-100"), num_gpu_blocks_override=40) as llm, written(llm) as slots:
        prompt = {"prompt": "<image>", "multi_modal_data": {"image": [image]}}
        llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    assert len(slots) == len(set(slots)) == 1 + 102  # <s>, and the image's
