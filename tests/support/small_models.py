"""Tiny models and samples that the tests share."""

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from llava_skip import LlavaSkipConfig, LlavaSkipForConditionalGeneration, SkipConfig

IMAGE_TOKEN_ID = 90
SKIP = SkipConfig(5, 7)
TEXT_SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


RESAMPLER = {"windows": [4, 2], "queries": [4, 8], "levels": [0, 1], "level_offset": 1, "width": 16}
# Architecture -> fields of the configuration. The method's numbers differ from each other and from every other number.
ARCHITECTURES = {
    "llava": {"skip": None},
    "sv-llava": {"skip": SKIP.to_dict()},
    "llava-hd": {"front_end": "hd", "pad_pictures": False, "skip": None},
    "sv-llava-hd": {"front_end": "hd", "pad_pictures": False, "skip": SkipConfig(16, 9).to_dict()},
    "cos": {"front_end": "cos", "resampler": RESAMPLER, "skip": None},
    "sv-cos": {
        "front_end": "cos",
        "resampler": RESAMPLER,
        "skip": SkipConfig(6, 5, summaries=((2, 6), (6, 11)), ffn_tail=1).to_dict(),
    },
}


def small_config(skip: SkipConfig | None = SKIP, architecture: str | None = None, **text) -> LlavaSkipConfig:
    """16 patches a crop, grouped-query attention, different numbers of everything."""
    fields = {"skip": None if skip is None else skip.to_dict()} if architecture is None else ARCHITECTURES[architecture]
    return LlavaSkipConfig(
        **fields,
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        ),
        text_config=LlamaConfig(
            **{
                **TEXT_SIZES,
                **text,
            }
        ),
        image_token_index=IMAGE_TOKEN_ID,
    )


def small_model(
    skip: SkipConfig | None = SKIP, architecture: str | None = None, **text
) -> LlavaSkipForConditionalGeneration:
    torch.manual_seed(3)
    model = LlavaSkipForConditionalGeneration(small_config(skip, architecture, **text)).eval()
    for parameter in model.parameters():  # biases and norms that start at 0 and 1 would hide mistakes
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


class Sample:
    """A sample with `num_images` images between text; ids and pixels of its own."""

    def __init__(self, model, num_images: int, text: tuple[int, ...], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        several = model.model.front_end.cuts_tiles
        crops = [(3, 5, 2)[(seed + index) % 3] if several else 1 for index in range(num_images)]
        parts = []
        for index, words in enumerate(text):
            parts.append(torch.randint(2, 80, (words,), generator=generator))
            if index < num_images:
                parts.append(torch.full((model.config.image_length(crops[index]),), IMAGE_TOKEN_ID))
        self.input_ids = torch.cat(parts)
        self.pixel_values = torch.randn(sum(crops), 3, 16, 16, generator=generator) if num_images else None
        self.crop_counts = torch.tensor(crops) if several and num_images else None

    def alone(self) -> dict:
        """The inputs of the sample by itself."""
        inputs = {"input_ids": self.input_ids[None], "attention_mask": torch.ones_like(self.input_ids)[None]}
        return inputs | images_of([self])


def images_of(samples: "list[Sample]") -> dict:
    """The images of samples, as the model takes them."""
    with_images = [sample for sample in samples if sample.pixel_values is not None]
    inputs = {}
    if with_images:
        inputs["pixel_values"] = torch.cat([sample.pixel_values for sample in with_images])
        if with_images[0].crop_counts is not None:
            inputs["crop_counts"] = torch.cat([sample.crop_counts for sample in with_images])
    return inputs


def mixed_samples(model) -> list[Sample]:
    """One image, two (adjacent), none, two apart; all of different lengths and offsets."""
    return [
        Sample(model, 1, (3, 5), seed=1),
        Sample(model, 2, (2, 0, 9), seed=2),
        Sample(model, 0, (6,), seed=3),
        Sample(model, 2, (1, 4, 2), seed=4),
    ]


def batch_of(samples: list[Sample], side: str) -> dict:
    """The samples as one padded batch."""
    length = max(len(sample.input_ids) for sample in samples)
    input_ids = torch.zeros(len(samples), length, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for index, sample in enumerate(samples):
        size = len(sample.input_ids)
        columns = slice(0, size) if side == "right" else slice(length - size, length)
        input_ids[index, columns], mask[index, columns] = sample.input_ids, 1
    return {"input_ids": input_ids, "attention_mask": mask} | images_of(samples)


def real_tokens(tensor: torch.Tensor, inputs: dict, index: int) -> torch.Tensor:
    """The tokens of one sample of a batch that are not padding."""
    return tensor[index][inputs["attention_mask"][index].bool()]
