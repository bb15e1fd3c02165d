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
from eval.errors import EvalError
from eval.reading.images import Picture


def noise(seed: int) -> Picture:
    pixels = np.random.default_rng(seed).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return Picture(f"record {seed}", base64.b64encode(buffer.getvalue()).decode())


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
    prompts = ["Which?", "A much longer question than the others, about two pictures.", "No picture."]
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


def test_pictures_are_shown_where_the_question_names_their_places() -> None:
    def shown(prompt: str, count: int) -> list[Any]:
        (turn,) = conversation(prompt, [noise(n) for n in range(count)])
        content = turn["content"]
        return content if isinstance(content, str) else [part.get("text", part["type"]) for part in content]

    assert shown("Are they alike?", 2) == ["image", "image", "Are they alike?"]
    assert shown("Is <image> in <image>?", 2) == ["Is ", "image", " in ", "image", "?"]
    assert shown("<image>\nWhich?", 1) == ["image", "Which?"]
    assert shown("<image>\nWhich?", 0) == "Which?"  # asked without pictures


def test_folder_that_cannot_be_loaded(saved: Path, tmp_path: Path) -> None:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "unheard of"}')
    with pytest.raises(EvalError, match="cannot be loaded as a model"):
        Generator(check_model(tmp_path), numerics())


def test_attention_and_number_format_can_be_chosen(saved: Path) -> None:
    generator = Generator(check_model(saved), numerics("bfloat16", "eager"))
    assert (generator.model.dtype, generator.model.config._attn_implementation) == (torch.bfloat16, "eager")
    assert len(generator.answer(["What?"], [(noise(1),)], 2)) == 1
    with pytest.raises(EvalError, match="--dtype is 'int8'; choose one of float32"):
        numerics("int8")
    with pytest.raises(EvalError, match="cannot be loaded"):
        Generator(check_model(saved), numerics(attn="unheard of"))


def test_a_model_without_a_chat_template_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "bare")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(EvalError, match="bare: its processor has no chat template; .* --template NAME"):
        Generator(check_model(folder), numerics())


def test_language_model_answers_without_pictures(saved: Path, tmp_path: Path) -> None:
    whole = Generator(check_model(saved), numerics())
    whole.model.model.language_model.save_pretrained(tmp_path)
    language_model = LlamaForCausalLM(LlamaConfig.from_pretrained(tmp_path))
    language_model.save_pretrained(tmp_path)
    whole.processor.tokenizer.chat_template = whole.processor.chat_template
    whole.processor.tokenizer.save_pretrained(tmp_path)
    bare = Generator(check_model(tmp_path), numerics())
    together = bare.answer(["Which?", "A longer question?"], [(), ()], 4)
    assert together == [bare.answer([prompt], [()], 4)[0] for prompt in ("Which?", "A longer question?")]
    with pytest.raises(EvalError, match="cannot see pictures; ask it with --blind"):
        bare.answer(["Which?"], [(noise(1),)], 4)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(EvalError, match="has no chat template"):
        Generator(check_model(tmp_path), numerics())
