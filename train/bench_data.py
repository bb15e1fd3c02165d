"""How fast data is read, and in how much memory.

    python -m train.bench_data --records 1000000

Made-up records are loaded in a new process, whose memory is measured; made-up photographs are read as training reads
them. Everything is written into a temporary folder, which needs about 3 GB for a million records.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from llava_skip_base.console import make_table, one_message, output_console, print_text
from llava_skip_base.files import write_json
from llava_skip_base.machine import usable_cores
from train.arguments import ModelArguments
from train.command_line import read_command_line
from train.data import ConversationDataset, RecordSet, load_records
from train.recipe.model import prepare

WORDS = "the picture shows a small red house beside the road and two people who walk past it in the rain".split()
MEBIBYTE = 2**20


@dataclass
class BenchArguments:
    """What is measured."""

    records: int = field(default=1_000_000, metadata={"help": "Made-up records whose loading is measured."})
    pictures: int = field(default=512, metadata={"help": "Made-up photographs that are read."})
    width: int = field(default=640, metadata={"help": "Of a photograph, in pixels; its height is 3/4 of that."})
    workers: list[int] = field(default_factory=lambda: [1, 4], metadata={"help": "Numbers of loader workers."})
    report: str = field(default="bench_data.json", metadata={"help": "JSON of the figures."})


def made_up_records(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """LLaVA records of about the length of the 665k mix's: 1 to 5 rounds, one in eight without an image."""
    generator = np.random.default_rng(seed)
    for number in range(count):
        rounds, turns = int(generator.integers(1, 6)), []
        for _ in range(rounds):
            for speaker, words in (("human", 12), ("gpt", 30)):
                turns.append({"from": speaker, "value": " ".join(generator.choice(WORDS, words))})
        record: dict[str, Any] = {"id": number if number % 3 else f"record-{number}", "conversations": turns}
        if number % 8:
            record["image"] = f"{number:07}.jpg"
            turns[0]["value"] = f"<image>\n{turns[0]['value']}"
        yield record


def write_records(path: Path, count: int) -> None:
    """A JSON list of made-up records: the same few thousand under many names, since making them is slow."""
    different = list(made_up_records(min(count, 4096)))
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            file.write("[" if number == 0 else ",\n")
            file.write(json.dumps(different[number % len(different)] | {"id": f"record-{number}"}))
        file.write("]")


def load_and_read(data: str, cache: str, reads: int) -> dict[str, float]:
    """Load a set and read records of it in random order; seconds, and memory of this process in MiB."""
    os.environ["HF_DATASETS_CACHE"] = cache
    before = psutil.Process().memory_info()
    started = time.perf_counter()
    records = load_records(data)
    loaded = time.perf_counter() - started
    order = np.random.default_rng(0).permutation(len(records))[:reads]
    started = time.perf_counter()
    for row in order:
        records.record(int(row))
    read = time.perf_counter() - started
    after = psutil.Process().memory_info()
    return {
        "records": len(records),
        "load_seconds": loaded,
        "records_per_second": len(order) / read,
        "resident_mib": after.rss / MEBIBYTE,
        "own_mib": (after.rss - after.shared) / MEBIBYTE,
        "own_before_mib": (before.rss - before.shared) / MEBIBYTE,
    }


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function in a new process, which has no memory of data yet."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


class _Opened(Dataset):
    """The images of a set, decoded and converted to RGB, and nothing else."""

    def __init__(self, records: RecordSet) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> int:
        images = self.records.images_of(index)
        return sum(images.open(image).width for image in self.records.record(index)["images"])


def per_second(dataset: Dataset, workers: int) -> float:
    """Items a second of a loader, without its start."""
    loader: Any = iter(DataLoader(dataset, batch_size=8, num_workers=workers, collate_fn=len))
    next(loader)
    started = time.perf_counter()
    return sum(loader) / (time.perf_counter() - started)


def made_up_images(folder: Path, arguments: BenchArguments) -> RecordSet:
    """JPEGs with as much detail as photographs have, and a record for each."""
    generator, size = np.random.default_rng(0), (arguments.width, arguments.width * 3 // 4)
    records = []
    for number in range(arguments.pictures):
        coarse = generator.integers(0, 255, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
        turns = [{"from": "human", "value": "<image>\n" + " ".join(WORDS)}, {"from": "gpt", "value": " ".join(WORDS)}]
        records.append({"id": number, "image": f"{number}.jpg", "conversations": turns})
    write_json(folder / "images.json", records)
    return load_records(str(folder / "images.json"), str(folder))


def measure(model: ModelArguments, arguments: BenchArguments) -> dict[str, Any]:
    """All figures."""
    figures: dict[str, Any] = {"cores": usable_cores(), "arguments": vars(arguments)}
    with tempfile.TemporaryDirectory(prefix="bench-data-") as name:
        folder, reads = Path(name), min(arguments.records, 20_000)
        data, cache = str(folder / "records.json"), str(folder / "cache")
        os.environ["HF_DATASETS_CACHE"] = cache
        write_records(Path(data), arguments.records)
        figures["json_mib"] = os.path.getsize(data) / MEBIBYTE
        figures["first_load"] = in_new_process(load_and_read, data, cache, reads)
        figures["later_load"] = in_new_process(load_and_read, data, cache, reads)
        records = made_up_images(folder, arguments)
        samples = ConversationDataset(records, prepare(model)[1], 4096, as_bytes=True)
        figures["pictures_per_second"] = {n: per_second(_Opened(records), n) for n in arguments.workers}
        figures["samples_per_second"] = {n: per_second(samples, n) for n in arguments.workers}
    return figures


def show(figures: dict[str, Any]) -> None:
    """The figures as a table."""
    count, rows = figures["first_load"]["records"], []
    for title, name in (("first load", "first_load"), ("later load", "later_load")):
        load = figures[name]
        rows += [
            (f"{title} of {count:,} records ({figures['json_mib']:,.0f} MiB)", f"{load['load_seconds']:.1f} s"),
            ("  resident memory after it", f"{load['resident_mib']:,.0f} MiB, {load['own_mib']:,.0f} of them its own"),
            ("  records/s in random order, one process", f"{load['records_per_second']:,.0f}"),
        ]
    for title, name in (("images decoded/s", "pictures_per_second"), ("samples encoded/s", "samples_per_second")):
        rows += [(f"{title}, {workers} workers", f"{rate:,.0f}") for workers, rate in figures[name].items()]
    output_console().print(make_table(f"reading data, {figures['cores']} cores", ("", ""), rows))


def main() -> None:
    """Measure, show, and write the figures."""
    with one_message():
        model, arguments = read_command_line((ModelArguments, BenchArguments), sys.argv[1:])
        figures = measure(model, arguments)
    write_json(Path(arguments.report).expanduser(), figures)
    show(figures)
    print_text(f"The figures are in {arguments.report}; docs/data.md has those of other machines.")


if __name__ == "__main__":
    main()
