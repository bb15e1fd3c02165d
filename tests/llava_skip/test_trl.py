"""TRL trains a saved folder that it reads by itself, and saves one that works by itself again."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText

from llava_skip import LlavaSkipForConditionalGeneration
from llava_skip.checkpoints.processor import load_processor
from llava_skip.folder_code import FILE

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed: pip install '.[trl]'"),
]

_TRAIN = """
import json, sys
from datasets import Dataset
from PIL import Image
from trl import SFTConfig, SFTTrainer

assert "llava_skip" not in sys.modules
folder, output = sys.argv[1:]
asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
told = {"role": "assistant", "content": [{"type": "text", "text": "A colour."}]}
rows = [{"images": [Image.new("RGB", (30, 20), colour)], "messages": [asked, told]} for colour in ("teal", "red")]
arguments = SFTConfig(
    output_dir=output, max_steps=3, per_device_train_batch_size=2, learning_rate=5e-3, lr_scheduler_type="constant",
    logging_steps=1, max_length=None, bf16=False, use_cpu=True, report_to="none", save_strategy="no",
    trust_remote_code=True,
)
trainer = SFTTrainer(model=folder, args=arguments, train_dataset=Dataset.from_list(rows))
trainer.train()
trainer.save_model(output)
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(json.dumps([type(trainer.model).__module__, type(trainer.processing_class).__module__, losses]))
"""


def test_sft_trainer_takes_a_folder_and_leaves_one(saved, tmp_path):
    variables = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _TRAIN, str(saved), str(tmp_path / "out")]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    model, processor, losses = json.loads(result.stdout.splitlines()[-1])
    assert (model, processor) == ("llava_skip.modeling", "llava_skip.processing")
    assert len(losses) == 3 and float(losses[-1]) < float(losses[0])
    trained = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    before = AutoModelForImageTextToText.from_pretrained(saved)
    assert type(trained) is LlavaSkipForConditionalGeneration
    assert not next(trained.model.summary.parameters()).equal(next(before.model.summary.parameters()))
    assert trained.config.skip == before.config.skip and (tmp_path / "out" / FILE).is_file()
    assert load_processor(tmp_path / "out").to_dict() == load_processor(saved).to_dict()
