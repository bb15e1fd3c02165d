import os
import tempfile

# Tables and reports of made-up data; started processes use it too.
os.environ["HF_DATASETS_CACHE"] = (cache := tempfile.TemporaryDirectory(prefix="llava-skip-tests-")).name
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.set_num_threads(1)
    torch.manual_seed(0)
