"""The embedded data set: deterministic, split without overlap, labelled correctly, in the public formats."""

import base64
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import cache
from itertools import chain
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from playground.data import build, tokenizer
from playground.data.formats import MMBENCH_COLUMNS, MMSTAR_COLUMNS, training_records
from playground.data.questions import INSTRUCTION, SHORT_INSTRUCTION, WORDS, Choice, Question, make_choice
from playground.data.scenes import (
    BACKGROUND,
    CELL_SIZE,
    CELLS,
    UPRIGHT,
    cell_image,
    digit_pools,
    load_digits_once,
    random_scene,
    varied,
)

IMAGES = 120


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return build.ensure_built(tmp_path_factory.mktemp("digits") / "digits", train_images=IMAGES)


@pytest.fixture(scope="module")
def records(digits):
    return json.loads((digits / "train.json").read_text())


@pytest.fixture(scope="module")
def train_scenes():
    """The scenes that the training images are drawn from, by record."""
    drawn = training_records(digit_pools()[0], IMAGES, Random("0/train"))
    return {record["id"]: scene for record, scene in drawn if scene}


@pytest.fixture(scope="module")
def trained_tokenizer(digits):
    return AutoTokenizer.from_pretrained(digits / "tokenizer")


@pytest.fixture(scope="module")
def samples_by_pixels():
    """Every handwritten sample, found by the bytes of its cell."""
    return {cell_image(i).tobytes(): i for i in range(len(load_digits_once()[1]))}


def read_tsv(path):
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, delimiter="\t")
        return reader.fieldnames, list(reader)


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def crop_cell(image, cell):
    left, top = ("right" in cell) * CELL_SIZE, ("bottom" in cell) * CELL_SIZE
    return image.crop((left, top, left + CELL_SIZE, top + CELL_SIZE))


def read_samples(image, samples_by_pixels):
    """Find by the pixels which handwritten sample each cell has; empty cells are left out.

    JPEG changes pixels a little, so there the nearest sample is taken.
    """
    found = {}
    for cell in CELLS:
        shown = crop_cell(image, cell)
        content = shown.tobytes()
        if content in samples_by_pixels:
            found[cell] = samples_by_pixels[content]
        elif max(abs(value - BACKGROUND) for value in content) > 20:
            assert image.format == "JPEG"
            found[cell] = nearest(np.asarray(shown, dtype=float).ravel())
    return found


@cache
def upright_cells():
    return np.stack([np.asarray(cell_image(i), dtype=float).ravel() for i in range(len(load_digits_once()[1]))])


def nearest(shown):
    return int(((upright_cells() - shown) ** 2).sum(axis=1).argmin())


def decode_image(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


def eval_images(digits):
    for path in (digits / "eval").glob("*.tsv"):
        yield from (decode_image(row["image"]) for row in read_tsv(path)[1])
    yield from (Image.open(path) for path in (digits / "eval").rglob("*") if path.suffix in (".png", ".jpg"))


def solve(question, digits):
    """An answer computed from the question's words and the digits by cell, without the builder's own rules."""
    if match := re.fullmatch(r"Which is larger, (\d) or (\d)\?", question):
        return max(match.groups())
    if match := re.fullmatch(r"Which word is (\d)\?", question):
        return WORDS[int(match[1])]
    if match := re.fullmatch(r"Which digit is (\w+)\?", question):
        return str(WORDS.index(match[1]))
    if match := re.fullmatch(r"Which digit is (\w+ \w+)\?", question):
        return str(digits[match[1]])
    if match := re.fullmatch(r"Is there a digit (\w+ \w+)\?", question):
        return "yes" if match[1] in digits else "no"
    if match := re.fullmatch(r"Which is larger, (\w+ \w+) or (\d)\?", question):
        difference = digits[match[1]] - int(match[2])
        return "equal" if difference == 0 else match[1] if difference > 0 else match[2]
    if question == "How many digits?":
        return str(len(digits))
    if question == "Which digits are there?":
        return ", ".join(f"{cell} {digits.get(cell, 'none')}" for cell in CELLS)
    raise AssertionError(f"unknown question {question}")


def parse_options(prompt):
    """The question and the options by letter of a prompt in either public layout."""
    question, _, rest = prompt.removesuffix(INSTRUCTION).removesuffix(SHORT_INSTRUCTION).partition("\n")
    pattern = r"([A-D]): ([^,]+)" if rest.startswith("Options: ") else r"([A-D])\. ([^\n]+)"
    return question, dict(re.findall(pattern, rest))


def check_answer(prompt, answer, digits):
    question, options = parse_options(prompt)
    assert len(set(options.values())) == len(options)
    if options:  # a letter, or the option as it is in the prompt
        assert answer in options or answer in prompt
        answer = options[answer[0]]
    assert answer == solve(question, digits), prompt


def labels_of(samples):
    return {cell: int(load_digits_once()[1][i]) for cell, i in samples.items()}


def test_same_arguments_give_same_bytes(digits, tmp_path):
    again = build.ensure_built(tmp_path / "again", train_images=IMAGES)
    files = {p.relative_to(digits): p.read_bytes() for p in digits.rglob("*") if p.is_file()}
    assert files == {p.relative_to(again): p.read_bytes() for p in again.rglob("*") if p.is_file()}
    other = build.ensure_built(tmp_path / "other", train_images=IMAGES, seed=1)
    assert (other / "train.json").read_bytes() != (digits / "train.json").read_bytes()


def test_train_and_eval_share_no_handwriting(digits, train_scenes, samples_by_pixels):
    train_pool, eval_pool = ({i for part in pool.values() for i in part} for pool in digit_pools())
    shown_in_eval = [read_samples(image, samples_by_pixels) for image in eval_images(digits)]
    assert len(train_scenes) == IMAGES and all(shown_in_eval)
    assert {i for scene in train_scenes.values() for i in scene.samples if i is not None} <= train_pool
    assert {i for samples in shown_in_eval for i in samples.values()} <= eval_pool
    assert not train_pool & eval_pool and len(train_pool | eval_pool) == len(load_digits_once()[1])


def test_training_answers_are_right(digits, records, train_scenes):
    for record in records:
        shown = {}
        if "image" in record:
            scene = train_scenes[record["id"]]
            assert (digits / "images" / record["image"]).read_bytes() == scene.png()
            shown = labels_of({c: i for c, i in zip(CELLS, scene.samples, strict=True) if i is not None})
        turns = record["conversations"]
        for human, gpt in zip(turns[::2], turns[1::2], strict=True):
            check_answer(human["value"].removeprefix("<image>\n"), gpt["value"], shown)


def test_a_pose_changes_the_image_but_not_the_digit():
    labels = load_digits_once()[1]
    rng = Random(3)
    scenes = [varied(random_scene(digit_pools()[0], rng), rng) for _ in range(100)]
    read = []
    for scene in scenes:
        for place, (cell, digit) in enumerate(zip(CELLS, (scene.digits.get(c) for c in CELLS), strict=True)):
            if digit is not None:
                assert scene.poses[place] != UPRIGHT
                shown = np.asarray(crop_cell(scene.draw(), cell), dtype=float).ravel()
                assert not (shown == upright_cells()[scene.samples[place]]).all()
                read.append(labels[nearest(shown)] == digit)
    assert sum(read) > 0.9 * len(read) > 200


def test_training_records_have_llavas_form(records):
    text_only = [record for record in records if "image" not in record]
    assert len(records) - len(text_only) == IMAGES and 0.03 < len(text_only) / len(records) < 0.07
    assert len({record["id"] for record in records}) == len(records)
    for record in records:
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        prompts = [turn["value"] for turn in turns[::2]]
        assert ["<image>" in prompt for prompt in prompts] == ["image" in record] + [False] * (len(prompts) - 1)
        assert prompts[-1].endswith("Which digits are there?") == ("image" in record)
        assert len({parse_options(prompt.removeprefix("<image>\n"))[0] for prompt in prompts}) == len(prompts)
    choices = [sum(turn["value"].endswith(INSTRUCTION) for turn in record["conversations"]) for record in records]
    assert set(choices) >= {0, 1, 2, 3} and 1.2 < sum(choices) / len(choices) < 2.4


def test_mmbench_passes_rotate_right(digits, samples_by_pixels):
    columns, rows = read_tsv(digits / "eval" / "mmbench.tsv")
    assert columns == MMBENCH_COLUMNS
    indices = [int(row["index"]) for row in rows]
    assert indices == sorted(indices) and len(set(indices)) == len(indices)
    by_index = dict(zip(indices, rows, strict=True))
    mains = [index for index in indices if index < 1_000_000]
    assert {len(_options(by_index[index])) for index in mains} == {2, 3, 4} and len(mains) == 150
    for index in mains:
        options, m = _options(by_index[index]), len(_options(by_index[index]))
        shown = labels_of(read_samples(decode_image(by_index[index]["image"]), samples_by_pixels))
        assert [k for k in range(5) if k * 1_000_000 + index in by_index] == list(range(m))
        for k in range(m):
            row = by_index[k * 1_000_000 + index]
            assert _options(row) == [options[(i - k) % m] for i in range(m)]
            assert row["image"] == by_index[index]["image"] and row["split"] == "dev"
            assert _options(row)["ABCD".index(row["answer"])] == solve(row["question"], shown)


def _options(row):
    return [row[letter] for letter in "ABCD" if row[letter]]


def test_mmstar_is_right_and_cannot_be_guessed(digits, samples_by_pixels):
    columns, rows = read_tsv(digits / "eval" / "mmstar.tsv")
    assert columns == MMSTAR_COLUMNS and len(rows) == 400
    assert len({row["category"] for row in rows}) >= 3
    for row in rows:
        shown = labels_of(read_samples(decode_image(row["image"]), samples_by_pixels))
        check_answer(row["question"] + INSTRUCTION, row["answer"], shown)
    assert max(Counter(row["answer"] for row in rows).values()) <= 0.3 * len(rows)


def test_mmvet_answers_and_capabilities(digits, samples_by_pixels):
    folder = digits / "eval" / "mm-vet"
    samples = json.loads((folder / "mm-vet.json").read_text())
    assert list(samples) == [f"v1_{n}" for n in range(60)]
    order = ["rec", "ocr", "know", "gen", "spat", "math"]
    for sample in samples.values():
        shown = labels_of(read_samples(Image.open(folder / "images" / sample["imagename"]), samples_by_pixels))
        answer = sample["answer"].replace("<AND>", ", ").partition("<OR>")[0]
        assert answer == solve(sample["question"], shown)
        assert sample["capability"] == sorted(sample["capability"], key=order.index)
    answers = "".join(sample["answer"] for sample in samples.values())
    assert "<AND>" in answers and "<OR>" in answers


def short_answers(digits):
    """Every short-answer question with its image and answer, by benchmark."""
    folder = digits / "eval"
    pope, mme = (read_tsv(folder / f"{name}.tsv")[1] for name in ("pope", "mme"))
    yield "pope", [(row["question"], decode_image(row["image"]), row["answer"]) for row in pope]
    asked = [(row["question"].removesuffix(" Please answer yes or no."), row) for row in mme]
    yield "mme", [(question, decode_image(row["image"]), row["answer"].lower()) for question, row in asked]
    gqa = read_json(folder / "gqa.json").values()
    images = {row["imageId"]: Image.open(folder / "images" / f"{row['imageId']}.jpg") for row in gqa}
    yield "gqa", [(row["question"], images[row["imageId"]], row["answer"]) for row in gqa]
    textvqa = read_json(folder / "textvqa.json")["data"]
    assert all(len(row["answers"]) == 10 and len(set(row["answers"])) == 1 for row in textvqa)
    images = {row["image_id"]: Image.open(folder / "images" / f"{row['image_id']}.jpg") for row in textvqa}
    yield "textvqa", [(row["question"], images[row["image_id"]], row["answers"][0]) for row in textvqa]
    ocrbench = read_json(folder / "ocrbench.json")
    images = {row["id"]: Image.open(folder / "OCRBench_Images" / row["image_path"]) for row in ocrbench}
    yield "ocrbench", [(row["question"], images[row["id"]], row["answers"][0]) for row in ocrbench]
    problems = read_json(folder / "mathvista/testmini.json").values()
    images = {row["pid"]: Image.open(folder / "mathvista" / row["image"]) for row in problems}
    yield "mathvista", [(row["question"], images[row["pid"]], row["answer"]) for row in problems]
    mmmu = read_tsv(folder / "mmmu.tsv")[1]
    yield "mmmu", [(row["question"], decode_image(row["image"]), row["answer"]) for row in mmmu]


def more_answers(digits):
    """Every question of the benchmarks that token reduction is measured on, with its image and answer."""
    folder = digits / "eval"
    problems = read_json(folder / "scienceqa/problems.json")
    assert list(problems) == read_json(folder / "scienceqa/pid_splits.json")["test"]
    images = {id_: Image.open(folder / "scienceqa/images/test" / id_ / "image.png") for id_ in problems}
    asked = [(row["question"], images[id_], row["choices"][row["answer"]]) for id_, row in problems.items()]
    yield "scienceqa", asked
    seed, place = read_json(folder / "seed_bench/SEED-Bench.json")["questions"], folder / "seed_bench/SEED-Bench-image"
    right = [row[f"choice_{row['answer'].lower()}"] for row in seed]
    yield "seed", [(r["question"], Image.open(place / r["data_id"]), gold) for r, gold in zip(seed, right, strict=True)]
    ai2d = read_tsv(folder / "ai2d.tsv")[1]
    yield "ai2d", [(row["question"], decode_image(row["image"]), row[row["answer"]]) for row in ai2d]
    questions = read_json(folder / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json")["questions"]
    annotations = read_json(folder / "vqav2/v2_mscoco_val2014_annotations.json")["annotations"]
    golds = {row["question_id"]: {answer["answer"] for answer in row["answers"]} for row in annotations}
    place = folder / "vqav2/val2014"
    images = {n: Image.open(place / f"COCO_val2014_{n:012d}.jpg") for n in {row["image_id"] for row in questions}}
    yield "vqav2", [(row["question"], images[row["image_id"]], *golds[row["question_id"]]) for row in questions]
    vizwiz, place = read_json(folder / "vizwiz/val.json"), folder / "vizwiz/val"
    yield "vizwiz", [(r["question"], Image.open(place / r["image"]), r["answers"][0]["answer"]) for r in vizwiz]
    charts = [row for split in ("human", "augmented") for row in read_json(folder / f"chartqa/test_{split}.json")]
    yield "chartqa", [(r["query"], Image.open(folder / "chartqa/png" / r["imgname"]), r["label"]) for r in charts]
    pages = read_json(folder / "docvqa/val_v1.0_withQT.json")["data"]
    yield "docvqa", [(row["question"], Image.open(folder / "docvqa" / row["image"]), *row["answers"]) for row in pages]
    figures = read_json(folder / "hallusionbench/HallusionBench.json")
    images = {row["filename"]: Image.open(folder / "hallusionbench" / row["filename"]) for row in figures}
    yield (
        "hallusionbench",
        [(r["question"], images[r["filename"]], "no yes".split()[int(r["gt_answer"])]) for r in figures],
    )


def test_short_answers_are_right(digits, samples_by_pixels):
    counts = {"pope": 120, "mme": 60, "gqa": 100, "textvqa": 60, "ocrbench": 60, "mathvista": 60, "mmmu": 60}
    counts |= dict.fromkeys(("scienceqa", "seed", "ai2d", "vqav2", "chartqa", "docvqa"), 100)
    counts |= {"vizwiz": 70, "hallusionbench": 120}
    for name, asked in chain(short_answers(digits), more_answers(digits)):
        assert len(asked) == counts.pop(name)
        for question, image, answer in asked:
            assert answer == solve(question, labels_of(read_samples(image, samples_by_pixels))), (name, question)
    assert not counts


def test_yes_and_no_are_as_frequent(digits):
    pope, mme = (read_tsv(digits / "eval" / f"{name}.tsv")[1] for name in ("pope", "mme"))
    assert Counter((row["category"], row["answer"]) for row in pope) == {
        (split, answer): 20 for split in ("adversarial", "popular", "random") for answer in ("yes", "no")
    }
    pairs = Counter((row["image_path"], row["answer"]) for row in mme)
    assert len(pairs) == 60 and set(pairs.values()) == {1}


def test_figures_of_a_set_differ_in_the_first_answer(digits):
    rows = read_json(digits / "eval/hallusionbench/HallusionBench.json")
    answers = {(r["set_id"], r["figure_id"], r["question_id"]): r["gt_answer"] for r in rows}
    for number in range(30):
        first, second = ([answers[str(number), figure, question] for figure in "01"] for question in "01")
        assert first == ["1", "0"] and len(set(second)) == 1


# Of a build of 120 training images, before benchmarks were added; images are left out, whose bytes depend on Pillow.
UNCHANGED = {
    "train.json": "e9889d10092551f5ffcafc1c63c8f2b7f5150811396e6b58010ba3108adb67ae",
    "captions.json": "5aa77e026be0bb8e107cfeeac6b0224816386eb3817604fa4a1184e316920569",
    "eval/gqa.json": "a60024184e484021912490e2f6ece76f1a3488a3f5acc737361d99bf999bc634",
    "eval/textvqa.json": "99054f4e18e38f5ef7d7e6d9f04845f8d68be6680f8ecf3a9e1d252b2c67f143",
    "eval/ocrbench.json": "46e09fde79167f3d5e9e3c902b1cd4d8eedadf91bffe5425a023c6c37bf989e3",
    "eval/mathvista/testmini.json": "5417a44c0ee6d77bd5f1d1d37e9f2cc25cbb2e6de8c85a1e06a615f014021f31",
    "eval/mm-vet/mm-vet.json": "0e48e9544f6f034fdfa2df7935609e413955d0be6aee4bb22c239c226fe1169d",
}


def test_added_benchmarks_leave_the_other_files_as_they_were(digits):
    assert {name: build._sha256((digits / name).read_bytes()) for name in UNCHANGED} == UNCHANGED


def test_benchmarks_are_added_to_a_built_data_set(digits, tmp_path):
    older = tmp_path / "older"
    shutil.copytree(digits, older)
    for name in ("ai2d.tsv", "chartqa", "docvqa", "hallusionbench", "scienceqa", "seed_bench", "vizwiz", "vqav2"):
        path = older / "eval" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    manifest = read_json(older / "manifest.json")
    added = {name for name in manifest["sha256"] if not (older / name).exists()}
    del manifest["evaluation_version"]
    manifest["sha256"] = {name: value for name, value in manifest["sha256"].items() if name not in added}
    (older / "manifest.json").write_text(json.dumps(manifest))
    times = {path: path.stat().st_mtime_ns for path in [*(older / "images").rglob("*.png"), older / "train.json"]}
    build.ensure_built(older, train_images=IMAGES)
    assert {path: path.stat().st_mtime_ns for path in times} == times and len(times) == IMAGES + 1
    files = {p.relative_to(digits): p.read_bytes() for p in digits.rglob("*") if p.is_file()}
    assert files == {p.relative_to(older): p.read_bytes() for p in older.rglob("*") if p.is_file()}


def test_choice_offers_the_digits_of_the_image():
    question = Question("which", "Which digit is top left?", "3", near=("7", "8"), far=("0", "1", "2"))
    choice = make_choice(question, Random(0), position=2)
    assert choice.letter == "C" and {"3", "7", "8"} < set(choice.options) and len(choice.options) == 4
    assert Choice(question, ("7", "8", "3")).rotated(1).options == ("3", "7", "8")


def test_scene_has_at_least_one_digit():
    scenes = [random_scene(digit_pools()[0], Random(seed)) for seed in range(200)]
    assert {len(scene.digits) for scene in scenes} == {1, 2, 3, 4}


@pytest.mark.parametrize(
    "text", ["Which digit is top left?\nA. 3", " Tabs\tand  blanks \n\n", "Ünïcode 数字 🙂", "a's 1234 x=y+2"]
)
def test_tokenizer_round_trip_and_offsets(trained_tokenizer, text):
    encoded = trained_tokenizer(text, return_offsets_mapping=True)
    assert encoded.input_ids[0] == trained_tokenizer.bos_token_id
    assert trained_tokenizer.decode(encoded.input_ids, skip_special_tokens=True) == text
    spans = encoded.offset_mapping[1:]
    assert {place for start, end in spans for place in range(start, end)} == set(range(len(text)))
    assert spans == sorted(spans)


def test_tokenizer_letters_and_digits_are_one_token_anywhere(trained_tokenizer):
    for mark in "ABCD0123456789":
        (token,) = trained_tokenizer.encode(mark, add_special_tokens=False)
        for text in (f"({mark})", f"\n{mark}, ", f"<|eot_id|>{mark}<|eot_id|>"):
            assert token in trained_tokenizer.encode(text, add_special_tokens=False), text


def test_tokenizer_ends_a_prompt_where_the_answer_begins(trained_tokenizer):
    for answer in ("3", "B. 7", "top left", "yes"):
        turns = [{"role": "user", "content": "Which digit is top left?"}, {"role": "assistant", "content": answer}]
        prompt, whole = (
            trained_tokenizer.encode(
                trained_tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=open_)
            )
            for t, open_ in ((turns[:1], True), (turns, False))
        )
        assert whole[: len(prompt)] == prompt and len(whole) <= len(prompt) + 3


def test_tokenizer_answers_are_one_token_and_the_same_as_an_option(trained_tokenizer, records):
    answers = {turn["value"] for record in records for turn in record["conversations"] if turn["from"] == "gpt"}
    for answer in (answer for answer in answers if "," not in answer):
        (token,) = trained_tokenizer.encode(answer, add_special_tokens=False)
        for text in (f"Options: {answer}, B: x", f"\n{answer}\nB. x"):
            assert token in trained_tokenizer.encode(text, add_special_tokens=False), text


def test_tokenizer_special_tokens(trained_tokenizer):
    kept = trained_tokenizer
    assert (kept.pad_token, kept.bos_token, kept.eos_token) == ("<pad>", "<|begin_of_text|>", "<|eot_id|>")
    assert kept.padding_side == "right" and kept.chat_template
    for token in (*tokenizer.EXTRA_TOKENS, kept.eos_token):
        assert kept.encode(f"a{token}\nb", add_special_tokens=False).count(kept.convert_tokens_to_ids(token)) == 1
        assert token in kept.all_special_tokens


def test_build_is_skipped_only_when_it_is_complete(tmp_path):
    folder = build.ensure_built(tmp_path / "digits", train_images=2)
    train = folder / "train.json"
    train.write_text("touched")
    assert build.ensure_built(folder, train_images=2) == folder and train.read_text() == "touched"
    (folder / build.MANIFEST).unlink()
    build.ensure_built(folder, train_images=2)
    assert train.read_text() != "touched"
    build.ensure_built(folder, train_images=1)
    assert [p.name for p in (folder / "images" / "train").iterdir()] == ["000001.png"]
    checksums = build.read_manifest(folder)["sha256"]
    assert {"train.json", "eval/mmstar.tsv", "tokenizer/tokenizer.json"} < set(checksums)


@pytest.mark.parametrize("installed", [False, True])
def test_the_program_builds_where_training_and_evaluation_look(tmp_path, installed):
    """From any folder; also without a checkout around the packages."""
    root = Path(build.__file__).parents[2]
    if installed:
        for package in ("llava_skip_base", "llava_skip", "playground"):
            shutil.copytree(root / package, tmp_path / "site" / package, ignore=shutil.ignore_patterns("digits"))
        root = tmp_path / "site"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    variable = "XDG_CACHE_HOME" if installed else "LLAVA_SKIP_HOME"
    environment = {**os.environ, "PYTHONPATH": str(root), variable: str(tmp_path / "home")}
    look = (
        "from llava_skip_base import paths; print(paths.embedded_data(), *paths.embedded_data().rglob('*'), sep='\\n')"
    )
    for code in (["-m", "playground.data.build", "--train_images", "2"], ["-c", look]):
        result = subprocess.run(
            [sys.executable, *code], cwd=elsewhere, env=environment, capture_output=True, text=True, check=True
        )
    folder, *files = map(Path, result.stdout.splitlines())
    assert folder.is_relative_to(tmp_path / "home") and not any(elsewhere.iterdir())
    assert {folder / name for name in ("manifest.json", "tokenizer/tokenizer.json", "eval/mmstar.tsv")} <= set(files)


def test_a_mistake_is_one_message(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["build", "--output", str(tmp_path / "file")])
    with pytest.raises(SystemExit) as left:
        build.main()
    assert left.value.code == 2 and capsys.readouterr().err.startswith("error: ")


def test_missing_chat_template_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "files", lambda package: tmp_path)
    with pytest.raises(FileNotFoundError, match="v1.jinja"):
        build.ensure_built(tmp_path / "digits", train_images=1)
    with pytest.raises(ValueError, match="train_images"):
        build.ensure_built(tmp_path / "digits", train_images=0)
