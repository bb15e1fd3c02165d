"""Damaged data sets and images: nothing but a named fault comes out. `FUZZ_ROUNDS` makes it longer."""

import base64
import gzip
import io
import json
import os
import random

import numpy as np
import pytest
from PIL import Image

from eval.reading.images import ImageSource
from llava_skip.vision.rgb import load_rgb
from llava_skip_base.errors import UserError
from llava_skip_base.images import FORMATS, ImageError
from tests.support.records import record
from train.data.json_items import json_items
from train.data.records import find_fault, normalise

ROUNDS = int(os.environ.get("FUZZ_ROUNDS", "1"))
TOKENS = [b'"', b"[", b"]", b"{", b"}", b",", b":", b"\\", b"\\ud83d", b"NaN", b"1e999", b"\xff", b"\n", b"\0", b"-"]
TOKENS += [b"9" * 5000, b"[" * 300, b'{"id":' * 200, b"null", b"\xef\xbb\xbf", "😀".encode(), b"//", b"true"]


def damaged(content: bytes, chance: random.Random) -> bytes:
    """The content with a few bytes changed, cut out, doubled or put in."""
    changed = bytearray(content)
    for _ in range(chance.randint(1, 6)):
        place = chance.randrange(len(changed) + 1)
        kind = chance.randrange(5)
        if kind == 0 and place < len(changed):
            changed[place] = chance.randrange(256)
        elif kind == 1:
            del changed[place : place + chance.randint(1, 40)]
        elif kind == 2:
            changed[place:place] = changed[place : place + chance.randint(1, 60)]
        elif kind == 3:
            changed[place:place] = chance.choice(TOKENS)
        else:
            changed[place : place + 4] = chance.randbytes(4)
    return bytes(changed) if chance.random() < 0.9 else bytes(changed[: chance.randrange(len(changed) + 1)])


def files() -> dict[str, bytes]:
    rows = [record(), record((), "Grüße 😀", id=7, system="S", score=1.5), {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "This.", "weight": 0}]}, record(("a.png", "b.png"), model=None)]  # fmt: skip
    lines = "\n".join(map(json.dumps, rows)).encode()
    listed = json.dumps(rows, ensure_ascii=False, indent=1).encode()
    return {"a.json": listed, "a.jsonl": lines, "b.json.gz": listed, "b.jsonl.gz": lines}


@pytest.mark.parametrize("name", files())
def test_json_files(tmp_path, name):
    chance, path, content = random.Random(name), tmp_path / name, files()[name]
    seen = {"item": 0, "fault": 0, "file": 0}
    for _ in range(200 * ROUNDS):
        broken = damaged(content, chance)
        if name.endswith(".gz"):
            broken = gzip.compress(broken) if chance.random() < 0.5 else damaged(gzip.compress(content), chance)
        path.write_bytes(broken)
        try:
            items = list(json_items(path))
        except UserError as error:
            assert len(str(error)) < 600
            seen["file"] += 1
            continue
        for item in items:
            made = normalise(item.value) if item.fault is None else None
            fault = item.fault if made is None else made["fault"] or find_fault(made, 10, 2048)
            json.dumps(made, ensure_ascii=False).encode()
            assert fault is None or len(str(fault)) < 800
            seen["fault" if fault else "item"] += 1
    assert min(seen["item"], seen["fault"] + seen["file"]) > 0, seen


def any_value(chance: random.Random, depth: int = 0):
    """A value of any kind, often with the names that records have."""
    names = ["id", "image", "images", "conversations", "messages", "from", "value", "role", "content", "type", "text",
             "image_url", "url", "path", "bytes", "system", "weight", "loss", "train", "video", "audio"]  # fmt: skip
    texts = ["", "human", "gpt", "user", "assistant", "bot", "system", "<image>", "<video>", "\ud83d", "a" * 3000,
             "data:image/png;base64,AAAA", "data:", "https://x", "image", "image_url", "text", "\0"]  # fmt: skip
    kind = chance.randrange(9 if depth < 5 else 5)
    if kind == 0:
        return chance.choice(texts)
    if kind == 1:
        return chance.choice([None, True, False, 0, 1, -1, 2**70, 1.5, float("nan"), float("inf")])
    if kind == 2:
        return chance.choice(texts) + chance.choice(texts)
    if kind < 5:
        return chance.choice([record(), [], {}, b"", b"abc"])
    if kind < 7:
        return [any_value(chance, depth + 1) for _ in range(chance.randrange(4))]
    return {chance.choice(names): any_value(chance, depth + 1) for _ in range(chance.randrange(6))}


def test_rows_of_any_kind():
    chance, good = random.Random(5), 0
    for _ in range(6000 * ROUNDS):
        row = any_value(chance)
        if isinstance(row, dict) and chance.random() < 0.7:
            row = record() | row
        made = normalise(row)
        fault = made["fault"] or find_fault(made, 10, 2048)
        good += fault is None
        assert len(str(fault)) < 800 and set(made) == {"id", "messages", "images", "fault", "unread"}
    assert good > 50


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", sorted(set(FORMATS) - {"DIB"}))
def test_images_of_each_format(kind):
    chance = random.Random(kind)
    pixels = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[274], exif[270], exif[36867] = 6, "x", "2020:01:01"
    variants = []
    for mode in ("RGB", "L") if kind in ("JPEG", "JPEG2000", "PPM") else ("RGB", "P", "L"):
        content = io.BytesIO()
        options = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF") else {}
        Image.fromarray(pixels).convert(mode).save(content, kind, **options)
        variants.append(content.getvalue())
    outcomes = {"read": 0, "fault": 0}
    for number in range((60 if kind == "AVIF" else 150) * ROUNDS):
        content = damaged(variants[number % len(variants)], chance)
        try:
            image = load_rgb(content)
            assert image.mode == "RGB"
            outcomes["read"] += 1
        except ImageError as error:
            assert len(str(error)) < 300
            outcomes["fault"] += 1
    assert outcomes["fault"] > 0, outcomes


def test_data_uris_and_benchmark_cells():
    chance, content = random.Random(9), io.BytesIO()
    Image.new("RGB", (5, 4)).save(content, "PNG")
    plain = base64.b64encode(content.getvalue()).decode()
    for _ in range(800 * ROUNDS):
        text = (
            chance.choice(["data:image/png;base64,", "", "['", "["]) + plain + chance.choice(["", "']", "]", "','x']"])
        )
        text = damaged(text.encode(), chance).decode("latin-1")
        for read, given in ((_read_cell, text), (load_rgb, f"data:{text}")):
            try:
                read(given)
            except UserError as error:
                assert len(str(error)) < 400


def _read_cell(text: str) -> None:
    ImageSource("sample 1", text).open()
