"""LLaVA's records, and files of them."""

import json

from tests.support.conversations import byte_tokenizer, random_image
from train.data import load_records


def record(images=("a.png",), text="<image>\nWhat?", answer="This.", **more):
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    entry = {"id": "r1", "conversations": turns, **more}
    if images:
        entry["image"] = images[0] if len(images) == 1 else list(images)
    return entry


def stored(records, images, name="data.json"):
    (images / name).write_text(json.dumps(records), encoding="utf-8")
    return load_records(str(images / name), str(images))


def write_set(folder, images):
    """A tokenizer, so many small images, and `data.json` with a record about each and one of text after it."""
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    records = []
    for number in range(images):
        random_image(20, 20, seed=number).save(folder / f"{number}.png")
        records.append(record((f"{number}.png",), answer=f"Number {number}. " * (number % 4 + 1)))
        records.append(record((), f"Question {number}?", f"Answer {number}."))
    (folder / "data.json").write_text(json.dumps(records))
    return folder
