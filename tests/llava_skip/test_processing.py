import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from llava_skip import LlavaSkipForConditionalGeneration, LlavaSkipProcessor, SkipConfig
from llava_skip.conversation import load_template, template_names
from tests.support.conversations import SPECIAL, TURNS, byte_tokenizer, random_image, segments
from tests.support.small_models import small_config

IMAGE_LENGTH = 14


@pytest.fixture
def processor() -> LlavaSkipProcessor:
    config = small_config(SkipConfig(5, 7), vocab_size=400)
    config.image_token_index = 3
    return LlavaSkipProcessor.for_config(config, byte_tokenizer(), "v1")


def test_templates_come_with_the_library():
    assert {"v1", "llama3", "plain"} < set(template_names())
    with pytest.raises(ValueError, match="Unknown conversation template 'v9'; known: chatml, llama3, "):
        load_template("v9")


def test_v1_segments(processor):
    sample = processor.encode_conversation(TURNS, [random_image()])
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions."
    )
    assert segments(processor, sample) == [
        (False, f"<s>{system} USER: <image>\nWhat is this? ASSISTANT:"),
        (True, " A cat.</s>"),
        (False, "USER: What color? ASSISTANT:"),
        (True, " Black and white.</s>"),
    ]
    assert sample["input_ids"].count(3) == IMAGE_LENGTH
    assert torch.as_tensor(np.array(sample["pixel_values"])).shape == (1, 3, 16, 16)


def test_llama3_segments(processor):
    processor.chat_template = load_template("llama3")
    header = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    assert segments(processor, processor.encode_conversation(TURNS, [random_image()])) == [
        (
            False,
            f"<s>{header('system')}You are a helpful and honest multimodal assistant.<|eot_id|>"
            f"{header('user')}<image>\nWhat is this?<|eot_id|>{header('assistant')}",
        ),
        (True, "A cat.<|eot_id|>"),
        (False, f"{header('user')}What color?<|eot_id|>{header('assistant')}"),
        (True, "Black and white.<|eot_id|>"),
    ]


def test_plain_segments(processor):
    processor.chat_template = load_template("plain")
    sample = processor.encode_conversation(TURNS[:2], [random_image()])
    assert segments(processor, sample) == [(False, "<s><image>"), (True, "A cat.\n")]


@pytest.mark.parametrize("answer", ["", " ASSISTANT: USER: twice", "line\nline", "ü☂ 猫"])
def test_no_answer_loses_its_labels(processor, answer):
    turns = [TURNS[0], {"role": "assistant", "content": answer}]
    found = segments(processor, processor.encode_conversation(turns, [random_image()]))
    assert [text for supervised, text in found if supervised] == [f" {answer.strip()}</s>"]


def test_text_only_conversation(processor):
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    sample = processor.encode_conversation(turns, [])
    assert "pixel_values" not in sample
    assert segments(processor, sample)[-1] == (True, " Hi</s>")


def test_inference_prompt_is_the_beginning_of_the_training_sample(processor):
    for name in ("v1", "llama3"):
        processor.chat_template = load_template(name)
        content = [{"type": "image", "image": random_image()}, {"type": "text", "text": "What is this?"}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"][0]
        sample = processor.encode_conversation(TURNS, [random_image()])
        assert sample["input_ids"][: len(prompt)] == list(prompt)
        first = next(i for i, label in enumerate(sample["labels"]) if label != -100)
        assert first == len(prompt)


def test_call_with_images_text_and_padding(processor):
    batch = processor(
        images=[[random_image(seed=1), random_image(seed=2)], [], [random_image(seed=3)]],
        text=["<image> and <image>", "no image at all!!", "<image>"],
        padding=True,
        return_tensors="pt",
    )
    assert (batch["input_ids"] == 3).sum(1).tolist() == [2 * IMAGE_LENGTH, 0, IMAGE_LENGTH]
    assert batch["pixel_values"].shape == (3, 3, 16, 16)
    assert batch["attention_mask"].sum(1).tolist() == [1 + 2 * IMAGE_LENGTH + 5, 1 + 17, 1 + IMAGE_LENGTH]
    assert batch["attention_mask"][:, -1].all()  # padded on the left, as generation needs it
    text = processor(text="just text", return_tensors="pt")
    assert "pixel_values" not in text


def test_an_image_is_padded_to_a_square_in_the_mean_colour(processor):
    white = Image.new("RGB", (40, 20), "white")
    pixels = processor(images=white, text="<image>", return_tensors="pt")["pixel_values"][0]
    mean, std = torch.tensor(processor.image_processor.image_mean), torch.tensor(processor.image_processor.image_std)
    colours = (pixels * std[:, None, None] + mean[:, None, None]) * 255
    assert torch.allclose(colours[:, 0, 8], torch.tensor([122.0, 116.0, 104.0]), atol=1.0)
    assert torch.allclose(colours[:, 8, 8], torch.tensor([255.0] * 3), atol=1.0)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_images_of_every_mode(processor, mode):
    pixels = processor(images=random_image().convert(mode), text="<image>", return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 16, 16)


def test_numbers_of_images_and_placeholders_must_agree(processor):
    with pytest.raises(ValueError, match="Found total 2 <image> tokens and 1 images"):
        processor(images=[random_image()], text="<image> <image>")
    with pytest.raises(ValueError):
        processor.encode_conversation(TURNS, [])


def test_a_tokenizer_without_the_image_token_is_refused():
    without = byte_tokenizer([token for token in SPECIAL if token != "<image>"])
    with pytest.raises(ValueError, match="does not know the image token '<image>' as one token"):
        LlavaSkipProcessor.for_config(small_config(), without, "v1")


def test_tokenizer_and_model_must_agree_on_the_image_token():
    with pytest.raises(ValueError, match="id of '<image>' is 3, the model's image_token_index is 90"):
        LlavaSkipProcessor.for_config(small_config(), byte_tokenizer(), "v1")


def test_processor_saves_and_loads_with_its_model(processor, tmp_path):
    config = small_config(vocab_size=400)
    config.image_token_index = 3
    LlavaSkipForConditionalGeneration(config).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, LlavaSkipProcessor)
    assert loaded.image_seq_length == IMAGE_LENGTH
    before, after = (p.encode_conversation(TURNS, [random_image()]) for p in (processor, loaded))
    assert before["labels"] == after["labels"]
    assert np.array_equal(before["pixel_values"], after["pixel_values"])
