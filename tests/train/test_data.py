import json
import re

import pytest
import torch
from PIL import Image

from llava_skip import LlavaSkipProcessor, SkipConfig
from tests.llava_skip.test_processing import byte_tokenizer
from tests.small_models import small_config
from train.data import ConversationDataset, check_records, collate, load_records, to_messages


def record(pictures=("a.png",), text="<image>\nWhat?", answer="This.", **more):
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    entry = {"id": "r1", "conversations": turns, **more}
    if pictures:
        entry["image"] = pictures[0] if len(pictures) == 1 else list(pictures)
    return entry


@pytest.fixture
def images(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (10, 6), "red").save(tmp_path / name)
    return tmp_path


@pytest.fixture
def processor():
    config = small_config(SkipConfig(5, 7), vocab_size=400)
    config.image_token_index = 3
    return LlavaSkipProcessor.for_config(config, byte_tokenizer(), "v1")


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        (record(("missing.png",)), "the image .*missing.png does not exist"),
        (record(("a.png", "b.png")), "2 pictures, but 1 <image> in the text"),
        (record(()), "0 pictures, but 1 <image>"),
        (record(text="no placeholder"), "1 pictures, but 0 <image>"),
        ({"id": "x", "conversations": [{"from": "robot", "value": "?"}]}, "unknown speakers"),
        ({"id": "x", "conversations": [{"from": "gpt", "value": "Hi"}]}, "must alternate human, gpt"),
        ({"id": "x", "conversations": record()["conversations"][:1], "image": "a.png"}, "must alternate"),
        ({"id": "x"}, "'conversations' must be a list"),
        (record(("a.png",) * 8, text="<image>" * 8), "8 pictures take 112 rows, --max_length is 100"),
    ],
)
def test_faulty_records_are_named_before_training(images, faulty, message):
    with pytest.raises(ValueError, match=rf"1 of 2 records are faulty:\nrecord 1 \(id '.*'\): .*{message}"):
        check_records([record(), faulty], images, 14, 100)


def test_good_records_pass(images):
    several = record(("a.png", "b.png"), text="<image> or <image>?")
    check_records([record(), record((), "Just text"), several], images, 14, 100)


def test_many_faults_are_counted(images):
    with pytest.raises(ValueError, match=r"8 of 8 records are faulty") as caught:
        check_records([record(("no.png",))] * 8, images, 14, 100)
    assert str(caught.value).count("record ") == 5 and "and 3 more" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "not valid JSON"), ("{}", "must hold a list"), ("[]", "at least one")]
)
def test_broken_data_files(tmp_path, content, message):
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_records(path)
    with pytest.raises(FileNotFoundError, match="DATA .*nowhere.json does not exist"):
        load_records(tmp_path / "nowhere.json")


def test_a_turns_only_picture_moves_to_its_front():
    turns = [{"from": "human", "value": "Look: \n<image>"}, {"from": "gpt", "value": "Yes."}]
    assert to_messages(turns) == [
        {"role": "user", "content": "<image>\nLook:"},
        {"role": "assistant", "content": "Yes."},
    ]
    assert to_messages([{"from": "human", "value": "<image> or <image>?"}])[0]["content"] == "<image> or <image>?"


def test_batch_of_mixed_samples(images, processor):
    records = [record(), record((), "Just text", "Fine"), record(("a.png", "b.png"), text="<image> or <image>?")]
    dataset = ConversationDataset(records, images, processor, 2048)
    batch = collate([dataset[i] for i in range(3)], pad_token_id=0)
    assert batch["pixel_values"].shape == (3, 3, 16, 16)
    assert (batch["input_ids"] == 3).sum(1).tolist() == [14, 0, 28]
    lengths = batch["attention_mask"].sum(1)
    assert torch.equal(batch["attention_mask"], (torch.arange(lengths.max()) < lengths[:, None]).long())
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert (batch["labels"] != -100).any(dim=1).all()
    assert "pixel_values" not in collate([dataset[1]], 0)


def test_cut_samples_are_counted_and_a_picture_is_never_cut(images, processor):
    dataset = ConversationDataset([record(answer="long " * 50)], images, processor, 250)
    sample = dataset[0]
    assert len(sample["input_ids"]) == len(sample["labels"]) == 250 and sample["truncated"] > 0
    assert collate([sample, sample], 0)["truncated"].item() == 2
    late = record(text="word " * 40 + "<image> and <image>", pictures=("a.png", "b.png"))
    with pytest.raises(ValueError, match=r"record 0 \(id 'r1'\) is \d+ rows long.* would cut a picture"):
        ConversationDataset([late], images, processor, 390)[0]


def test_an_unreadable_picture_names_its_record(images, processor):
    (images / "a.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=re.escape("record 0 (id 'r1'): cannot identify image file")):
        ConversationDataset([record()], images, processor, 2048)[0]


def test_records_are_read_as_written(tmp_path):
    records = [record(), record((), "Zwölf Boxkämpfer")]
    (tmp_path / "data.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    assert load_records(tmp_path / "data.json") == records
