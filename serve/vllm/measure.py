"""What images cost in vLLM, model against model: ``python -m serve.vllm.measure --model DENSE --model SKIPPING``.

All requests have one image and the same question, and are sent at once. Each model has the same memory for its cache.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine's scheduler is asked what it holds

import numpy as np
import typer
import vllm
from PIL import Image

from llava_skip_base.console import make_app, make_table, output_console, run_app
from llava_skip_base.errors import UserError

QUESTION = "USER: {}What is this? ASSISTANT:"


class Measured(NamedTuple):
    """What a model did with the requests.

    Attributes:
        image_rows: entries of a layer's cache that an image takes.
        image_blocks: blocks of the cache that a request with one image takes after its prompt.
        most: the most requests that were served at once.
        requests: requests a second.
        first: median seconds from the start to a request's first token.
    """

    image_rows: int
    image_blocks: int
    most: int
    requests: float
    first: float


def load(folder: Path, blocks: int, requests: int, **options: Any) -> Any:
    """An engine with this many blocks for the cache, which may serve this many requests at once."""
    settings = {"num_gpu_blocks_override": blocks, "max_num_seqs": requests, "seed": 0, "mm_processor_cache_gb": 0}
    return vllm.LLM(str(folder), **settings | options)


def measure(llm: Any, requests: int, new: int) -> Measured:
    """Send the requests at once, and serve them to their end.

    Args:
        llm: the engine, in this process.
        requests: their number.
        new: tokens of each answer.
    """
    engine, params = llm.llm_engine, vllm.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    scheduler = engine.engine_core.engine_core.scheduler
    rows, blocks = zip(*(_held(engine, scheduler, prompt) for prompt in (_prompt(0), _prompt(None))), strict=True)
    for number in range(requests):
        engine.add_request(str(number), _prompt(number), params)
    first: dict[str, float] = {}
    start, most = time.perf_counter(), 0
    while engine.has_unfinished_requests():
        outputs = engine.step()
        most = max(most, len(scheduler.running))
        for output in outputs:
            first.setdefault(output.request_id, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    return Measured(rows[0] - rows[1], blocks[0], most, requests / seconds, median(first.values()))


def _prompt(number: int | None) -> dict[str, Any]:
    """The question about an image of its own, or about none."""
    if number is None:
        return {"prompt": QUESTION.format("")}
    pixels = np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    return {"prompt": QUESTION.format("<image>"), "multi_modal_data": {"image": [Image.fromarray(pixels)]}}


def _held(engine: Any, scheduler: Any, prompt: dict[str, Any]) -> tuple[int, int]:
    """Rows and blocks of the cache that a request has after its prompt."""
    engine.add_request("one", prompt, vllm.SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    engine.step()
    (request,) = scheduler.running
    (blocks,) = scheduler.kv_cache_manager.get_block_ids(request.request_id)
    held = request.num_computed_tokens, len(blocks)
    while engine.has_unfinished_requests():
        engine.step()
    return held


def run(
    model: Annotated[list[Path], typer.Option(help="Saved model, given for each; the first one is compared with.")],
    blocks: Annotated[int, typer.Option(help="Blocks of the cache, the same for all.")] = 2048,
    requests: Annotated[int, typer.Option(help="Requests, each with an image.")] = 256,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 32,
    dtype: Annotated[str, typer.Option(help="Number format.")] = "auto",
) -> None:
    """Measure cache, speed and most requests at once of models in vLLM, with the same memory for the cache."""
    if blocks < 2 or requests < 1 or new_tokens < 1:
        raise UserError("--blocks must be 2 or more, --requests and --new-tokens 1 or more.")
    found = {}
    for folder in model:
        llm = load(folder, blocks, requests, dtype=dtype)
        measure(llm, 2, 2)  # what is slow only once
        found[folder.name] = measure(llm, requests, new_tokens)
        llm.llm_engine.engine_core.shutdown()
        del llm
    base = next(iter(found.values()))
    rows = [
        (name, one.image_rows, one.image_blocks, one.most, f"{one.most / base.most:.2f}", f"{one.requests:.2f}",
         f"{one.requests / base.requests:.2f}", f"{one.first:.2f}", f"{one.first / base.first:.2f}")
        for name, one in found.items()
    ]  # fmt: skip
    headings = ["model", "entries", "blocks", "at once", "x", "requests/s", "x", "first token s", "x"]
    output_console().print(make_table("One image a request, same memory for the cache", headings, rows, right=8))


app = make_app(run)


def main() -> None:
    """Run the command line."""
    run_app(app)


if __name__ == "__main__":
    main()
