"""Build the embedded data set: `python -m playground.data.build`.

The same arguments always give the same bytes. The manifest is written last, so a folder without one is incomplete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer
from filelock import FileLock
from rich.console import Console
from rich.table import Table

from llava_skip.errors import UserError

from .formats import caption_record, training_records, write_json, write_mmbench, write_mmstar, write_mmvet
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
DEFAULT_OUTPUT = Path(__file__).parent / "digits"
DEFAULT_TRAIN_IMAGES = 30_000
MANIFEST = "manifest.json"


def ensure_built(
    output: Path = DEFAULT_OUTPUT, train_images: int = DEFAULT_TRAIN_IMAGES, seed: int = 0, force: bool = False
) -> Path:
    """Build the data set unless `output` already holds what is asked for; return `output`.

    Several processes may call it at once: one builds, the others wait for it.
    """
    if train_images < 1:
        raise UserError(f"train_images is {train_images}, but a data set needs at least one picture")
    output = Path(output)
    request = {
        "builder_version": BUILDER_VERSION,
        "seed": seed,
        "train_images": train_images,
        "chat_template": _sha256(load_chat_template().encode()),
    }
    output.mkdir(parents=True, exist_ok=True)
    with FileLock(output / ".lock"):
        if force or read_manifest(output).get("request") != request:
            _build(output, request)
    return output


def read_manifest(output: Path) -> dict[str, Any]:
    """The manifest of a built folder; empty when there is none, or none that can be read."""
    try:
        return json.loads((output / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _build(output: Path, request: dict[str, Any]) -> None:
    (output / MANIFEST).unlink(missing_ok=True)
    for part in ("images", "eval", "tokenizer"):
        shutil.rmtree(output / part, ignore_errors=True)
    counts = _write_training(output, request["train_images"], request["seed"])
    counts |= _write_evaluation(output / "eval", request["seed"])
    text_files = [p for p in output.rglob("*") if p.suffix in {".json", ".tsv", ".jinja"}]
    checksums = {p.relative_to(output).as_posix(): _sha256(p.read_bytes()) for p in sorted(text_files)}
    partial = output / (MANIFEST + ".partial")
    write_json(partial, {"request": request, "counts": counts, "sha256": checksums})
    os.replace(partial, output / MANIFEST)


def _write_training(output: Path, images: int, seed: int) -> dict[str, int]:
    """Write train.json, its pictures, captions of them and the tokenizer trained on its text."""
    (output / "images" / "train").mkdir(parents=True)
    records, captions = [], []
    for record, scene in training_records(digit_pools()[0], images, Random(f"{seed}/train")):
        records.append(record)
        if scene:
            (output / "images" / record["image"]).write_bytes(scene.png())
            captions.append(caption_record(record, scene))
    write_json(output / "train.json", records)
    write_json(output / "captions.json", captions)
    tokenizer = train_tokenizer(turn["value"] for record in records for turn in record["conversations"])
    tokenizer.save_pretrained(output / "tokenizer")
    return {"train records": len(records), "train pictures": images, "tokenizer entries": len(tokenizer)}


def _write_evaluation(folder: Path, seed: int) -> dict[str, int]:
    """Write the benchmarks; each draws from a generator of its own, so they do not depend on one another."""
    folder.mkdir()
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
    }


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def main(
    output: Annotated[Path, typer.Option(help="Folder to write to.")] = DEFAULT_OUTPUT,
    train_images: Annotated[int, typer.Option(min=1, help="Number of training pictures.")] = DEFAULT_TRAIN_IMAGES,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Build even if the folder is up to date.")] = False,
) -> None:
    """Build the embedded data set of handwritten digits."""
    folder = ensure_built(output, train_images, seed, force)
    table = Table("part", "count", title=str(folder))
    for part, count in read_manifest(folder)["counts"].items():
        table.add_row(part, str(count))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
