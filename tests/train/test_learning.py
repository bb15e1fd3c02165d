"""The embedded run at full length reaches the accuracy of the page, and what the dense model has there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRESET = "sv-llava-256"


@pytest.mark.slow
def test_the_skipping_model_is_as_accurate_on_the_embedded_set_as_the_page_says(tmp_path):
    environment = os.environ | {
        "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}",
        "PRESETS": PRESET,
        "CHECKPOINTS": str(tmp_path / "checkpoints"),
        "RESULTS": str(tmp_path / "results"),
        "PAGE": str(tmp_path / "embedded.md"),
    }
    command = ["bash", "scripts/compare_embedded.sh"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    score = json.loads((tmp_path / "results/mmstar" / PRESET / "results.json").read_text())["score"]
    committed = (ROOT / "docs/embedded.md").read_text()
    dense, own = (float(re.search(rf"\| `{name}` \| ([\d.]+)%", committed)[1]) for name in ("llava", PRESET))
    assert score >= 90 and dense - score <= 3 and abs(own - score) <= 3, (dense, own, score)
    assert f"| `{PRESET}` | {score:.1f}% |" in (tmp_path / "embedded.md").read_text()
