"""What the model card of a run says, from the contents of its `run.json` and `train_result.json`."""

from __future__ import annotations

from typing import Any

from llava_skip.model_card import CardFacts, source_name

_SOURCES = {"model": "model", "vision_tower": "vision tower", "projector": "projector", "tokenizer": "tokenizer"}


def run_facts(resolved: dict[str, Any], result: dict[str, Any], is_adapter: bool = False) -> CardFacts:
    """The facts of a finished run.

    Args:
        resolved: its arguments.
        result: what it left; empty if that is not known.
        is_adapter: whether the folder holds the adapter alone.
    """
    model, data = resolved["model"], resolved["data"]
    rows = [("data", source_name(data["data"]))]
    if data.get("eval_data"):
        rows.append(("validation data", source_name(data["eval_data"])))
    if result:
        rows += _result_rows(result)
    if model.get("lora_enable"):
        rows.append(("LoRA rank", str(model["lora_r"])))
    return CardFacts(
        sources={what: model.get(name) for name, what in _SOURCES.items()},
        rows=rows,
        parameters=result.get("parameters"),
        is_adapter=is_adapter,
    )


def _result_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("steps", f"{result['steps']:,}"),
        ("samples", f"{result['samples']:,.0f}"),
        ("supervised tokens", f"{result['supervised']:,.0f}"),
        ("final loss", f"{result['final_loss']:.4f}"),
    ]
    if validation := result.get("validation"):
        rows.append(("validation loss", f"{validation[-1]['eval_loss']:.4f}"))
    if evaluated := result.get("benchmarks"):
        last = evaluated[-1]
        scores = {name: score for name, score in last["scores"].items() if score is not None}
        rows += [(f"{name} at step {last['step']}", f"{score:.1f}") for name, score in scores.items()]
    return [*rows, ("exported model", str(result["exported"]))]
