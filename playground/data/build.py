"""Build the embedded data set: `python -m playground.data.build`.

The same arguments always give the same bytes. The manifest is written last, so a folder without one is incomplete.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer
from filelock import FileLock

from llava_skip_base.console import make_table, output_console, print_next, program
from llava_skip_base.errors import UserError
from llava_skip_base.files import read_json
from llava_skip_base.paths import embedded_data, shown

from .formats import caption_record, training_records, write_indented, write_mmbench, write_mmstar, write_mmvet
from .more_answers import (
    write_ai2d,
    write_chartqa,
    write_docvqa,
    write_hallusionbench,
    write_scienceqa,
    write_seed,
    write_vizwiz,
    write_vqav2,
)
from .scenes import digit_pools
from .short_answers import (
    write_gqa,
    write_mathvista,
    write_mme,
    write_mmmu,
    write_ocrbench,
    write_pope,
    write_textvqa,
)
from .tokenizer import load_chat_template, train_tokenizer

# Raise it whenever the builder would write other bytes for the same arguments.
BUILDER_VERSION = 6
# Raise it instead where only files of benchmarks are added: the others, the training images among them, then stay.
EVALUATION_VERSION = 2
DEFAULT_TRAIN_IMAGES = 30_000
MANIFEST = "manifest.json"


def ensure_built(
    output: Path | None = None,
    train_images: int = DEFAULT_TRAIN_IMAGES,
    seed: int = 0,
    force: bool = False,
    poses: float = 1.0,
) -> Path:
    """Build the data set unless `output` already has what the arguments ask for; return the folder.

    The default is where training and evaluation look. Several processes may call it at once: one builds, the others
    wait for it.
    """
    if train_images < 1:
        raise UserError(f"train_images is {train_images}, but a data set needs at least one image")
    output = output or embedded_data()
    if output.is_file():
        raise UserError(f"{output} is a file: give a folder.")
    request: dict[str, Any] = {
        "builder_version": BUILDER_VERSION,
        "seed": seed,
        "train_images": train_images,
        "chat_template": _sha256(load_chat_template().encode()),
    }
    if poses != 1.0:  # an entry of its own only then, so that a folder built before there was a choice stays valid
        request["poses"] = poses
    output.mkdir(parents=True, exist_ok=True)
    with FileLock(output / ".lock"):
        manifest = read_manifest(output)
        if force or manifest.get("request") != request:
            sys.stderr.write(f"building the embedded data set of {train_images} images in {shown(output)}, once\n")
            _build(output, request)
        elif manifest.get("evaluation_version") != EVALUATION_VERSION:
            sys.stderr.write(f"adding benchmarks to the embedded data set in {shown(output)}, once\n")
            counts = {**manifest.get("counts", {}), **_write_evaluation(output / "eval", seed)}
            _write_manifest(output, request, counts)
    return output


def read_manifest(output: Path) -> dict[str, Any]:
    """The manifest of a built folder; empty when there is none, or none that can be read."""
    try:
        return read_json(output / MANIFEST)
    except UserError:
        return {}


def _build(output: Path, request: dict[str, Any]) -> None:
    (output / MANIFEST).unlink(missing_ok=True)
    for part in ("images", "eval", "tokenizer"):
        shutil.rmtree(output / part, ignore_errors=True)
    counts = _write_training(output, request["train_images"], request["seed"], request.get("poses", 1.0))
    counts |= _write_evaluation(output / "eval", request["seed"])
    _write_manifest(output, request, counts)


def _write_manifest(output: Path, request: dict[str, Any], counts: dict[str, int]) -> None:
    text_files = [p for p in output.rglob("*") if p.suffix in {".json", ".tsv", ".jinja"}]
    checksums = {p.relative_to(output).as_posix(): _sha256(p.read_bytes()) for p in sorted(text_files)}
    checksums.pop(MANIFEST, None)
    manifest = {"request": request, "evaluation_version": EVALUATION_VERSION, "counts": counts, "sha256": checksums}
    write_indented(output / MANIFEST, manifest)


def _write_training(output: Path, images: int, seed: int, poses: float) -> dict[str, int]:
    """Write train.json, its images, captions of them and the tokenizer trained on its text."""
    (output / "images" / "train").mkdir(parents=True)
    records, captions = [], []
    for record, scene in training_records(digit_pools()[0], images, Random(f"{seed}/train"), poses):
        records.append(record)
        if scene:
            (output / "images" / record["image"]).write_bytes(scene.png())
            captions.append(caption_record(record, scene))
    write_indented(output / "train.json", records)
    write_indented(output / "captions.json", captions)
    tokenizer = train_tokenizer(turn["value"] for record in records for turn in record["conversations"])
    tokenizer.save_pretrained(output / "tokenizer")
    return {"train records": len(records), "train pictures": images, "tokenizer entries": len(tokenizer)}


def _write_evaluation(folder: Path, seed: int) -> dict[str, int]:
    """Write the benchmarks; each has a random generator of its own, so none depends on another."""
    folder.mkdir(exist_ok=True)
    pool = digit_pools()[1]
    return {
        "MMBench rows": write_mmbench(folder / "mmbench.tsv", pool, Random(f"{seed}/mmbench")),
        "MMStar rows": write_mmstar(folder / "mmstar.tsv", pool, Random(f"{seed}/mmstar")),
        "MM-Vet questions": write_mmvet(folder / "mm-vet", pool, Random(f"{seed}/mm-vet")),
        "POPE questions": write_pope(folder / "pope.tsv", pool, Random(f"{seed}/pope")),
        "MME questions": write_mme(folder / "mme.tsv", pool, Random(f"{seed}/mme")),
        "GQA questions": write_gqa(folder / "gqa.json", pool, Random(f"{seed}/gqa")),
        "TextVQA questions": write_textvqa(folder / "textvqa.json", pool, Random(f"{seed}/textvqa")),
        "OCRBench questions": write_ocrbench(folder / "ocrbench.json", pool, Random(f"{seed}/ocrbench")),
        "MathVista questions": write_mathvista(folder / "mathvista", pool, Random(f"{seed}/mathvista")),
        "MMMU questions": write_mmmu(folder / "mmmu.tsv", pool, Random(f"{seed}/mmmu")),
        "ScienceQA questions": write_scienceqa(folder / "scienceqa", pool, Random(f"{seed}/scienceqa")),
        "SEED-Bench questions": write_seed(folder / "seed_bench/SEED-Bench.json", pool, Random(f"{seed}/seed")),
        "VizWiz questions": write_vizwiz(folder / "vizwiz", pool, Random(f"{seed}/vizwiz")),
        "VQAv2 questions": write_vqav2(folder / "vqav2", pool, Random(f"{seed}/vqav2")),
        "AI2D questions": write_ai2d(folder / "ai2d.tsv", pool, Random(f"{seed}/ai2d")),
        "ChartQA questions": write_chartqa(folder / "chartqa", pool, Random(f"{seed}/chartqa")),
        "DocVQA questions": write_docvqa(folder / "docvqa", pool, Random(f"{seed}/docvqa")),
        "HallusionBench questions": write_hallusionbench(
            folder / "hallusionbench", pool, Random(f"{seed}/hallusionbench")
        ),
    }


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def build(
    output: Annotated[Path | None, typer.Option(help="Folder; by default where training and evaluation look.")] = None,
    train_images: Annotated[int, typer.Option(min=1, help="Number of training images.")] = DEFAULT_TRAIN_IMAGES,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Build even if the folder is up to date.")] = False,
    poses: Annotated[
        float, typer.Option(min=0.0, max=5.0, help="How far training digits are turned and moved: times the default.")
    ] = 1.0,
) -> None:
    """Build the embedded data set of handwritten digits."""
    folder = ensure_built(output, train_images, seed, force, poses)
    counts = read_manifest(folder)["counts"]
    output_console().print(make_table(shown(folder), ("part", "count"), counts.items(), right=1))
    print_next("llava-skip train --recipe embedded, then llava-skip eval")


def main() -> None:
    """Run `build` as a program."""
    program(build)


if __name__ == "__main__":
    main()
