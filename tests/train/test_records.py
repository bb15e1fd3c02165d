"""Rows of every form as records: what changes their meaning is honoured or refused, never left out in silence."""

import base64
import io
import json
from pathlib import Path

import pytest
from datasets import Dataset
from PIL import Image

from tests.support.conversations import TURNS
from tests.support.records import record, stored
from train.data import ConversationDataset, load_records, unread_columns, usable_records
from train.data.records import find_fault, normalise
from train.data.turns import read_image
from train.reporting.result import show_result

CASES = Path(__file__).parents[1] / "cases"


def turns(*texts, **fields):
    speakers = ("human", "gpt")
    return [{"from": speakers[i % 2], "value": text, **fields} for i, text in enumerate(texts)]


def uri(size=(3, 2), colour=(9, 8, 7), head="data:image/png;base64,"):
    Image.new("RGB", size, colour).save(content := io.BytesIO(), "PNG")
    return head + base64.b64encode(content.getvalue()).decode()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"video": "a.mp4"}, "'video' cannot be trained on"),
        ({"videos": ["a.mp4"]}, "'videos' cannot be trained on"),
        ({"audio": {"path": "a.wav"}}, "'audio' cannot be trained on"),
        ({"audios": ["a.wav"]}, "'audios' cannot be trained on"),
        ({"conversations": turns("<video>\nWhat?", "Hi")}, "<video> cannot be trained on"),
        ({"conversations": turns("Hi", "<audio>")}, "<audio> cannot be trained on"),
        ({"system": 3}, "'system' must be a string, not 3"),
        ({"system": "A", "conversations": [{"from": "system", "value": "B"}, *turns("Hi", "Yo")]}, "different texts"),
        ({"conversations": turns("Hi", "Yo", weight=0.5)}, "'weight' must be 0 or 1, or true or false, not 0.5"),
        ({"conversations": turns("Hi", "Yo", loss="false")}, "'loss' must be 0 or 1"),
        ({"conversations": turns("Hi", "Yo", train=True)}, "the role \"user\" has 'train': true"),
    ],
)
def test_what_would_change_the_meaning_is_refused_by_name(row, message):
    fault = normalise({"id": "x", "conversations": turns("Hi", "Yo"), **row})["fault"]
    assert message in (fault or "nothing")


@pytest.mark.parametrize("kind", ["video", "video_url", "input_audio", "audio", "tool_use", 7])
def test_parts_of_other_media_are_refused_by_name(kind):
    parts = [{"type": "text", "text": "What?"}, {"type": kind, kind: {"url": "a.mp4"}}]
    fault = normalise({"messages": [{"role": "user", "content": parts}]})["fault"]
    assert fault == f"a part of the type {json.dumps(kind)} cannot be trained on, only text and images"


def test_empty_columns_of_other_media_and_closed_tags_do_no_harm():
    row = {
        "video": None,
        "videos": [],
        "audio": "",
        "conversations": turns("Explain <video src=x></video>", "A <video></video> tag"),
    }
    assert normalise(row)["fault"] is None


@pytest.mark.parametrize("answer", ["Use the <video> tag.", "Write `<audio>`, not `<video>`.", "<video> b </video>"])
def test_an_answer_may_name_a_tag(answer):
    assert normalise({"conversations": turns("How?", answer)})["fault"] is None
    assert normalise({"conversations": turns("How?", f"{answer} <video>")})["fault"]  # at the end: a marker


def test_a_question_may_name_a_tag_but_not_begin_with_a_marker():
    for question in ("How do I style the <video> tag?", "Is `<audio>` allowed?", "List all <video> elements"):
        assert normalise({"conversations": turns(question, "So.")})["fault"] is None
    for question in ("<video>\nWhat happens?", "What happens in <video>?", "<video> What is this tag?"):
        assert normalise({"conversations": turns(question, "So.")})["fault"]


@pytest.mark.parametrize("system", ["Answer like a pirate.", "", None, " "])
def test_a_records_own_system_text_comes_first(system):
    found = normalise({"system": system, "conversations": turns("Hi", "Yo")})
    own = [{"role": "system", "content": system}] if system and system.strip() else []
    assert found["messages"] == [*own, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    assert found["unread"] == []


def test_a_system_text_in_both_places_is_one():
    found = normalise({"system": "S", "conversations": [{"from": "system", "value": "S"}, *turns("Hi", "Yo")]})
    assert [message["role"] for message in found["messages"]] == ["system", "user", "assistant"]


def supervised_text(sample, processor):
    return processor.tokenizer.decode([label for label in sample["labels"] if label != -100])


@pytest.mark.parametrize("mark", [{"weight": 0}, {"loss": False}, {"train": False}, {"weight": 0.0, "loss": True}])
@pytest.mark.parametrize("own_template", [False, True])
def test_marked_answers_are_not_supervised(images, processor, mark, own_template):
    conversation = turns("Hi", "Yo", "Hey", "Ho")
    conversation[1] |= mark
    records = stored([{"id": 15, "conversations": conversation}], images)
    if own_template:
        processor.chat_template = processor.chat_template.replace("{%- generation -%}", "").replace(
            "{%- endgeneration -%}", ""
        )
    sample = ConversationDataset(records, processor, 2048)[0]
    assert supervised_text(sample, processor).strip() == "Ho</s>"
    whole = stored([{"conversations": turns("Hi", "Yo", "Hey", "Ho")}], images)
    assert ConversationDataset(whole, processor, 2048)[0]["input_ids"] == sample["input_ids"]


def test_a_template_that_does_not_mark_each_answer_cannot_leave_one_out(processor):
    processor.chat_template = "{% generation %}{{ messages[1].content }}{{ messages[3].content }}{% endgeneration %}"
    messages = [dict(turn) for turn in TURNS]
    messages[1]["supervised"] = False
    with pytest.raises(ValueError, match="1 supervised texts for 2 answers"):
        processor.tokenize_conversation(messages)


def test_a_record_without_an_answer_to_learn_is_found_before_training():
    found = normalise({"conversations": turns("Hi", "Yo", weight=0)})
    assert find_fault(found, 10, 100).kind == "nothing learnt"


def test_columns_that_nothing_reads_are_counted(images, processor):
    rows = [
        {"id": 1, "model": "x", "score": None, "conversations": turns("Hi", "Yo", emotion="glad")},
        {"id": 2, "model": "y", "\ud83d" * 99: 1, "messages": TURNS[2:], "conversations": []},
        record(("gone.png",), source="web"),
    ]
    records = stored(rows, images)
    kept, dropped = usable_records(records, processor, 2048, 0, True)
    counts = unread_columns(records, processor, 2048)
    assert len(kept) == 2 and len(dropped) == 1
    assert list(counts.items())[0] == ("model", 2)
    assert {name: counts[name] for name in ("conversations[].emotion", "conversations", "source")} == {
        "conversations[].emotion": 1, "conversations": 1, "source": 1,
    }  # fmt: skip
    assert "score" not in counts and len(counts) == 5 and all(len(name) < 100 for name in counts)


@pytest.mark.parametrize(
    ("columns", "samples", "shown"),
    [
        ({"model": 1200, "a": 3, "b": 2, "c": 1, "d": 1}, 9.0, "model in 1,200, a in 3, b in 2, c in 1 and 1 more"),
        ({}, 7.0, "in 7 samples"),  # of a stream
        ({}, 0.0, "none"),
    ],
)
def test_the_closing_table_names_columns_that_nothing_reads(tmp_path, capsys, columns, samples, shown):
    numbers = dict.fromkeys(("steps", "final_loss", "tokens_per_second", "samples_per_second", "seconds"), 1.0)
    rest = {"skipped_ffn_share": 0.5, "truncated": 0.0, "preset": "p", "unread": samples, "unread_columns": columns}
    show_result(numbers | rest, tmp_path)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "columns that nothing reads" in line]
    assert f" {shown} " in line


def test_columns_of_other_tables_are_counted_too(images, processor):
    Dataset.from_list([{"messages": TURNS[2:], "model": "x"}, {"messages": TURNS[2:], "model": None}]).to_parquet(
        images / "set.parquet"
    )
    records = load_records(str(images / "set.parquet"))
    usable_records(records, processor, 2048, 0, False)
    assert unread_columns(records, processor, 2048) == {"model": 1}


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "bot", "value": "Yo"}]},
        {"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]},
        {"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Yo"}]},
        {"messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
        {"messages": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}], "from": None, "value": None},
                      {"role": "assistant", "content": [{"type": "output_text", "text": "Yo"}]}]},
    ],
)  # fmt: skip
def test_turns_of_every_form(row):
    found = normalise(row)
    assert found["messages"] == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    assert find_fault(found, 10, 100) is None and found["unread"] == []


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}},
        {"type": "image_url", "image_url": "a.png"},
        {"type": "input_image", "image_url": "a.png"},
        {"type": "image", "image": "a.png"},
        {"type": "image", "image": "file://a.png"},
        {"type": "image", "path": "a.png", "text": None},
        {"type": "image", "url": "a.png"},
        {"type": "image", "image": {"bytes": None, "path": "a.png"}},
    ],
)
def test_an_image_part_names_its_image(part):
    content = [{"type": "text", "text": "How many?"}, part]
    found = normalise({"messages": [{"role": "user", "content": content}, TURNS[1]]})
    assert (found["images"], found["fault"]) == (["a.png"], None)
    assert found["messages"][0]["content"] == "How many?<image>\n"


def test_images_of_parts_and_of_a_column():
    named, bare = {"type": "image", "path": "a.png"}, {"type": "image"}

    def found(parts, **columns):
        return normalise({"messages": [{"role": "user", "content": parts}, TURNS[1]], **columns})

    assert found([named, {"type": "image", "path": "b.png"}])["images"] == ["a.png", "b.png"]
    assert found([bare], images=["a.png"])["images"] == ["a.png"]
    assert found([named], images=["a.png"])["images"] == ["a.png"]
    assert found([{"type": "text", "text": "<image>\n"}], images=["a.png"])["images"] == ["a.png"]
    for parts, columns in (([named], {"images": ["b.png"]}), ([named, bare], {}), ([named, bare], {"image": "b.png"})):
        assert "either all in the parts" in found(parts, **columns)["fault"]


@pytest.mark.parametrize("address", ["https://x.org/a.png", "http://x.org/a.png", "s3://b/a.png", "HTTPS://x.org/a"])
def test_addresses_are_refused_by_name(address):
    for row in ({"image": address}, {"images": [{"path": address}]}):
        fault = normalise({"conversations": turns("<image>", "Yo"), **row})["fault"]
        assert address[:10] in fault and "is an address: download it" in fault


@pytest.mark.parametrize("head", ["data:image/png;base64,", "data:image/jpeg;charset=utf-8;base64,", "DATA:;BASE64,"])
def test_data_uris_are_images(images, processor, head):
    text = uri(head=head)
    parts = [{"type": "image_url", "image_url": {"url": text}}]
    rows = [record((text,)), {"messages": [{"role": "user", "content": parts}, TURNS[1]]}]
    records = stored(rows, images)
    assert usable_records(records, processor, 2048, 0, False)[1] == []
    for row in range(2):
        image = records.images_of(row).open(records.record(row)["images"][0])
        assert (image.size, image.getpixel((0, 0))) == ((3, 2), (9, 8, 7))


def test_base64_without_its_head_in_a_part_that_says_so():
    part = {"type": "image", "base64": uri().partition(",")[2]}
    (image,) = normalise({"messages": [{"role": "user", "content": [part]}, TURNS[1]]})["images"]
    assert image == f"data:;base64,{part['base64']}"


@pytest.mark.parametrize(
    "row",
    [
        {"id": "i" * 5000, "conversations": turns("Hi", "Yo"), "image": "n" * 5000},
        {"id": [["x" * 5000]], "conversations": turns("Hi", "Yo"), "image": "a/" + "../" * 3000},
        {"id": 1, "conversations": [{"from": "r" * 5000, "value": "Hi"}]},
        {"id": 1, "conversations": turns(*["Hi"] * 3001)},
        {"id": 1, "conversations": turns("<image>", "Yo"), "image": "data:image/png;base64," + "iVBO" * 5000},
        {"id": 1, "conversations": turns("<image>", "Yo"), "image": "data:image/png," + "iVBO" * 5000},
        {"id": 1, "conversations": turns("<image>", "Yo"), "image": "https://" + "x" * 5000},
        {"id": 1, "messages": [{"role": "user", "content": [{"type": "t" * 5000}]}]},
        {"id": 1, "conversations": turns("Hi", "Yo", weight="w" * 5000)},
        ["x" * 5000],
    ],
)
def test_no_message_is_long(images, processor, row):
    with pytest.raises(ValueError) as caught:
        records, _ = usable_records(stored([row], images), processor, 2048, 0, False)
        ConversationDataset(records, processor, 2048)[0]
    assert len(str(caught.value)) < 1000


def test_the_cases_from_outside():
    """Files that users reported: what each holds is what its record says."""
    folder = CASES / "json"
    records = {path.stem: load_records(str(path), str(CASES / "pictures")) for path in sorted(folder.iterdir())}
    assert [records["lone_surrogate"].record(row)["fault"] is None for row in range(3)] == [True, False, True]
    assert records["id_int64_plus"].record(0)["id"] == "18446744073709551615"
    assert records["other_column_nan"].record(0)["fault"] is None
    assert [records["video_marker"].record(row)["fault"] is None for row in range(2)] == [True, False]
    assert records["system_column"].record(0)["messages"][0] == {"role": "system", "content": "Answer like a pirate."}
    assert [message.get("supervised") for message in records["weights"].record(0)["messages"]] == [
        None,
        False,
        None,
        None,
    ]
    assert records["openai_image_url"].record(0)["images"] == ["ok.png"]
    assert records["image_data_uri"].record(0)["fault"] is None


def test_an_image_without_a_name_is_refused():
    for image in ({}, {"bytes": b""}, 7, [], ""):
        with pytest.raises(ValueError, match="an image must be a file name"):
            read_image(image)
