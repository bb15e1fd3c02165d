"""A pretrained resampler grows: each rule gives the names and shapes of a resampler of the larger configuration."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_skip.checkpoints import native_name
from llava_skip.checkpoints.extension import EXTENSIONS, extend_resampler
from llava_skip.vision.resampler import ChainOfSightResampler, ResamplerConfig

PREFIX = "model.mm_projector."
WIDTH = 16


def official(windows: tuple[int, ...], queries: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random weights of a resampler under the paper's names, written out from the names alone."""
    weights = {}
    for w, q in zip(windows, queries, strict=True):
        weights[f"cls_token_w{w}_q{q}"] = torch.randn(1, q, WIDTH)
        for level in (15, 22):
            attention, mlp = f"attn_0_w{w}_l{level}_q{q}", f"mlp_0_w{w}_l{level}_q{q}"
            weights |= {
                f"{attention}.to_q.weight": torch.randn(WIDTH, WIDTH),
                f"{attention}.to_kv.weight": torch.randn(2 * WIDTH, 8),
            }
            weights |= {
                f"{attention}.proj.weight": torch.randn(WIDTH, WIDTH),
                f"{attention}.proj.bias": torch.randn(WIDTH),
            }
            for norm, size in (
                (f"{attention}.query_norm", WIDTH),
                (f"{attention}.cont_norm", 8),
                (f"ln_0_w{w}_l{level}_q{q}", WIDTH),
            ):
                weights |= {f"{norm}.weight": torch.randn(size), f"{norm}.bias": torch.randn(size)}
            weights |= {f"{mlp}.fc1.weight": torch.randn(4 * WIDTH, WIDTH), f"{mlp}.fc1.bias": torch.randn(4 * WIDTH)}
            weights |= {f"{mlp}.fc2.weight": torch.randn(WIDTH, 4 * WIDTH), f"{mlp}.fc2.bias": torch.randn(WIDTH)}
    weights |= {"ln_out.weight": torch.randn(WIDTH), "ln_out.bias": torch.randn(WIDTH)}
    weights |= {"out_proj.weight": torch.randn(24, WIDTH), "out_proj.bias": torch.randn(24)}
    return {PREFIX + name: tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("rule", EXTENSIONS)
def test_every_rule_fits_the_larger_resampler(rule):
    extension = EXTENSIONS[rule]
    extended = extend_resampler(official(extension.windows, extension.queries), extension, PREFIX)
    _, windows, queries = zip(*extension.scales(), strict=True)
    config = ResamplerConfig(windows=windows, queries=queries, levels=(15, 22), width=WIDTH)
    assert sum(queries) == int(rule.rpartition("to")[2].split("_")[0])
    config.check(side=max(windows), layers=24)  # the coarsest window is the whole image
    module = ChainOfSightResampler(config, context=8, text_width=24)
    module.load_state_dict(
        {native_name(n).removeprefix("model.multi_modal_projector."): t for n, t in extended.items()}
    )


def test_a_window_of_the_fine_scale_copies_the_queries_of_the_coarser_window_over_it():
    extension = EXTENSIONS["res224to448_80to1296"]
    weights = official(extension.windows, extension.queries)
    old = weights[f"{PREFIX}cls_token_w4_q64"].reshape(4, 4, 4, WIDTH)
    new = extend_resampler(weights, extension, PREFIX)[f"{PREFIX}cls_token_w2_q1024"].reshape(16, 16, 4, WIDTH)
    for row, column in ((0, 0), (3, 7), (15, 8)):
        assert torch.equal(new[row, column], old[row // 4, column // 4])


@pytest.mark.slow
def test_command_writes_a_file_and_names_mistakes(tmp_path):
    extension = EXTENSIONS["res224to448_80to336"]
    save_file(official(extension.windows, extension.queries), tmp_path / "small.safetensors")

    def run(source: str, rule: str) -> subprocess.CompletedProcess:
        command = [
            sys.executable,
            "-m",
            "llava_skip.extend",
            str(tmp_path / source),
            rule,
            str(tmp_path / "out.safetensors"),
        ]
        return subprocess.run(command, capture_output=True, text=True)

    result = run("small.safetensors", "res224to448_80to336")
    assert result.returncode == 0 and "windows of 4 with 256 queries" in result.stdout, result.stderr
    assert load_file(tmp_path / "out.safetensors")[f"{PREFIX}cls_token_w16_q64"].shape == (1, 64, WIDTH)
    assert "Unknown rule 'no'" in run("small.safetensors", "no").stderr
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert "holds no resampler" in run("other.safetensors", "res224to448_80to336").stderr
    assert "hold no scale with windows of 24 and 16 queries" in run("small.safetensors", "res336to448_80to80").stderr
