"""A trade-off for people: the short table, figures of score against FLOPs and time, CSV, Markdown and one page."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.showing.pages import template
from llava_skip_base.console import PlainTable, chart_label, figure, make_table
from llava_skip_base.files import write_bytes, write_json, write_text
from llava_skip_base.plain_markdown import markdown_table, markdown_text

FLOPS, SECONDS = "score-flops.png", "score-seconds.png"
LARGEST = 420.0
"""Area, in square points, of the circle of the most FLOPs."""
HEADINGS = (
    "model", "tokens in", "in attention", "in the FFN", "in the cache", "FLOPs of dense", "score", "minus dense",
    "prefill (ms)", "decode (ms)", "peak memory (MiB)",
)  # fmt: skip
_SHORT = (0, 3, 5, 6, 7, 8, 9)


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row of the table as text, without its benchmarks."""
    tokens = [f"{row['image_tokens'][name]:.4g}" for name in ("entering", "attention", "ffn", "cache")]
    difference = "-" if row["is_dense"] else _interval(row["difference"], "+")
    times = ["-" if row[name] is None else f"{1000 * row[name]:.3g}" for name in ("prefill_seconds", "decode_seconds")]
    peak = row["peak_memory_bytes"]
    memory = "-" if peak is None else f"{peak / 2**20:.0f}"
    score = _interval(row["score"])
    return [row["model"], *tokens, f"{row['flops_of_dense']:.1%}", score, difference, *times, memory]


def short_table(tradeoff: Mapping[str, Any]) -> PlainTable:
    """The table for the terminal: what fits into it."""
    rows = [[row[n] for n in _SHORT] for row in map(cells, tradeoff["rows"])]
    return make_table("score against cost", [HEADINGS[n] for n in _SHORT], rows, right=len(_SHORT) - 1)


def benchmark_cells(tradeoff: Mapping[str, Any]) -> list[list[str]]:
    """The headline score of each model on each benchmark, the header first."""
    names = list(tradeoff["rows"][0]["benchmarks"])
    rows = [[row["model"], *(_headline(row["benchmarks"][name]) for name in names)] for row in tradeoff["rows"]]
    return [["model", *names], *rows]


def verdicts(tradeoff: Mapping[str, Any]) -> list[str]:
    """For each model as it is: which rivals of at most its FLOPs score more, and which less, in words."""
    lines = []
    for own in tradeoff["against"]:
        rivals = own["rivals"]
        text = f"{own['model']} ({own['flops_of_dense']:.1%} of the dense FLOPs)"
        if not rivals:
            lines.append(f"{text}: no rival has at most its FLOPs.")
            continue
        better = [rival for rival in rivals if rival["difference"]["low"] > 0]
        worse = [rival for rival in rivals if rival["difference"]["high"] < 0]
        best = max(rivals, key=lambda rival: rival["difference"]["value"])
        names = ", ".join(f"{rival['reduction']} ({_interval(rival['difference'], '+')})" for rival in better)
        lines.append(
            f"{text}: of {len(rivals)} rivals with at most its FLOPs, {len(better)} score more"
            f"{f': {names}' if names else ''}, {len(worse)} score less, and {len(rivals) - len(better) - len(worse)} "
            f"cannot be told apart. The best of them is {best['reduction']} ({_interval(best['difference'], '+')})."
        )
    return lines


def notes(tradeoff: Mapping[str, Any]) -> list[str]:
    """What a reader must know about the numbers."""
    row = tradeoff["rows"][0]
    questions = ", ".join(f"{name} ({own['questions']})" for name, own in row["benchmarks"].items())
    measured = [own["costs"] for own in row["benchmarks"].values() if own["costs"]]
    lines = [
        f"Made by {tradeoff['command']} (torch {tradeoff['versions']['torch']}, {tradeoff['dtype']}).",
        f"Benchmarks, with their questions: {questions}. The score is the share of questions that are "
        "answered rightly, in percent, as the mean of the benchmarks, and the brackets are its 95% confidence "
        "interval, from resamples of the images.",
        "The difference is paired, question by question. FLOPs are those of the language model's prefill with one "
        f"image and {tradeoff['text_tokens']} tokens of text, by the formula of docs/costs.md.",
        "A model with a method behind its name has the weights of the dense model, not trained with that method.",
        "Tokens are those of an image that enter the language model, and the means over its layers of those that "
        "attend, take the FFN and stay in the cache.",
    ]
    if measured:
        lines.append(
            f"Times are the median of the batches of {tradeoff['batch_size']}, a question, on {measured[0]['device']}; "
            "the prefill has the vision tower in it, and other work on the machine makes all of them longer. Peak "
            f"memory is {measured[0]['peak_memory']}."
        )
    return [*lines, *(f"Left out: {text}" for text in tradeoff["left_out"])]


def draw(rows: Sequence[Mapping[str, Any]], path: Path, by: str) -> None:
    """Figure 3: score against FLOPs (`by` is "flops_of_dense") or seconds a question; area is FLOPs of inference.

    Each method is a line through its budgets; models as they are have a black edge.
    """
    most = max(row["prefill_flops"] for row in rows)
    series = list(dict.fromkeys((row["dense"], row["series"]) for row in rows))
    several = len({row["dense"] for row in rows}) > 1
    with figure(path, (10, 6)) as axes:
        for color, (dense, name) in zip(_colors(len(series)), series, strict=True):
            own = sorted((row for row in rows if (row["dense"], row["series"]) == (dense, name)), key=lambda r: r[by])
            xs, ys = [row[by] for row in own], [row["score"]["value"] for row in own]
            low = [row["score"]["value"] - row["score"]["low"] for row in own]
            high = [row["score"]["high"] - row["score"]["value"] for row in own]
            label = f"{name} on {dense}" if several and not own[0]["as_it_is"] else name
            axes.errorbar(xs, ys, (low, high), color=color, linewidth=1, elinewidth=0.6, alpha=0.6)
            areas = [LARGEST * row["prefill_flops"] / most for row in own]
            edge = "black" if own[0]["as_it_is"] else "none"
            axes.scatter(xs, ys, areas, color=[color], edgecolors=edge, label=chart_label(label), alpha=0.8, zorder=3)
        axes.set(xlabel=_X[by], ylabel="score, mean of the benchmarks (%)")
        axes.set_title("circle: FLOPs of inference; bar: 95% interval; black edge: a model as it is", fontsize=9)
        axes.grid(alpha=0.3)
        legend = axes.figure.legend(loc="outside right upper", frameon=False, fontsize=8)
        for handle in legend.legend_handles:
            handle.set_sizes([40.0])


_X = {
    "flops_of_dense": "FLOPs of the prefill, relative to the dense model",
    "seconds": "measured seconds a question, prefill and decode",
}


def _colors(count: int) -> list[Any]:
    """As many different colors."""
    from matplotlib import colormaps  # slow to import, as in `figure`

    own = colormaps["tab20"]
    return [own(number) if count <= own.N else colormaps["hsv"](number / count) for number in range(count)]


def charts(tradeoff: Mapping[str, Any], folder: Path, prefix: str = "") -> list[str]:
    """Draw the figures that the rows allow, and return the names of their files."""
    rows = tradeoff["rows"]
    draw(rows, folder / f"{prefix}{FLOPS}", "flops_of_dense")
    if any(row["seconds"] is None for row in rows):
        return [f"{prefix}{FLOPS}"]
    draw(rows, folder / f"{prefix}{SECONDS}", "seconds")
    return [f"{prefix}{FLOPS}", f"{prefix}{SECONDS}"]


def markdown(tradeoff: Mapping[str, Any], figures: Sequence[str]) -> str:
    """The trade-off as Markdown, in which nothing from data is markup."""
    lines = ["# Score against cost", ""]
    lines += [f"{markdown_text(line)}\n" for line in notes(tradeoff)]
    lines += [f"![score]({name})\n" for name in figures]
    lines += [*markdown_table([HEADINGS, *map(cells, tradeoff["rows"])]), "", "## Models as they are", ""]
    lines += [f"- {markdown_text(line)}" for line in verdicts(tradeoff)] or ["Only dense models were given."]
    lines += ["", "## Benchmarks", "", "The headline score by each benchmark's own rule.", ""]
    lines += markdown_table(benchmark_cells(tradeoff))
    return "\n".join(lines) + "\n"


def as_csv(tradeoff: Mapping[str, Any]) -> str:
    """A line for each model and benchmark, and one for the mean of the benchmarks."""
    shared = ("model", "series", "dense", "reduction", "prefill_flops", "flops_of_dense")
    lines = []
    for row in tradeoff["rows"]:
        common = [row[name] for name in shared] + list(row["image_tokens"].values())
        parts = {"mean": row, **row["benchmarks"]}
        for name, part in parts.items():
            costs = row if name == "mean" else _seconds(part["costs"])
            times = [costs[key] for key in ("prefill_seconds", "decode_seconds", "peak_memory_bytes")]
            lines.append([name, *common, *part["score"].values(), *part["difference"].values(), *times])
    tokens = [f"image_tokens_{name}" for name in tradeoff["rows"][0]["image_tokens"]]
    ends = [f"{name}{end}" for name in ("score", "difference") for end in ("", "_low", "_high")]
    header = ["benchmark", *shared, *tokens, *ends, "prefill_seconds", "decode_seconds", "peak_memory_bytes"]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *lines])
    return text.getvalue()


def write_tradeoff(tradeoff: Mapping[str, Any], folder: Path) -> None:
    """Write `tradeoff.json`, `.csv` and `.md`, the figures, and `index.html`."""
    names = charts(tradeoff, folder)
    write_json(folder / "tradeoff.json", tradeoff)
    write_text(folder / "tradeoff.csv", as_csv(tradeoff))
    write_text(folder / "tradeoff.md", markdown(tradeoff, names))
    page = template("tradeoff.html.jinja").render(
        notes=notes(tradeoff),
        charts=names,
        headings=HEADINGS,
        rows=[cells(row) for row in tradeoff["rows"]],
        verdicts=verdicts(tradeoff),
        benchmarks=benchmark_cells(tradeoff),
    )
    write_bytes(folder / "index.html", page.encode("utf-8", "replace"))


def write_page(tradeoff: Mapping[str, Any], path: Path) -> None:
    """Write the Markdown to `path`, and its figures beside it."""
    names = charts(tradeoff, path.parent, f"{path.stem}-")
    write_text(path, markdown(tradeoff, names))


def _seconds(costs: Mapping[str, Any] | None) -> dict[str, Any]:
    names = {"prefill_seconds": "prefill_seconds_a_question", "decode_seconds": "decode_seconds_a_question"}
    names["peak_memory_bytes"] = "peak_memory_bytes"
    return {name: costs and costs[key] for name, key in names.items()}


def _interval(values: Mapping[str, float], sign: str = "") -> str:
    return f"{values['value']:{sign}.1f} [{values['low']:{sign}.1f}, {values['high']:{sign}.1f}]"


def _headline(part: Mapping[str, Any]) -> str:
    most = "" if part["full_score"] == 100.0 else f" of {part['full_score']:.0f}"
    return f"{part['headline']:.1f}{most}"
