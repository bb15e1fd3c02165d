"""A saved folder in transformers' pipeline: prompts and chats, several images or none, alone and in a batch."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

from llava_skip import LlavaSkipForConditionalGeneration, LlavaSkipProcessor
from tests.support.conversations import byte_tokenizer, random_image
from tests.support.small_models import ARCHITECTURES, small_config

OPTIONS = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture(params=ARCHITECTURES)
def folder(request, tmp_path):
    config = small_config(None, request.param, vocab_size=400, max_position_embeddings=1024)
    config.image_token_index = 3
    torch.manual_seed(3)
    LlavaSkipForConditionalGeneration(config).save_pretrained(tmp_path)
    LlavaSkipProcessor.for_config(config, byte_tokenizer(), "v1").save_pretrained(tmp_path)
    return tmp_path


def chat(num_images: int, text: str = "What is this?") -> list[dict]:
    images = [{"type": "image", "image": random_image(seed=seed, width=10 + 30 * seed)} for seed in range(num_images)]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def test_chats_are_answered_as_by_hand_alone_and_in_a_batch(folder):
    asked = [chat(1), chat(2, "And these, of which there are more?"), chat(0, "Hello")]
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    expected = []
    for messages in asked:
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        outputs = model.generate(**inputs, **OPTIONS)[0, inputs["input_ids"].shape[1] :]
        expected.append(processor.decode(outputs, skip_special_tokens=True))
    answer = pipeline("image-text-to-text", model=str(folder))
    options = {"generate_kwargs": OPTIONS, "return_full_text": False}
    assert [answer(text=messages, **options)[0]["generated_text"] for messages in asked] == expected
    together = answer(text=asked[:2], batch_size=2, **options)  # transformers joins no chat without an image to others
    assert [one[0]["generated_text"] for one in together] == expected[:2]


def test_prompts_and_images_apart(folder):
    answer = pipeline("image-text-to-text", model=str(folder))
    options = {"generate_kwargs": OPTIONS, "return_full_text": False}
    one, two = random_image(seed=1), random_image(seed=2, width=40)
    asked = [([one], "<image> What?"), ([one, two], "<image> and <image>, longer?")]
    alone = [answer(images=images, text=text, **options)[0]["generated_text"] for images, text in asked]
    images, texts = ([*column] for column in zip(*asked, strict=True))
    together = answer(images=images, text=texts, batch_size=2, **options)
    assert [entry["generated_text"] for entry in together] == alone
    assert answer(text="Hello", **options)[0]["input_text"] == "Hello"
