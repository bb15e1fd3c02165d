import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_skip.vision.rgb import to_rgb
from llava_skip_base.errors import UserError
from tests.support.conversations import byte_tokenizer
from tests.support.records import record
from train.arguments import DataArguments, ModelArguments
from train.data import ConversationDataset, RecordError, load_records, usable_records
from train.data.checks import FullCheck
from train.recipe.model import prepare
from train.validate_data import main, validate


def broken_png(path):
    Image.new("RGB", (64, 64), "red").save(path)
    path.write_bytes(path.read_bytes()[:-40])


def bomb(path):
    Image.new("1", (20_000, 10_000)).save(path)


IMAGES = {  # file -> how it is made, kinds that are found
    "good.png": (lambda p: Image.new("RGB", (9, 7)).save(p), set()),
    "text.png": (lambda p: p.write_text("no image"), {"unreadable picture"}),
    "empty.jpg": (lambda p: p.write_bytes(b""), {"unreadable picture"}),
    "cut.png": (broken_png, {"unreadable picture"}),
    "bomb.png": (bomb, {"picture of too many pixels"}),
    "large.png": (lambda p: Image.new("1", (10_000, 9_000)).save(p), {"picture of many pixels"}),
    "one.png": (lambda p: Image.new("RGB", (1, 1)).save(p), {"picture of 1 pixel"}),
    "cmyk.jpg": (lambda p: Image.new("CMYK", (9, 7)).save(p), {"CMYK converted"}),
    "deep.png": (lambda p: Image.fromarray(np.full((4, 4), 9999, np.uint16)).save(p), {"16-bit greys scaled"}),
    "palette.gif": (lambda p: Image.new("P", (9, 7)).save(p), {"palette converted"}),
    "clear.png": (lambda p: Image.new("RGBA", (9, 7), (0, 0, 0, 0)).save(p), {"transparency on white"}),
    "lab.tif": (lambda p: Image.new("LAB", (9, 7)).save(p), set()),
    "turned.jpg": (lambda p: Image.new("RGB", (9, 7)).save(p, exif=turned()), {"turned upright"}),
}


def turned(orientation=6):
    exif = Image.Exif()
    exif[274] = orientation
    return exif


def arguments(tmp_path, records, **data):
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "data.json").write_text(json.dumps(records))
    model = ModelArguments(tokenizer=str(tmp_path / "tokenizer"), template="v1", preset="sv-llava-100")
    return model, DataArguments(data=str(tmp_path / "data.json"), images=str(tmp_path), **data)


def test_every_kind_of_image(tmp_path):
    for name, (make, _) in IMAGES.items():
        make(tmp_path / name)
    findings = validate(*arguments(tmp_path, [record((name,)) for name in IMAGES]))
    expected = [kind for _, kinds in IMAGES.values() for kind in kinds]
    assert findings.counts == {kind: expected.count(kind) for kind in expected}
    assert [f.row for f in findings.errors] == [1, 2, 3, 4]
    assert findings.samples == len(IMAGES) - 4 and findings.images == len(IMAGES)


def test_what_validates_trains(tmp_path):
    """Also photos with odd EXIF data, and strips that some image processors would make huge."""
    pictures = Path(__file__).parents[1] / "cases" / "pictures"
    for side, faulty in ((56, set()), (336, {"strip.png"})):
        records = [record((str(file),), id=file.name) for file in sorted(pictures.iterdir())]
        model, data = arguments(tmp_path, records)
        records, processor = load_records(data.data), prepare(model)[1]
        processor.image_processor.do_pad = False
        processor.image_processor.size = {"shortest_edge": side}
        check, dataset = FullCheck(records, processor, 2048), ConversationDataset(records, processor, 2048)
        for row in range(len(records)):
            found = [finding for finding in check(row).findings if finding.is_error]
            name = records.record(row)["id"]
            assert [(f.kind, "on its shorter side" in f.text) for f in found] == (
                [("picture of too many pixels", True)] if name in faulty else []
            )
            if found:
                with pytest.raises(RecordError, match=f"{name}.* 1 x 6000 pixels"):
                    dataset[row]
            elif name != "strip.png":  # takes a second
                assert dataset[row]["pixel_values"] is not None


def test_what_the_limit_cuts(tmp_path):
    IMAGES["good.png"][0](tmp_path / "good.png")
    records = [
        record(("good.png",)),
        record(("good.png",), answer="long " * 40),
        record(("good.png",), text="<image>" + "long " * 40),
        record((), "word " * 40, ""),
        record(("good.png",) * 2, text="word " * 40 + "<image> and <image>"),
    ]
    findings = validate(*arguments(tmp_path, records, max_length=260))
    found = {f.row: (f.kind, f.text) for f in findings.offenders}
    model, data = arguments(tmp_path, records, max_length=260)
    dataset = ConversationDataset(load_records(data.data, data.images), prepare(model)[1], 2048)
    lengths = [len(sample["input_ids"]) for sample in dataset]
    lost = lengths[1] - 260  # all of it in the answer
    assert found[1] == ("longer than the limit", f"{lengths[1]} tokens; {lost} would be cut, {lost} of them supervised")
    assert found[2][0] == "nothing learnt" and found[4][0] == "picture would be cut"
    assert findings.counts["empty answer"] == 1 and 0 not in found
    assert (findings.tokens, findings.longest) == (sum(lengths), max(lengths))
    assert findings.supervised == sum(sum(label != -100 for label in sample["labels"]) for sample in dataset)


def test_a_sample_whose_first_token_alone_is_supervised_has_nothing_to_learn(tmp_path):
    """Labels shift: no token predicts the first one."""
    model, data = arguments(tmp_path, [record((), "Question?", "Answer.")])
    processor = prepare(model)[1]
    processor.chat_template = "{% generation %}{{ bos_token }}{% endgeneration %}{{ messages[0].content }}"
    check = FullCheck(load_records(data.data), processor, 2048)
    _, supervised = processor.tokenize_conversation(check.records.record(0)["messages"])
    assert supervised.nonzero()[0].tolist() == [0]
    (finding,) = check(0).findings
    assert (finding.kind, check(0).measure.supervised) == ("nothing learnt", 0)


def test_a_template_that_leaves_an_image_out_is_a_finding(tmp_path):
    IMAGES["good.png"][0](tmp_path / "good.png")
    model, data = arguments(tmp_path, [record(("good.png",))])
    records, processor = load_records(data.data, data.images), prepare(model)[1]
    processor.chat_template = "{% generation %}{{ messages[1].content }}{% endgeneration %}"
    (finding,) = FullCheck(records, processor, 2048)(0).findings
    assert (finding.kind, finding.text) == ("refused by the template", "the template shows 0 of 1 images")
    with pytest.raises(RecordError, match="record 0 .* shows 0 of 1 images"):
        ConversationDataset(records, processor, 2048)[0]


@pytest.mark.parametrize("place", ["checks.image_notes", "checks._examine_text", "measure._image_length"])
def test_a_programming_error_in_a_check_keeps_its_traceback(tmp_path, monkeypatch, place):
    def planted(*_):
        for _faulty, _unpacking in [(1,)]:
            pass

    IMAGES["good.png"][0](tmp_path / "good.png")
    model, data = arguments(tmp_path, [record(("good.png",))])
    monkeypatch.setattr(f"train.data.{place}", planted)
    line = ["--data", data.data, "--images", data.images, "--tokenizer", model.tokenizer, "--template", "v1"]
    monkeypatch.setattr(sys, "argv", ["validate_data", *line])
    with pytest.raises(ValueError, match="not enough values to unpack") as caught:
        main()
    assert caught.traceback[-1].name == "planted" and not isinstance(caught.value, UserError)


def test_training_uses_the_findings(tmp_path):
    for name in ("good.png", "text.png"):
        IMAGES[name][0](tmp_path / name)
    model, data = arguments(tmp_path, [record(("good.png",)), record(("text.png",))])
    records, processor = load_records(data.data, data.images), prepare(model)[1]
    kept, _ = usable_records(records, processor, 2048, 0, False)  # without findings images are not opened
    assert len(kept) == 2
    validate(model, data)
    with pytest.raises(ValueError, match="record 1 .* the image text.png: cannot identify image file"):
        usable_records(records, processor, 2048, 0, False)
    kept, dropped = usable_records(records, processor, 2048, 0, True)
    assert len(kept) == 1 and dropped[0].kind == "unreadable picture"
    IMAGES["good.png"][0](tmp_path / "text.png")
    assert len(usable_records(records, processor, 2048, 0, False)[0]) == 2


@pytest.mark.parametrize(
    ("image", "pixel"),
    [
        (Image.fromarray(np.full((2, 3), 257 * 50, np.uint16)), (50, 50, 50)),
        (Image.fromarray(np.full((2, 3), 40.0, np.float32)), (40, 40, 40)),
        (Image.new("RGBA", (3, 2), (0, 0, 0, 0)), (255, 255, 255)),
        (Image.new("LA", (3, 2), (0, 255)), (0, 0, 0)),
        (Image.new("CMYK", (3, 2)), (255, 255, 255)),
        (Image.new("1", (3, 2), 1), (255, 255, 255)),
    ],
)
def test_images_become_rgb_as_intended(image, pixel):
    found = to_rgb(image)
    assert (found.mode, found.size) == ("RGB", (3, 2)) and found.getpixel((0, 0)) == pixel


def test_palette_transparency_and_turning(tmp_path):
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([9, 9, 9, 7, 8, 9])
    palette.putpixel((0, 0), 0)
    palette.save(tmp_path / "p.png", transparency=0)
    found = to_rgb(Image.open(tmp_path / "p.png"))
    assert [found.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (7, 8, 9)]
    wide = Image.new("RGB", (2, 1))
    wide.putpixel((0, 0), (200, 0, 0))
    wide.save(tmp_path / "t.png", exif=turned(6))
    upright = to_rgb(Image.open(tmp_path / "t.png"))
    assert upright.size == (1, 2) and upright.getpixel((0, 0)) == (200, 0, 0)


@pytest.mark.parametrize(("faulty", "code"), [(True, 1), (False, 0), (None, 2)])
def test_the_command_and_its_exit_codes(tmp_path, monkeypatch, capsys, faulty, code):
    IMAGES["good.png"][0](tmp_path / "good.png")
    model, data = arguments(tmp_path, [record(("good.png",)), record(("no.png",) if faulty else ("good.png",))])
    line = ["validate_data", "nowhere.json" if faulty is None else data.data, "--report", str(tmp_path / "report.json")]
    line += ["--images", data.images, "--tokenizer", model.tokenizer, "--template", "v1", "--max-length", "2000"]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == code
    printed = capsys.readouterr()
    if faulty is None:
        assert "error: DATA nowhere.json does not exist" in printed.err and not (tmp_path / "report.json").exists()
    else:
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["totals"]["records"] == 2 and report["counts"] == ({"missing picture": 1} if faulty else {})
        assert len(report["offenders"]) == int(faulty) and "records" in printed.out
        assert printed.out.splitlines()[-1].startswith("1 records cannot" if faulty else "The set can be trained on")
