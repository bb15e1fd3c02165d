import base64
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from eval.answering.generate import Generator, conversation, numerics
from eval.answering.models import check_model
from eval.reading.images import ImageSource
from llava_skip import LlavaSkipForConditionalGeneration
from llava_skip_base.errors import UserError


def noise(seed: int) -> ImageSource:
    pixels = np.random.default_rng(seed).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return ImageSource(f"sample {seed}", base64.b64encode(buffer.getvalue()).decode())


def spy(generator: Generator) -> dict[str, Any]:
    """Record what the model is given and what it returns."""
    seen: dict[str, Any] = {}
    inner = generator.model.generate

    def generate(**inputs: Any) -> torch.Tensor:
        seen.update(inputs)
        seen["output"] = inner(**inputs)
        return seen["output"]

    generator.model.generate = generate
    return seen


def test_mixed_batch_answers_as_each_alone(saved: Path) -> None:
    generator = Generator(check_model(saved), numerics())
    seen = spy(generator)
    prompts = ["Which?", "A much longer question than the others, about two images.", "No image."]
    images = [(noise(1),), (noise(2), noise(3)), ()]
    together = generator.answer(prompts, images, 6)
    assert (seen["attention_mask"][:, 0] == 0).sum() == 2  # the two shorter rows are padded, on the left
    assert seen["attention_mask"][:, -1].all()
    alone = [generator.answer([prompt], [own], 6)[0] for prompt, own in zip(prompts, images, strict=True)]
    assert together == alone
    assert len(set(together)) > 1


def test_answer_is_the_new_text_only(saved: Path) -> None:
    generator = Generator(check_model(saved), numerics())
    seen = spy(generator)
    (answer,) = generator.answer(["What is this?"], [(noise(1),)], 3)
    prompt = generator.processor.batch_decode(seen["input_ids"])[0]
    assert prompt.endswith("<image>\nWhat is this? ASSISTANT:")
    new = seen["output"][:, seen["input_ids"].shape[1] :]
    assert 1 <= new.shape[1] <= 3
    assert answer == generator.processor.batch_decode(new, skip_special_tokens=True)[0].strip()
    assert (seen["do_sample"], seen["num_beams"], seen["max_new_tokens"]) == (False, 1, 3)


def test_images_are_shown_where_the_question_names_their_places() -> None:
    def shown(prompt: str, count: int) -> list[Any]:
        (turn,) = conversation(prompt, [noise(n) for n in range(count)])
        content = turn["content"]
        return content if isinstance(content, str) else [part.get("text", part["type"]) for part in content]

    assert shown("Are they alike?", 2) == ["image", "image", "Are they alike?"]
    assert shown("Is <image> in <image>?", 2) == ["Is ", "image", " in ", "image", "?"]
    assert shown("<image>\nWhich?", 1) == ["image", "Which?"]
    assert shown("<image>\nWhich?", 0) == "Which?"  # asked without images


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", '{"model_type": "unheard of"}', "cannot be loaded as a model .* type 'unheard of'"),
        ("config.json", '{"model_type": "vit"}', "cannot be loaded as a model .* type 'vit'"),
        ("config.json", "{", "config.json is not valid JSON"),
        ("tokenizer.json", "{", "tokenizer.json is not valid JSON"),
        ("tokenizer.json", None, "broken holds no tokenizer that can be read"),
        ("processor_config.json", None, "broken: its processor cannot be loaded"),
        ("model.safetensors", "cut", "broken cannot be loaded: model.safetensors is broken"),
    ],
)
def test_a_broken_folder_is_one_message(
    saved: Path, tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    file = shutil.copytree(saved, tmp_path / "broken") / name
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(UserError, match=message):
        Generator(check_model(file.parent), numerics())


def test_a_programming_error_while_loading_is_no_message(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(self: Any, *args: Any, **kwargs: Any) -> None:
        self.first, self.second = (1,)

    monkeypatch.setattr(LlavaSkipForConditionalGeneration, "__init__", planted)
    with pytest.raises(ValueError, match="not enough values to unpack") as caught:
        Generator(check_model(saved), numerics())
    assert not isinstance(caught.value, UserError)


def test_attention_and_number_format_can_be_chosen(saved: Path) -> None:
    generator = Generator(check_model(saved), numerics("bfloat16", "eager"))
    assert (generator.model.dtype, generator.model.config._attn_implementation) == (torch.bfloat16, "eager")
    assert len(generator.answer(["What?"], [(noise(1),)], 2)) == 1
    with pytest.raises(UserError, match="--dtype is 'int8'; choose one of float32"):
        numerics("int8")
    with pytest.raises(UserError, match="--attn is 'unheard of'; choose one of eager"):
        numerics(attn="unheard of")


def test_a_model_without_a_chat_template_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "bare")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="bare: its processor has no chat template; .* --template NAME"):
        Generator(check_model(folder), numerics())


def test_language_model_answers_without_images(saved: Path, tmp_path: Path) -> None:
    whole = Generator(check_model(saved), numerics())
    whole.model.model.language_model.save_pretrained(tmp_path)
    language_model = LlamaForCausalLM(LlamaConfig.from_pretrained(tmp_path))
    language_model.save_pretrained(tmp_path)
    whole.processor.tokenizer.chat_template = whole.processor.chat_template
    whole.processor.tokenizer.save_pretrained(tmp_path)
    bare = Generator(check_model(tmp_path), numerics())
    together = bare.answer(["Which?", "A longer question?"], [(), ()], 4)
    assert together == [bare.answer([prompt], [()], 4)[0] for prompt in ("Which?", "A longer question?")]
    with pytest.raises(UserError, match="cannot see images; ask it with --blind"):
        bare.answer(["Which?"], [(noise(1),)], 4)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        Generator(check_model(tmp_path), numerics())
