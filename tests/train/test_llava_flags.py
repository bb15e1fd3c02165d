"""LLaVA's command lines, as its scripts have them."""

import json
import re
from pathlib import Path

import pytest

from tests.support.runs import ROOT
from train.llava_flags import FLAGS, Settled, translate
from train.run import parse

# scripts/v1_5 of haotian-liu/LLaVA, without the launcher.
COMMON = """
    --bf16 True --num_train_epochs 1 --per_device_eval_batch_size 4 --gradient_accumulation_steps 1
    --evaluation_strategy no --save_strategy steps --save_steps 50000 --save_total_limit 1 --weight_decay 0.
    --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --tf32 False --model_max_length 2048
    --gradient_checkpointing True --dataloader_num_workers 4 --lazy_preprocess True --report_to wandb
    --mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False
    --vision_tower openai/clip-vit-large-patch14-336 --mm_projector_type mlp2x_gelu --use_cpu True
"""
PRETRAIN = """
    --model_name_or_path lmsys/vicuna-13b-v1.5 --version plain --data_path blip_laion_cc_sbu_558k.json
    --image_folder images --tune_mm_mlp_adapter True --output_dir out --per_device_train_batch_size 32
    --learning_rate 1e-3
"""
FINETUNE_LORA = """
    --lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 --model_name_or_path lmsys/vicuna-13b-v1.5
    --version v1 --data_path mix.json --image_folder data --pretrain_mm_mlp_adapter pre/mm_projector.bin
    --image_aspect_ratio pad --output_dir out --per_device_train_batch_size 16 --learning_rate 2e-4
"""


@pytest.mark.filterwarnings("error::FutureWarning")
def test_stage_1_of_llava():
    model, data, run = parse((COMMON + PRETRAIN).split())
    assert (model.model, model.template, data.data) == ("lmsys/vicuna-13b-v1.5", "plain", "blip_laion_cc_sbu_558k.json")
    assert (data.images, data.max_length, run.warmup_steps) == ("images", 2048, 0.03)
    assert model.trained_parts == ("multi_modal_projector", "summary")
    assert run.learning_rate == 1e-3 and run.part_rates == {} and run.activation_checkpointing


@pytest.mark.parametrize(("version", "template"), [("v0", "v1"), ("chatml_direct", "chatml"), ("llama_2", "llama_2")])
def test_versions_are_templates_by_their_names_in_llava(version, template):
    assert parse(["--version", version, "--data", "x.json", "--use_cpu", "true"])[0].template == template


def test_lora_of_llava():
    model, data, run = parse((COMMON + FINETUNE_LORA).split())
    assert (model.lora_enable, model.lora_r, model.lora_alpha, model.lora_dropout) == (True, 128, 256, 0.05)
    assert (model.projector, model.template) == ("pre/mm_projector.bin", "v1")
    assert run.part_rates == {"multi_modal_projector": 2e-5} and run.learning_rate == 2e-4
    assert model.trained_parts == ("multi_modal_projector", "summary", "language_model")


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("--tune_mm_mlp_adapter", {"multi_modal_projector", "summary"}),
        ("--freeze_mm_mlp_adapter true", {"summary", "language_model"}),
        ("--freeze_backbone=True", {"multi_modal_projector", "summary"}),
        ("--unfreeze_mm_vision_tower True", {"vision_tower", "multi_modal_projector", "summary", "language_model"}),
        (
            "--freeze_backbone True --unfreeze_mm_vision_tower True",
            {"vision_tower", "multi_modal_projector", "summary"},
        ),
        (
            "--unfreeze_mm_vision_tower True --tune_mm_mlp_adapter True",
            {"vision_tower", "multi_modal_projector", "summary"},
        ),
        ("--tune_mm_mlp_adapter False --freeze_backbone False", None),
    ],
)
def test_switches_become_parts(flags, parts):
    words = translate(flags.split())
    assert words == [] if parts is None else words[0] == "--train_parts" and set(words[1:]) == parts


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--mm_projector_type linear", "--mm_projector_type linear is not taken. Use --preset cos"),
        ("--mm_use_im_start_end True", "--mm_use_im_start_end True is not taken. Use false"),
        ("--mm_vision_select_layer -1", "vision_feature_layer"),
        ("--use_zip True", "--preset sv-llava-100"),
        ("--cache_dir x", "HF_HOME"),
        ("--model m --model_name_or_path n", "--model is given twice"),
        ("--train_parts summary --freeze_backbone True", "--train_parts is given twice"),
        ("--mm_projector_lr fast", "--mm_projector_lr is 'fast'; it must be a number"),
        ("--freeze_backbone maybe", "--freeze_backbone is 'maybe'; it must be true or false"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_what_to_use(flags, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        translate(flags.split())


def test_flags_of_nobody_and_abbreviations_are_refused():
    for flags in ("--mm_proj_lr 1", "--model_na m", "--lora_rank 4"):
        with pytest.raises(ValueError, match=flags.split()[0]):
            parse(["--data", "d", "--output_dir", "o", *flags.split()])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--learning_rat 1", "unknown arguments: --learning_rat 1. Did you mean --learning_rate? --help lists"),
        ("--image-foldr=x", "unknown arguments: --image-foldr=x. Did you mean --image_folder? --help lists"),
        ("--zzz", "unknown arguments: --zzz. --help lists"),
        ("--max_steps two", "argument --max_steps/--max-steps: invalid int value: 'two'. --help lists"),
        ("--max_steps", "argument --max_steps/--max-steps: expected one argument. --help lists"),
    ],
)
def test_a_mistake_in_an_argument_is_one_line(capsys, flags, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(["--data", "d", "--output_dir", "o", *flags.split()])
    assert capsys.readouterr() == ("", "")


def test_both_rates_become_one_argument():
    words = translate("--mm_projector_lr 2e-5 --mm_vision_tower_lr 2e-6".split())
    assert json.loads(words[1]) == {"multi_modal_projector": 2e-5, "vision_tower": 2e-6}
    assert translate(["--mm_projector_lr", "None"]) == []


def test_every_flag_is_in_the_documentation():
    page = (Path(ROOT) / "docs/training.md").read_text()
    assert [flag.name for flag in FLAGS if f"`--{flag.name}`" not in page] == []
    assert len({flag.name for flag in FLAGS}) == len(FLAGS)
    assert all(flag.instead for flag in FLAGS if isinstance(flag, Settled))
