import json
import re

import pytest

from llava_skip import LlavaSkipForConditionalGeneration
from llava_skip_base.exits import USER_ERROR
from tests.support.conversations import byte_tokenizer, random_image
from tests.support.records import record, write_set
from tests.support.runs import train
from tests.support.small_models import small_config


@pytest.fixture
def folder(tmp_path):
    return write_set(tmp_path, 12)


def arguments(folder, *options):
    return [
        "--data", str(folder / "data.json"), "--images", str(folder), "--tokenizer", str(folder / "tokenizer"),
        "--template", "v1", "--preset", "sv-llava-100", "--max_steps", "3",
        "--per_device_train_batch_size", "4", "--logging_steps", "1", "--save_strategy", "no",
        "--disable_tqdm", "true", "--learning_rate", "1e-3", *options,
    ]  # fmt: skip


def run(folder, name, *options, processes=1):
    return train(folder / name, *arguments(folder, *options), processes=processes)


def test_a_padding_free_run_learns_as_a_padded_one(folder):
    padded, flat = run(folder, "padded"), run(folder, "flat", "--padding_free", "true")
    losses = [[entry["loss"] for entry in result["history"]] for result in (padded, flat)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    for name in ("rows", "samples", "supervised", "ffn_rows"):
        assert padded[name] == flat[name], name


def test_a_grouped_run_and_a_streamed_one(folder):
    grouped = run(folder, "grouped", "--group_by_modality_length", "true", "--gradient_accumulation_steps", "2")
    streamed = run(folder, "streamed", "--streaming", "true", "--dataloader_num_workers", "2")
    assert grouped["samples"] == 24 and streamed["samples"] == 12
    with pytest.raises(ValueError, match="--streaming needs --max_steps"):
        run(folder, "endless", "--streaming", "true", "--max_steps", "-1")
    with pytest.raises(ValueError, match="needs the length of every sample"):
        run(folder, "both", "--streaming", "true", "--group_by_modality_length", "true")
    with pytest.raises(ValueError, match="leaves no step: there are 24 samples, and one takes 32"):
        run(folder, "short", "--dataloader_drop_last", "true", "--per_device_train_batch_size", "32")


def in_folder(folder, *options):
    place = ("--use_cpu", "true", "--dataloader_pin_memory", "false", "--output_dir", str(folder / "run"))
    return [*place, *arguments(folder, *options)]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_broken_image_that_was_not_looked_for_is_one_message(folder, attempt, workers):
    (folder / "3.png").write_text("no image")
    whole = ("--per_device_train_batch_size", "24", "--dataloader_num_workers", workers)
    end = attempt(in_folder(folder, *whole))
    assert end["code"] == USER_ERROR and "Traceback" not in end["output"], end["output"]
    assert end["output"].count("error:") == 1 and "llava-skip validate-data" in end["output"]
    assert "error: record 6 (id 'r1'): cannot identify image file" in end["output"]


def test_a_model_that_does_not_load_is_one_message(folder, attempt):
    config = small_config(vocab_size=400)
    config.image_token_index = 3
    LlavaSkipForConditionalGeneration(config).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    weights = folder / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    end = attempt(in_folder(folder, "--model", str(folder / "model"), "--preset", "llava"))
    assert end["code"] == USER_ERROR and "Traceback" not in end["output"], end["output"]
    assert f"error: {folder / 'model'} cannot be loaded: " in end["output"] and end["output"].count("error:") == 1


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--padding_free", "--streaming", "--group_by_modality_length"])
def test_two_deepspeed_processes_read_what_one_reads(folder, option):
    alone = run(folder, "alone", option, "true")
    zero = ("--deepspeed", "scripts/zero2.json", "--per_device_train_batch_size", "2")
    together = run(folder, "together", option, "true", *zero, processes=2)
    losses = [[entry["loss"] for entry in result["history"]] for result in (alone, together)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    for name in ("rows", "samples", "supervised"):
        assert alone[name] == together[name], name


def test_a_run_says_what_it_dropped_and_goes_on_with_the_same(folder, capsys):
    (folder / "3.png").unlink()
    with pytest.raises(ValueError, match="1 of 24 records are faulty.*\n.*3.png does not exist\nRepair them"):
        run(folder, "strict")
    assert not (folder / "strict").exists()
    assert run(folder, "lenient", "--drop_faulty", "true")["dropped"] == 1
    assert re.search(r"faulty records dropped +│ +1 ", capsys.readouterr().out)
    dropped = json.loads((folder / "lenient" / "dropped.json").read_text())
    assert dropped["counts"] == {"missing picture": 1} and dropped["records"][0]["row"] == 6
    random_image().save(folder / "3.png")
    with pytest.raises(ValueError, match="began with 1 dropped records, and now 0 would be"):
        run(folder, "lenient", "--drop_faulty", "true")


def test_cut_and_unsupervised_samples_are_counted(folder):
    long = record((), "long " * 40, "Answer.")
    (folder / "data.json").write_text(json.dumps([long] * 12))
    result = run(folder, "cut", "--max_length", "200")
    assert (result["truncated"], result["unsupervised"], result["supervised"]) == (12, 12, 0)
