"""LLaVA's records, and files of them."""

import json

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
