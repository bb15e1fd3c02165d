"""The embedded comparison at full length: both models reach the accuracy of the page, and skipping costs little."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRESETS = ("llava", "sv-llava-256")


@pytest.mark.slow
def test_dense_and_skipping_models_are_accurate_on_the_embedded_set(tmp_path):
    environment = os.environ | {
        "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}",
        "PRESETS": " ".join(PRESETS),
        "CHECKPOINTS": str(tmp_path / "checkpoints"),
        "RESULTS": str(tmp_path / "results"),
        "PAGE": str(tmp_path / "embedded.md"),
    }
    command = ["bash", "scripts/compare_embedded.sh"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    scored = [json.loads((tmp_path / "results/mmstar" / preset / "results.json").read_text()) for preset in PRESETS]
    dense, skipping = (entry["score"] for entry in scored)
    assert min(dense, skipping) >= 90 and dense - skipping <= 3, (dense, skipping)
    page = (tmp_path / "embedded.md").read_text()
    assert f"| `llava` | {dense:.1f}% |" in page and f"| `sv-llava-256` | {skipping:.1f}% |" in page
