"""Random damage to the files of a model: nothing but UserError escapes from what reads them.

Seeded, so that a failure can be repeated; FUZZ_ROUNDS multiplies the number of tries.
"""

import json
import os
import random
import shutil
import struct

import pytest
import torch
from safetensors.torch import save_file

from llava_skip import LlavaSkipForConditionalGeneration, LlavaSkipProcessor
from llava_skip.checkpoints import load_config, load_tokenizer
from llava_skip.checkpoints.files import check_tensors, find_model_weights, read_model_shapes, read_tensors
from llava_skip.checkpoints.layouts import hf_config, tower_config
from llava_skip.checkpoints.loading import check_native
from llava_skip.checkpoints.processor import load_processor
from llava_skip.checkpoints.schema import read_config
from llava_skip_base.errors import UserError
from llava_skip_base.files import read_json
from tests.support.conversations import byte_tokenizer
from tests.support.damage import damaged
from tests.support.small_models import small_config
from tests.support.stand_ins import language_model, vision_tower, word_tokenizer

ROUNDS = int(os.environ.get("FUZZ_ROUNDS", "1"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    config = small_config(vocab_size=400, max_position_embeddings=512, num_hidden_layers=1)
    config.image_token_index = 3
    LlavaSkipForConditionalGeneration(config).save_pretrained(folder / "native")
    LlavaSkipProcessor.for_config(config, byte_tokenizer(), "v1").save_pretrained(folder / "native")
    language_model(folder / "llm", word_tokenizer(folder / "words"))
    vision_tower(folder / "clip")
    return folder


def attack(path, read, tries, seed):
    """Damage a JSON file again and again, and read it; the file is whole again afterwards."""
    rng, whole, refused = random.Random(seed), path.read_text(), 0
    raw = json.loads(whole)
    try:
        for _ in range(tries * ROUNDS):
            path.write_text(damaged(raw, rng))
            try:
                read()
            except UserError as error:
                refused += 1
                assert len(str(error)) < 20_000
    finally:
        path.write_text(whole)
    assert refused > tries * ROUNDS / 4
    read()


def test_the_configuration_of_a_native_model(models):
    attack(models / "native/config.json", lambda: check_native(models / "native"), 60, seed=1)


@pytest.mark.parametrize("source", ["llm", "clip"])
def test_the_configurations_of_a_join(models, source):
    attack(
        models / source / "config.json",
        lambda: load_config(models / "llm", vision_tower=str(models / "clip")),
        40,
        seed=2,
    )


def test_a_tower_and_a_model_of_the_hub_layout(models, tmp_path):
    attack(models / "clip/config.json", lambda: tower_config(str(models / "clip")), 200, seed=3)
    raw = read_json(models / "native/config.json") | {"model_type": "llava"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    attack(tmp_path / "config.json", lambda: hf_config(read_config(tmp_path)), 200, seed=4)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json"])
def test_the_files_of_a_tokenizer(models, tmp_path, name):
    folder = shutil.copytree(models / "native", tmp_path / "copy")
    (folder / "config.json").unlink()
    attack(folder / name, lambda: load_tokenizer(folder, add_image_token=True), 60, seed=5)


def test_the_settings_of_a_processor(models):
    attack(models / "native/processor_config.json", lambda: load_processor(models / "native"), 40, seed=6)


def test_the_index_of_weights(models, tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 8}, "weight_map": {"a": "a.safetensors"}}))
    attack(index, lambda: find_model_weights(tmp_path), 200, seed=7)


def test_the_header_of_safetensors(tmp_path):
    path, rng = tmp_path / "model.safetensors", random.Random(8)
    save_file({"a": torch.ones(3, 4), "b": torch.ones(5, dtype=torch.float16)}, path)
    whole = path.read_bytes()
    (size,) = struct.unpack("<Q", whole[:8])
    header, body = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    refused = 0
    for _ in range(300 * ROUNDS):
        text = damaged(header, rng).encode()
        length = rng.choice([len(text)] * 9 + [0, 7, 2**62, 2**64 - 1, len(text) + 3])
        cut = body if rng.random() < 0.9 else body[: rng.randrange(len(body))]
        path.write_bytes(struct.pack("<Q", length) + text + cut)
        for read in (read_tensors, check_tensors, lambda _: read_model_shapes(tmp_path)):
            try:
                read(path)
            except UserError:
                refused += 1
    assert refused > 300 * ROUNDS


def test_pickled_weights(tmp_path):
    path, rng = tmp_path / "pytorch_model.bin", random.Random(9)
    torch.save({"a": torch.ones(30, 4)}, path)
    whole, refused = path.read_bytes(), 0
    for _ in range(100 * ROUNDS):
        content = bytearray(whole)
        for _ in range(rng.choice([1, 3, 50])):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content[: rng.choice([len(content), rng.randrange(len(content))])])
        try:
            read_tensors(path)
        except UserError:
            refused += 1
    assert refused > 10 * ROUNDS
