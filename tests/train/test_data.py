import codecs
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.records import record, stored
from train.data import ConversationDataset, collate, load_records, usable_records


def dataset_of(records, images, processor, max_length=2048):
    return ConversationDataset(stored(records, images), processor, max_length)


def check(records, images, processor, drop_faulty=False):
    return usable_records(stored(records, images), processor, 100, 0, drop_faulty)


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        (record(("missing.png",)), "the image .*missing.png does not exist"),
        (record(("a.png", "b.png")), "2 images, but 1 <image> in the text"),
        (record(()), "0 images, but 1 <image>"),
        (record(text="no placeholder"), "1 images, but 0 <image>"),
        ({"id": "x", "conversations": [{"from": "robot", "value": "?"}]}, "unknown speakers"),
        ({"id": "x", "conversations": [{"from": "gpt", "value": "Hi"}]}, "must alternate human, gpt"),
        ({"id": "x", "conversations": record()["conversations"][:1], "image": "a.png"}, "must alternate"),
        ({"id": "x"}, "'conversations' must be a list"),
        (7, "a row must be an object, not 7"),
        (record(text=3), "a turn's text must be a string, not 3"),
        (record((), image=[]), "0 images, but 1 <image>"),
        (record((), image=[None]), "an image must be a file name"),
        (record(("../a.png",)), "the image ../a.png leaves the image folder"),
        (record(("/a.png",)), "the image /a.png leaves the image folder"),
        (record(text=[{"type": "text"}]), r"a turn's text must be a string, not \[{"),
        ({"id": "x", "messages": [{"role": "user", "content": ["?"]}]}, "a part of a turn must be an object"),
        ({"id": "x", "messages": [{"role": 7, "content": "?"}]}, "must be a string, not 7"),
        (record((), image={"bytes": "iVBO"}), "an image must be a file name"),
        (record((), image={"path": 7}), "an image must be a file name"),
        (record(("\0.png",)), "does not exist"),
        (record(text="What?", answer="<image>"), "an answer has <image>"),
        (record(("a.png",) * 8, text="<image>" * 8), "8 images take 112 tokens, --max_length is 100"),
    ],
)
def test_faulty_records_are_named_before_training(images, processor, faulty, message):
    with pytest.raises(ValueError, match=rf"1 of 2 records are faulty:\nrecord 1 \(id .*\): .*{message}"):
        check([record(), faulty], images, processor)


def test_good_records_pass(images, processor):
    several = record(("a.png", "b.png"), text="<image> or <image>?")
    kept, dropped = check([record(), record((), "Just text"), several], images, processor)
    assert len(kept) == 3 and dropped == []


def test_many_faults_are_counted(images, processor):
    with pytest.raises(ValueError, match=r"8 of 8 records are faulty") as caught:
        check([record(("no.png",))] * 8, images, processor)
    assert str(caught.value).count("record ") == 5 and "and 3 more" in str(caught.value)


def test_a_programming_error_about_a_row_is_no_fault_of_it(images, monkeypatch):
    monkeypatch.setattr("train.data.records.image_first", lambda text: {}["planted"])
    with pytest.raises(KeyError, match="planted"):
        stored([record()], images)


def test_faulty_records_are_dropped_when_asked(images, processor):
    kept, dropped = check([record(("no.png",)), record(), record(text="?")], images, processor, drop_faulty=True)
    assert len(kept) == 1 and kept.record(kept.row(0))["messages"][0]["content"] == "<image>\nWhat?"
    assert [(error.row, error.kind) for error in dropped] == [(0, "missing picture"), (2, "placeholders")]


def test_what_was_corrected_is_examined_again_and_nothing_else(images, processor):
    faulty = [record(("late.png",)), record(("never.png",)), record()]
    with pytest.raises(ValueError, match="2 of 3 records are faulty"):
        check(faulty, images, processor)
    Image.new("RGB", (4, 4)).save(images / "late.png")
    (images / "a.png").unlink()  # the record was good: a second start does not examine it
    records = load_records(str(images / "data.json"), str(images))
    with pytest.raises(ValueError, match="1 of 3 records are faulty:\nrecord 1 "):
        usable_records(records, processor, 100, 0, False)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "not valid JSON"), ("{}", "must hold a list"), ("[]", "at least one")]
)
def test_broken_data_files(tmp_path, content, message):
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_records(str(path))
    with pytest.raises(FileNotFoundError, match="DATA .*nowhere.json does not exist"):
        load_records(str(tmp_path / "nowhere.json"))


def test_lines_that_cannot_be_stored_are_faulty_records(tmp_path):
    rows = [record((), "Hi \ud83d"), record((), id="\ud83d"), record(("\ud83d.png",))]
    (tmp_path / "data.jsonl").write_text("\n".join(['{"id": ' + "7" * 5000 + "}", *map(json.dumps, rows)]))
    records = load_records(str(tmp_path / "data.jsonl"))
    faults = [records.record(row)["fault"] for row in range(4)]
    assert "line 1 is not valid JSON" in faults[0] and faults[2] is None and records.record(2)["id"] == "\\ud83d"
    assert faults[1].startswith("data.jsonl, line 2: a turn's text has half of a surrogate pair")
    assert faults[3].startswith("data.jsonl, line 4: an image's name has half of a surrogate pair")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.jsonl", b"[\n{}\n]", "data.jsonl holds a list, not one object a line: name it .json.$"),
        ("data.json", b"{}\n{}", r"Extra data: .* \(one object a line is named .jsonl\).$"),
        ("data.json", "[{}]".encode("utf-16"), "data.json is not valid JSON: it is UTF-16 text"),
    ],
)
def test_a_file_of_another_form_says_what_to_do(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_records(str(tmp_path / name))


def test_lines_as_other_systems_write_them(tmp_path):
    lines = [json.dumps(record((), text), ensure_ascii=False).encode() for text in ("Größe?", "What?")]
    (tmp_path / "data.jsonl").write_bytes(codecs.BOM_UTF8 + b"\r\n\r\n".join(lines) + b"\r\n" + "ü".encode("latin-1"))
    records = load_records(str(tmp_path / "data.jsonl"))
    assert [records.record(row)["messages"][0]["content"] for row in (0, 1)] == ["Größe?", "What?"]
    assert len(records) == 3 and "line 4 is not valid JSON: 'utf-8' codec" in records.record(2)["fault"]


def test_a_turns_only_image_moves_to_its_start(images):
    turns = [record(text="Look: \n<image>"), record(("a.png", "b.png"), text="<image> or <image>?")]
    records = stored(turns, images)
    assert records.record(0)["messages"] == [
        {"role": "user", "content": "<image>\nLook:"},
        {"role": "assistant", "content": "This."},
    ]
    assert records.record(1)["messages"][0]["content"] == "<image> or <image>?"


def test_batch_of_mixed_samples(images, processor):
    records = [record(), record((), "Just text", "Fine"), record(("a.png", "b.png"), text="<image> or <image>?")]
    dataset = dataset_of(records, images, processor)
    batch = collate([dataset[i] for i in range(3)], pad_token_id=0)
    assert batch["pixel_values"].shape == (3, 3, 16, 16)
    assert (batch["input_ids"] == 3).sum(1).tolist() == [14, 0, 28]
    lengths = batch["attention_mask"].sum(1)
    assert torch.equal(batch["attention_mask"], (torch.arange(lengths.max()) < lengths[:, None]).long())
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert (batch["labels"] != -100).any(dim=1).all()
    assert "pixel_values" not in collate([dataset[1]], 0)


def test_cut_samples_are_counted_and_an_image_is_never_cut(images, processor):
    dataset = dataset_of([record(answer="long " * 50)], images, processor, 250)
    sample = dataset[0]
    assert len(sample["input_ids"]) == len(sample["labels"]) == 250 and sample["truncated"] > 0
    assert collate([sample, sample], 0)["truncated"].item() == 2
    late = record(text="word " * 40 + "<image> and <image>", images=("a.png", "b.png"))
    with pytest.raises(ValueError, match=r"record 0 \(id 'r1'\) is \d+ tokens long.* would cut an image"):
        dataset_of([late], images, processor, 390)[0]


def test_an_unreadable_image_names_its_record(images, processor):
    (images / "a.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=re.escape("record 0 (id 'r1'): cannot identify image file")):
        dataset_of([record()], images, processor)[0]


def test_a_sample_with_nothing_supervised_is_counted(images, processor):
    dataset = dataset_of([record(), record(text="<image>" + "long " * 50)], images, processor, 250)
    batch = collate([dataset[0], dataset[1]], 0)
    assert batch["unsupervised"].item() == 1 and batch["truncated"].item() == 1


def test_rows_of_every_shape_become_one_table(images):
    rows = [record(), record((), "Zwölf Boxkämpfer", id=7, model="x"), record(("a.png", "b.png"), "<image><image>")]
    records = stored(rows, images)
    assert [records.record(i)["id"] for i in range(3)] == ["r1", "7", "r1"]
    assert [records.record(i)["images"] for i in range(3)] == [["a.png"], [], ["a.png", "b.png"]]
    assert records.record(1)["messages"][0] == {"role": "user", "content": "Zwölf Boxkämpfer"}


def test_a_changed_file_is_read_again(images):
    assert len(stored([record()], images)) == 1
    assert len(stored([record()] * 3, images)) == 3


def test_images_reach_the_model_as_they_are(images, processor):
    Image.new("L", (8, 8), 200).save(images / "a.png")
    pixels = torch.as_tensor(np.array(dataset_of([record()], images, processor)[0]["pixel_values"]))
    mean, std = (torch.tensor(v) for v in (processor.image_processor.image_mean, processor.image_processor.image_std))
    assert torch.allclose(pixels[0, :, 8, 8] * std + mean, torch.full((3,), 200 / 255), atol=1e-3)
