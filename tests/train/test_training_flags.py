"""Which of transformers' flags a run takes: each resolves, and every other is refused by its name."""

import json
import re
from dataclasses import fields

import pytest
import torch
from transformers import TrainingArguments

from llava_skip_base.errors import UserError
from tests.support.interrupted import write_inputs
from tests.support.runs import ROOT, train
from train.arguments import KINDS, RunArguments
from train.command_line import check_names, read_command_line
from train.launch import torchrun_words
from train.llava_flags import FLAGS
from train.reporting.callbacks import check_reporters
from train.run import parse
from train.training_flags import CHOICES, INHERITED, INSTEAD, check_optimizer, check_schedule

GIVEN = ["--data", "x", "--output_dir", "y", "--use_cpu", "true"]
OURS = {name for names in RunArguments.GROUPS.values() for name in names}
TRANSFORMERS = {entry.name for entry in fields(TrainingArguments)}
REFUSED = sorted(TRANSFORMERS - OURS - {flag.name for flag in FLAGS})

# Flag -> a value that is not its default, and what it resolves to.
EXAMPLES = {
    "activation_checkpointing": ("true", True),
    "activation_checkpointing_kwargs": ('{"use_reentrant": false}', {"use_reentrant": False}),
    "adam_beta1": ("0.8", 0.8),
    "adam_beta2": ("0.95", 0.95),
    "adam_epsilon": ("1e-6", 1e-6),
    "bf16": ("true", True),
    "dataloader_drop_last": ("true", True),
    "dataloader_num_workers": ("3", 3),
    "dataloader_persistent_workers": ("true", True),
    "dataloader_pin_memory": ("false", False),
    "dataloader_prefetch_factor": ("4", 4),
    "ddp_broadcast_buffers": ("false", False),
    "ddp_bucket_cap_mb": ("10", 10),
    "ddp_find_unused_parameters": ("false", False),
    "ddp_timeout": ("60", 60),
    "disable_tqdm": ("true", True),
    "fp16": ("true", True),
    "gradient_accumulation_steps": ("2", 2),
    "learning_rate": ("1e-3", 1e-3),
    "local_rank": ("0", 0),
    "log_level": ("error", "error"),
    "log_level_replica": ("error", "error"),
    "log_on_each_node": ("false", False),
    "logging_first_step": ("true", True),
    "logging_steps": ("5", 5),
    "logging_strategy": ("epoch", "epoch"),
    "lr_scheduler_kwargs": ('{"num_cycles": 2}', {"num_cycles": 2}),
    "lr_scheduler_type": ("linear", "linear"),
    "max_grad_norm": ("0.5", 0.5),
    "max_steps": ("7", 7),
    "num_train_epochs": ("2", 2),
    "optim": ("sgd", "sgd"),
    "output_dir": ("z", "z"),
    "per_device_train_batch_size": ("4", 4),
    "report_to": ("tensorboard", ["tensorboard"]),
    "run_name": ("mine", "mine"),
    "save_steps": ("9", 9),
    "save_strategy": ("epoch", "epoch"),
    "save_total_limit": ("2", 2),
    "seed": ("3", 3),
    "tf32": ("false", False),
    "torch_empty_cache_steps": ("5", 5),
    "train_sampling_strategy": ("sequential", "sequential"),
    "use_cpu": ("true", True),
    "use_liger_kernel": ("true", True),
    "warmup_steps": ("5", 5),
    "weight_decay": ("0.1", 0.1),
}
VALIDATION = {
    "eval_delay": ("3", 3),
    "eval_steps": ("3", 3),
    "eval_strategy": ("epoch", "epoch"),
    "load_best_model_at_end": ("true", True),
    "per_device_eval_batch_size": ("4", 4),
}


@pytest.mark.parametrize("name", sorted(TRANSFORMERS & OURS - {"deepspeed"}))
def test_each_flag_of_the_list_resolves(name):
    value, expected = (EXAMPLES | VALIDATION)[name]
    more = {
        "dataloader_prefetch_factor": ["--dataloader_num_workers", "1"],
        "load_best_model_at_end": ["--eval_strategy", "steps"],
    }.get(name, [])
    resolved = parse([*GIVEN, f"--{name}", value, *more])[2].to_dict()
    assert resolved[name] == expected


@pytest.mark.parametrize("name", REFUSED)
def test_every_other_flag_is_refused_by_its_name(name, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(json.dumps({name: "x"}))
    dashes = name.replace("_", "-")
    for words in ([f"--{name}", "x"], [f"--{dashes}=x"], [f"--no_{name}"], ["--recipe", str(recipe)]):
        with pytest.raises(UserError, match=f"^--{name} of transformers is not supported"):
            parse([*GIVEN, *words])


def test_the_lists_are_whole():
    assert set(INHERITED) <= TRANSFORMERS and set(INSTEAD) <= set(REFUSED) and set(CHOICES) <= OURS
    assert {"fsdp", "liger_kernel_config", "enable_jit_checkpoint", "torch_compile", "push_to_hub"} <= set(REFUSED)
    own = {entry.name for entry in fields(RunArguments)} - TRANSFORMERS
    assert own <= OURS, "a new argument of a run belongs to a group of --help"


def test_the_dry_run_refuses_them_too(monkeypatch, capsys):
    from train.train import main

    monkeypatch.setattr("sys.argv", ["train", *GIVEN, "--dry_run", "true", "--fsdp", "full_shard"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("error: --fsdp of transformers is not supported: use --deepspeed zero3.")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--optim galore_adamw", "--optim is 'galore_adamw'; it must be one of adamw_torch, "),
        ("--lr_scheduler_type greedy", "--lr_scheduler_type is 'greedy'; it must be one of linear, "),
        ("--train_sampling_strategy group_by_length", "Use --group_by_modality_length true."),
        ("--save_strategy best", "--save_strategy is 'best'; it must be one of no, steps, epoch."),
        ("--lr_scheduler_kwargs {", "--lr_scheduler_kwargs is '{'; it must be a JSON object ("),
        ("--lr_scheduler_kwargs [1]", "--lr_scheduler_kwargs is '[1]'; it must be a JSON object."),
        ("--adam_beta1 1", "--adam_beta1 is 1.0; it must be below 1."),
        ("--adam_epsilon 0", "--adam_epsilon is 0.0; it must be above 0."),
        ("--bf16 true --fp16 true", "the arguments do not go together or with this machine: At most one of fp16"),
        ("--deepspeed nowhere.json", "has no nowhere.json."),
        ("--save_steps 1.5", "--save_steps must be an integer if bigger than 1"),
    ],
)
def test_values_that_make_no_run_are_one_message(words, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse([*GIVEN, *words.split()])


@pytest.mark.parametrize("section", ["optimizer", "scheduler"])
def test_a_zero_file_does_not_take_the_place_of_arguments(tmp_path, section):
    settings = json.loads((ROOT / "scripts/zero2.json").read_text()) | {section: {"type": "AdamW", "params": {}}}
    (tmp_path / "zero.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=f"has a section '{section}'.*leave it out"):
        parse([*GIVEN, "--deepspeed", str(tmp_path / "zero.json")])


def test_a_schedule_is_tried_before_a_model_loads(tmp_path):
    for kind in CHOICES["lr_scheduler_type"]:
        needed = {"cosine_with_min_lr": {"min_lr": 1e-6}, "cosine_warmup_with_min_lr": {"min_lr": 1e-6}}
        needed["warmup_stable_decay"] = {"num_decay_steps": 10}
        check_schedule(run_of(tmp_path, lr_scheduler_type=kind, lr_scheduler_kwargs=needed.get(kind)))
    for kind, options in (("cosine_with_min_lr", None), ("cosine", {"cycles": 2})):
        with pytest.raises(UserError, match=f"--lr_scheduler_type {kind} does not go with --lr_scheduler_kwargs"):
            check_schedule(run_of(tmp_path, lr_scheduler_type=kind, lr_scheduler_kwargs=options))


def test_packages_that_are_missing_are_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--report_to nobody is unknown, or its package is not installed"):
        check_reporters(run_of(tmp_path, report_to="nobody"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_optimizer(run_of(tmp_path, optim="sgd"))
    with pytest.raises(UserError, match="--optim paged_adamw_8bit needs a package: pip install bitsandbytes"):
        check_optimizer(run_of(tmp_path, optim="paged_adamw_8bit"))


def run_of(folder, **arguments):
    return RunArguments(output_dir=str(folder), use_cpu=True, **arguments)


@pytest.mark.parametrize("optim", [name for name in CHOICES["optim"] if "8bit" not in name and "paged" not in name])
def test_every_optimizer_trains(tmp_path, optim):
    given = [*write_inputs(tmp_path), "--optim", optim, "--max_steps", "1", "--save_strategy", "no"]
    assert torch.tensor(train(tmp_path / "run", *given, "--logging_strategy", "no")["final_loss"]).isfinite()


def test_names_are_checked_before_the_embedded_data_is_built(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAVA_SKIP_HOME", str(tmp_path))
    built = []
    monkeypatch.setattr("playground.data.build.ensure_built", lambda: built.append(1))
    for wrong in ("--learning_rat", "--fsdp"):
        with pytest.raises(UserError, match=wrong):
            torchrun_words(["--recipe", "embedded", wrong, "1"])
    assert not built
    torchrun_words(["--recipe", "embedded", "--learning-rate", "1"])
    assert built
    check_names(KINDS, ["--gradient_checkpointing", "true"])  # a name of LLaVA, too


def test_programs_without_a_run_leave_its_flags_out_of_a_recipe(tmp_path):
    (tmp_path / "mine.yaml").write_text("fsdp: x\ndata: y\n")
    assert read_command_line(KINDS[1:2], ["--recipe", str(tmp_path / "mine.yaml")])[0].data == "y"
