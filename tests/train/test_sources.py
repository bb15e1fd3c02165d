import json

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PilImage

from llava_skip_base.errors import UserError
from tests.support.records import record
from train.data import load_records, read_sources

TURNS = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "This."}]
PARTS = [
    {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "This."}]},
]


@pytest.fixture
def folder(tmp_path):
    for part in ("coco", "gqa"):
        (tmp_path / part).mkdir()
        PilImage.new("RGB", (4, 4), (9, 8, 7)).save(tmp_path / part / "1.png")
    return tmp_path


def table(messages):
    features = {"images": List(Image())} if messages is TURNS else {"images": List(Value("string"))}
    images = [PilImage.new("RGB", (5, 3), (1, 2, 3))] if messages is TURNS else ["coco/1.png"]
    rows = [{"messages": messages, "images": images}] * 3
    known = Dataset.from_list([{"messages": messages}]).features
    return Dataset.from_list(rows, features=Features({**known, **features}))


def save(folder, kind, messages):
    if kind == "parquet":
        table(messages).to_parquet(folder / "set.parquet")
        return folder / "set.parquet"
    if kind == "saved":
        table(messages).save_to_disk(folder / "saved")
        return folder / "saved"
    if kind == "splits":
        DatasetDict({"train": table(messages), "test": table(messages)}).save_to_disk(folder / "splits")
        return folder / "splits"
    if kind == "folder of parquet":
        (folder / "parts").mkdir()
        table(messages).to_parquet(folder / "parts" / "train-0.parquet")
        return folder / "parts"
    rows = [{"messages": messages, "images": ["coco/1.png"]}] * 3
    text = "\n".join(map(json.dumps, rows)) if kind == "jsonl" else json.dumps(rows)
    (folder / f"data.{kind}").write_text(text)
    return folder / f"data.{kind}"


@pytest.mark.parametrize("messages", [TURNS, PARTS], ids=["text", "parts"])
@pytest.mark.parametrize("kind", ["parquet", "saved", "splits", "folder of parquet", "json", "jsonl"])
def test_messages_and_images_of_every_kind_of_set(folder, kind, messages):
    records = load_records(str(save(folder, kind, messages)), str(folder))
    assert len(records) == 3
    found = records.record(2)
    assert found["messages"] == TURNS and found["fault"] is None
    image = records.images_of(2).open(found["images"][0])
    inside = messages is TURNS and kind not in ("json", "jsonl")
    assert image.mode == "RGB" and image.getpixel((0, 0)) == ((1, 2, 3) if inside else (9, 8, 7))


def test_a_broken_line_is_a_faulty_record(folder):
    (folder / "data.jsonl").write_text(json.dumps(record()) + "\n{broken\n\n" + json.dumps(record()) + "\n")
    records = load_records(str(folder / "data.jsonl"))
    assert [bool(records.record(i)["fault"]) for i in range(len(records))] == [False, True, False]
    assert records.record(1)["fault"].startswith("data.jsonl, line 2 is not valid JSON")


def mixture(folder, text):
    (folder / "a.json").write_text(json.dumps([record((f"coco/{i}.png",), id=f"a{i}") for i in range(10)]))
    (folder / "b.jsonl").write_text("\n".join(json.dumps(record((), "Hi", id=f"b{i}")) for i in range(4)))
    (folder / "mix.yaml").write_text(text)
    return str(folder / "mix.yaml")


def test_a_mixture_reads_its_sources_by_weight(folder):
    path = mixture(folder, "sources:\n  a: {path: a.json, images: ., weight: 0.5}\n  b: {path: b.jsonl, weight: 2.5}\n")
    records, again = load_records(path), load_records(path)
    names = [records.record(records.row(i))["id"] for i in range(len(records))]
    assert names == [again.record(again.row(i))["id"] for i in range(len(again))]
    assert len({n for n in names if n[0] == "a"}) == sum(n[0] == "a" for n in names) == 5
    assert sorted(names.count(f"b{i}") for i in range(4)) == [2, 2, 3, 3]
    row = records.row(len(records) - 1)
    assert records.describe(row, records.record(row)).startswith("record 3 of b (id 'b")
    assert set(records.used_rows) == set(records.rows) and records.fingerprint == again.fingerprint


def test_another_weight_or_image_folder_is_another_set(folder):
    variants = ["weight: 1", "weight: 2", "images: coco", "images: gqa"]
    prints = [load_records(mixture(folder, f"sources: {{a: {{path: a.json, {v}}}}}")).fingerprint for v in variants]
    assert len(set(prints)) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sources: [", "not valid YAML"),
        ("a: 1", "must hold `sources:` alone"),
        ("sources: {a: {path: a.json, wieght: 2}}", r"the unknown fields \['wieght'\]; known fields are path, images"),
        ("sources: {a: a.json}", "source 'a' has no fields, but 'a.json'"),
        ("sources: {a: {weight: 1}}", "source 'a' has no path"),
        ("sources: {a: {path: a.json, weight: 0}}", "has the weight 0; it must be between"),
        ("sources: {a: {path: none.json}}", "none.json does not exist"),
        ("sources: {a: {path: a.json, images: nowhere}}", "IMAGES .*nowhere does not exist"),
        ("sources: {a: {path: a.json, images: {coco: coco, gqa: nowhere}}}", "IMAGES .*nowhere does not exist"),
        ("sources: {a: {path: a.json, images: [coco]}}", r"has the images \['coco'\]; give a path"),
        ("sources: {a: {path: data/a.json}}", "data/a.json does not exist"),
        ("sources: {a: {path: a.json, renames: none.json}}", "none.json does not exist"),
        ("sources: {a: {path: a.json, weight: 0.01}}", "has no records"),
        ("sources: {a: {path: mix.yaml}}", "of an unknown kind"),
        ("sources: {a: {path: coco}}", "a folder, but neither saved by `datasets`"),
    ],
)
def test_mistakes_in_a_mixture(folder, text, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_records(mixture(folder, text))


def test_images_by_first_component_and_new_names(folder):
    (folder / "renames.json").write_text('{"old.png": "1.png"}')
    path = mixture(
        folder,
        "sources: {a: {path: a.json, images: {coco: coco, ocr: gqa}, renames: {ocr: renames.json}}}",
    )
    images = load_records(path).images_of(0)
    assert images.path("coco/1.png") == folder / "coco/1.png"
    assert images.path("ocr/old.png") == folder / "gqa/1.png"
    assert images.path("coco/old.png") == folder / "coco/old.png"  # only in its own part
    with pytest.raises(ValueError, match=r"starts with 'vg', which has no folder; known: \['coco', 'ocr'\]"):
        images.path("vg/1.png")
    for name in ("coco/../gqa/1.png", "coco//etc/passwd"):
        with pytest.raises(ValueError, match="leaves the image folder"):
            images.path(name)


def test_a_folder_map_as_a_json_file(folder):
    (folder / "a.json").write_text(json.dumps([record(("coco/1.png",))]))
    (folder / "image_folder.json").write_text(json.dumps({"coco": str(folder / "gqa")}))
    images = load_records(str(folder / "a.json"), str(folder / "image_folder.json")).images_of(0)
    assert images.path("coco/1.png") == folder / "gqa/1.png"
    with pytest.raises(ValueError, match="--images does not go with"):
        load_records(mixture(folder, "sources: {a: {path: a.json}}"), str(folder))


def test_a_tilde_is_the_home_folder_everywhere(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    (folder / "renames.json").write_text('{"old.png": "1.png"}')
    (folder / "folders.json").write_text('{"coco": "~/gqa"}')
    mixture(folder, "sources: {a: {path: ~/a.json, images: ~/coco, renames: ~/renames.json}}")
    assert load_records("~/mix.yaml").images_of(0).path("old.png") == folder / "coco/1.png"
    mapped = mixture(folder, "sources: {a: {path: ~/a.json, images: {coco: ~/gqa}}}")
    for records in (load_records(mapped), load_records("~/a.json", "~/folders.json")):
        assert records.images_of(0).path("coco/1.png") == folder / "gqa/1.png"
    assert load_records("~/a.json", "~/gqa").images_of(0).path("1.png") == folder / "gqa/1.png"


def test_a_hub_name_stays_one_beside_a_mixture(folder):
    path = mixture(folder, "sources: {a: {path: owner/name-v1.5}}")
    assert read_sources(path)[0].path == "owner/name-v1.5"
    with pytest.raises(UserError, match="DATA owner/nothing cannot be read"):
        load_records("owner/nothing")


@pytest.mark.parametrize(("name", "content"), [("set.parquet", "no parquet"), ("saved/dataset_info.json", "{")])
def test_a_broken_set_is_one_message(folder, name, content):
    (folder / "saved").mkdir()
    (folder / name).write_text(content)
    with pytest.raises(UserError, match="cannot be read"):
        load_records(str(folder / name.split("/")[0]))


def test_a_set_saved_again_is_another_set(folder):
    """The reader's own cache has no part in it: `datasets` maps the files of the folder."""
    path, prints = folder / "saved", []
    for count in (2, 3):
        table(TURNS).select(range(count)).save_to_disk(path)
        prints.append(load_records(str(path)).fingerprint)
    assert prints[0] != prints[1]


def test_dropped_rows_leave_every_copy(folder):
    records = load_records(mixture(folder, "sources: {b: {path: b.jsonl, weight: 2}}"))
    kept = records.without([1, 3])
    assert np.array_equal(kept.rows, [0, 2, 0, 2]) and len(records) == 8
