import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from eval.errors import EvalError
from eval.generate import Generator
from eval.images import Picture
from eval.models import check_model
from llava_skip import LlavaSkipForConditionalGeneration, LlavaSkipProcessor, preset_config


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights with a tokenizer of single bytes."""
    folder = tmp_path_factory.mktemp("models") / "random"
    backend = Tokenizer(models.BPE({byte: n for n, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token) for token in ("<pad>", "</s>", "<image>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    torch.manual_seed(0)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = preset_config("sv-llava-64", vocab_size=len(tokenizer), **ids)
    config.image_token_index = tokenizer.convert_tokens_to_ids("<image>")
    LlavaSkipForConditionalGeneration(config).save_pretrained(folder)
    LlavaSkipProcessor.for_config(config, tokenizer, "v1").save_pretrained(folder)
    return folder


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
    generator = Generator(check_model(saved), max_new_tokens=6)
    seen = spy(generator)
    prompts = ["Which?", "A much longer question than the others, about two pictures.", "No picture."]
    images = [(noise(1),), (noise(2), noise(3)), ()]
    together = generator.answer(prompts, images)
    assert (seen["attention_mask"][:, 0] == 0).sum() == 2  # the two shorter rows are padded, on the left
    assert seen["attention_mask"][:, -1].all()
    alone = [generator.answer([prompt], [own])[0] for prompt, own in zip(prompts, images, strict=True)]
    assert together == alone
    assert len(set(together)) > 1


def test_answer_is_the_new_text_only(saved: Path) -> None:
    generator = Generator(check_model(saved), max_new_tokens=3)
    seen = spy(generator)
    (answer,) = generator.answer(["What is this?"], [(noise(1),)])
    prompt = generator.processor.batch_decode(seen["input_ids"])[0]
    assert prompt.endswith("<image>\nWhat is this? ASSISTANT:")
    new = seen["output"][:, seen["input_ids"].shape[1] :]
    assert 1 <= new.shape[1] <= 3
    assert answer == generator.processor.batch_decode(new, skip_special_tokens=True)[0].strip()
    assert (seen["do_sample"], seen["num_beams"], seen["max_new_tokens"]) == (False, 1, 3)


def test_folder_that_cannot_be_loaded(saved: Path, tmp_path: Path) -> None:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "unheard of"}')
    with pytest.raises(EvalError, match="cannot be loaded as a model"):
        Generator(check_model(tmp_path), 3)
